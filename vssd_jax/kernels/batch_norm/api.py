"""Batch normalisation with the moments of the batch, as in training."""

import jax

from vssd_jax.errors import UserError
from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "batch_norm", {"xla": dispatch.plain("vssd_jax.kernels.batch_norm.xla")}
)


def batch_norm(
    x: Float[Array, "*batch C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    epsilon: float,
    dtype: jax.typing.DTypeLike,
    *,
    images: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch C"], Float[Array, " C"], Float[Array, " C"]]:
    """Normalises with the moments of the batch, or of groups of it, over all axes but the last.

    Args:
      x: (..., C); the first of several axes is that of the images.
      scale, bias: (C,), in the dtype of the computation.
      epsilon: added to the variance.
      dtype: of the result.
      images: how many, one after the other, share their moments, as those of a GPU do in PyTorch
        without synchronisation; None: all of the global batch.
      implementation: "xla", or see `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      (..., C); and mean and biased variance (C,), which carry no gradient: those of the groups,
      averaged over them.

    Raises:
      UserError: `images` does not divide the batch.
    """
    if images is not None and x.shape[0] % images:
        raise UserError(f"a batch of {x.shape[0]} has no whole groups of {images} images")
    # Nothing is `batched`: the moments are those of the global batch, so that no device can
    # compute its part alone.
    arrays = {"x": x, "scale": scale, "bias": bias}
    return OPERATION.run(implementation, {}, arrays, epsilon=epsilon, dtype=dtype, images=images)
