"""SiLU."""

from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation("silu", {"xla": dispatch.plain("vssd_jax.kernels.silu.xla")})


def silu(x: Float[Array, "..."], *, implementation: str | None = None) -> Float[Array, "..."]:
    """`x * sigmoid(x)`, in the dtype of `x`.

    Args:
      x: any shape.
      implementation: "xla", or see `vssd_jax.kernels.dispatch.Operation.choose`.
    """
    return OPERATION.run(implementation, {"x": x})
