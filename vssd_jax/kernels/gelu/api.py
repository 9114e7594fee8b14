"""Exact GELU."""

from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation("gelu", {"xla": dispatch.plain("vssd_jax.kernels.gelu.xla")})


def gelu(x: Float[Array, "..."], *, implementation: str | None = None) -> Float[Array, "..."]:
    """`x` times the distribution function of the normal distribution at `x`.

    Args:
      x: any shape.
      implementation: "xla", or see `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      As `x`, in its dtype; computed in float32 at least.
    """
    return OPERATION.run(implementation, {"x": x})
