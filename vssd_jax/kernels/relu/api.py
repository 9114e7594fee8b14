"""ReLU."""

from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation("relu", {"xla": dispatch.plain("vssd_jax.kernels.relu.xla")})


def relu(x: Float[Array, "..."], *, implementation: str | None = None) -> Float[Array, "..."]:
    """max(x, 0) for `x` of any shape.

    Args:
      x: any shape.
      implementation: "xla", or see `vssd_jax.kernels.dispatch.Operation.choose`.
    """
    return OPERATION.run(implementation, {"x": x})
