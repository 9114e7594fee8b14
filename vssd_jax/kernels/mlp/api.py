"""The MLP branch of a block: LayerNorm, linear, GELU, linear, residual sum."""

import functools

import jax

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.mlp import xla


def mlp(
    x: jax.Array,
    branch_weights: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    b2: jax.Array,
    *,
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> jax.Array:
    """`x + branch_weights * (GELU(LayerNorm(x) w1 + b1) w2 + b2)`.

    Args:
      x: (B, ..., C).
      branch_weights: (B,) or None, see `vssd_jax.kernels.residual.add_branch`.
      scale, bias: (C,), of the LayerNorm.
      w1, b1: (C, D) and (D,).
      w2, b2: (D, C) and (C,).
      epsilon: of the LayerNorm.
      implementation: "xla", "pallas", or None for the device's best: on a GPU a kernel in
        inference, for 16 bits and few channels. Gradients are those of the operations one by one.

    Returns:
      As `x`, in its dtype; accumulated in float32 at least.

    Raises:
      UserError: if a forced implementation cannot run here.
    """
    other = dispatch.of_other_kernels(implementation)
    run = functools.partial(xla.mlp, epsilon=epsilon, implementation=other)
    arguments = (x, branch_weights, scale, bias, w1, b1, w2, b2)

    def reason(here):
        # Imported late: Pallas takes a while, and a CPU has no use for it.
        from vssd_jax.kernels.mlp import pallas

        return here.lacks_triton() or pallas.supports(x, branch_weights)

    if implementation is None and reason(dispatch.target()):
        implementation = "xla"  # no news: the kernel is for the cases in which it is faster
    reasons = {"pallas": reason, "triton": lambda here: "there is no such kernel"}
    if dispatch.choose("the MLP", implementation, reasons, automatic="pallas") == "xla":
        return run(*arguments)
    from vssd_jax.kernels.mlp import pallas

    def kernel(x, branch_weights, *weights):
        del branch_weights  # None, or it could not run
        f = functools.partial(pallas.mlp, epsilon=epsilon)
        return dispatch.over_batch(f, (x,), weights)

    return dispatch.for_inference(kernel, run)(*arguments)
