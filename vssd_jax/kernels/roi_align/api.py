"""RoIAlign of regions on the levels of a feature pyramid."""

from collections.abc import Sequence

from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "roi_align",
    {
        "pallas": dispatch.Implementation(
            "vssd_jax.kernels.roi_align.pallas", dispatch.pallas_triton
        ),
        "xla": dispatch.plain("vssd_jax.kernels.roi_align.xla"),
    },
)


def roi_align(
    maps: Sequence[Float[Array, "B _ _ C"]],
    boxes: Float[Array, "B R 4"],
    *,
    strides: Sequence[int],
    bins: int,
    implementation: str | None = None,
) -> Float[Array, "B R {bins} {bins} C"]:
    """RoIAlign of each region on the level that fits its size, exactly as mmcv's.

    Half-pixel aligned, with as many samples as a region needs; see
    `vssd_jax.kernels.roi_align.sampling` for the levels and the samples. The boxes get no gradient.

    Args:
      maps: (B, H/s, W/s, C) for each stride s, from fine to coarse.
      boxes: (B, R, 4), x1 y1 x2 y2 in pixels of the image.
      strides: of the maps.
      bins: of each axis.
      implementation: "xla", "pallas" (on an NVIDIA GPU, up to 16 bins; a kernel with a gradient of
        its own, which cannot be differentiated again), or see
        `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      (B, R, bins, bins, C) in the dtype of the maps.

    Raises:
      UserError: see `choose`.
    """
    batched = {"maps": tuple(maps), "boxes": boxes}
    return OPERATION.run(implementation, batched, strides=tuple(strides), bins=bins)
