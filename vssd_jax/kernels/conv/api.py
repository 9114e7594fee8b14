"""A convolution over all channels."""

from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "conv",
    {
        "onednn": dispatch.by_onednn("vssd_jax.kernels.conv.onednn"),
        "xla": dispatch.plain("vssd_jax.kernels.conv.xla"),
    },
)


def conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "h w C D"],
    bias: Float[Array, " D"] | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    implementation: str | None = None,
) -> Float[Array, "B H2 W2 D"]:
    """The convolution of `x` with `kernel`, plus `bias`.

    Args:
      x: (B, H, W, C).
      kernel: (h, w, C, D); rounded to the dtype of `x`.
      bias: (D,) or None; added in float32 at least.
      stride: of rows and columns.
      padding: zeros on each side.
      implementation: "xla", "onednn" (on a CPU with AMX), or see
        `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      (B, (H + 2 padding - h) // stride + 1, (W + 2 padding - w) // stride + 1, D) in the dtype of
      `x`.
    """
    shared = {"kernel": kernel, "bias": bias}
    return OPERATION.run(implementation, {"x": x}, shared, stride=stride, padding=padding)
