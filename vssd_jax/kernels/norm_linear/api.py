"""LayerNorm, and linear layers of what it gives."""

import functools

import jax

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.norm_linear import xla


def norm_linear(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    kernel: jax.Array,
    *,
    widths: tuple[int, ...],
    dtypes: tuple,
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """`LayerNorm(x) kernel`, in parts of `widths` columns.

    Parts instead of one array: a row of z|x|B|C|dt is not aligned for a GPU.

    Args:
      x: (B, ..., C).
      scale, bias: (C,), of the LayerNorm.
      kernel: (C, sum(widths)).
      widths: columns of each result.
      dtypes: of each result; the products are accumulated in float32 at least.
      epsilon: of the LayerNorm.
      implementation: "xla", "pallas", or None for the device's best: on a GPU a kernel in
        inference, for 16 bits and few channels. Gradients are those of the operations one by one.

    Returns:
      For each width an array (B, ..., width).

    Raises:
      UserError: if a forced implementation cannot run here.
    """
    options = {"widths": tuple(widths), "dtypes": tuple(dtypes), "epsilon": epsilon}
    other = dispatch.of_other_kernels(implementation)
    plain = functools.partial(xla.norm_linear, **options, implementation=other)

    def reason(here):
        # Imported late: Pallas takes a while, and a CPU has no use for it.
        from vssd_jax.kernels.norm_linear import pallas

        return here.lacks_triton() or pallas.supports(x)

    if implementation is None and reason(dispatch.target()):
        implementation = "xla"  # no news: the kernel is for the cases in which it is faster
    reasons = {"pallas": reason, "triton": lambda here: "there is no such kernel"}
    name = "the norm and linear layer"
    if dispatch.choose(name, implementation, reasons, automatic="pallas") == "xla":
        return plain(x, scale, bias, kernel)
    from vssd_jax.kernels.norm_linear import pallas

    def run(x, *weights):
        return dispatch.over_batch(functools.partial(pallas.norm_linear, **options), (x,), weights)

    return dispatch.for_inference(run, plain)(x, scale, bias, kernel)
