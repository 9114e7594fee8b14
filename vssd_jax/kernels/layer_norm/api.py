"""LayerNorm over the channels, with an optional gate."""

import jax

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.layer_norm import cpu, xla


def layer_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    gate: jax.Array | None = None,
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> jax.Array:
    """Normalises the last axis in two passes, in float32 at least.

    Args:
      x: (..., C).
      scale, bias: (C,).
      gate: (..., C) or None; the result is multiplied by it.
      epsilon: added to the variance.
      implementation: of the gradient, "xla", "pallas", or None for the device's best: on a GPU a
        kernel, which has no derivative itself. The forward pass is always XLA's.

    Returns:
      (..., C) in the dtype of `x`.

    Raises:
      UserError: if a forced implementation cannot run here.
    """

    def reason(here):
        # Imported late: Pallas takes a while, and a CPU has no use for it.
        from vssd_jax.kernels.layer_norm import pallas

        return here.lacks_triton() or pallas.supports(x)

    name = "LayerNorm's gradient"
    reasons = {"pallas": reason, "triton": lambda here: "there is no such kernel"}
    if dispatch.choose(name, implementation, reasons, automatic="pallas") == "pallas":
        from vssd_jax.kernels.layer_norm import pallas

        return pallas.layer_norm(x, scale, bias, gate, epsilon)
    run = cpu if dispatch.target().platform == "cpu" else xla
    return run.layer_norm(x, scale, bias, gate, epsilon)
