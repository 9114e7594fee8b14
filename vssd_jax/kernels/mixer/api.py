"""The NC-SSD mixer from its input projection to the residual sum (VSSD, figure 3)."""

import functools

import jax

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.mixer import xla


def nc_ssd_mixer(
    x: jax.Array,
    xbc: jax.Array,
    token_weights: jax.Array,
    z: jax.Array,
    branch_weights: jax.Array | None,
    conv_kernel: jax.Array,
    conv_bias: jax.Array,
    d: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    out_kernel: jax.Array,
    *,
    groups: int = 1,
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> jax.Array:
    """`x + branch_weights * (LayerNorm(nc_ssd(SiLU(conv(xbc)))) * z) out_kernel`.

    Args:
      x: (B, H, W, C), the residual.
      xbc: (B, H, W, inner + 2 * groups * N), the columns of x, B and C as projected.
      token_weights: (B, H, W, heads) float32.
      z: (B, H, W, inner), the gate; no activation.
      branch_weights: (B,) or None, see `vssd_jax.kernels.residual.add_branch`.
      conv_kernel, conv_bias: (3, 3, ...) and (...,), of xbc's depthwise convolution.
      d: (heads,), the skip weight of each head.
      scale, bias: (inner,), of the LayerNorm over all heads.
      out_kernel: (inner, C).
      groups: of B and C.
      epsilon: of the LayerNorm.
      implementation: "xla", "pallas", "triton", or None for the device's best: on a GPU two
        kernels in inference, for 16 bits; else the operations one by one, in `implementation`.

    Returns:
      (B, H, W, C) in the dtype of `x`.

    Raises:
      UserError: if a forced implementation cannot run here.
    """
    one_by_one = functools.partial(
        xla.nc_ssd_mixer, groups=groups, epsilon=epsilon, implementation=implementation
    )
    sharded, weights = (x, xbc, token_weights, z), (
        conv_kernel, conv_bias, d, scale, bias, out_kernel,
    )  # fmt: skip
    arguments = (*sharded, branch_weights, *weights)

    def reason(here):
        # Imported late: Pallas takes a while, and a CPU has no use for it.
        from vssd_jax.kernels.mixer import pallas

        return here.lacks_triton() or pallas.supports(*sharded, branch_weights, groups=groups)

    if implementation in ("xla", "triton") or reason(dispatch.target()):
        return one_by_one(*arguments)
    from vssd_jax.kernels.mixer import pallas

    def kernels(x, xbc, token_weights, z, branch_weights, *weights):
        del branch_weights  # None, or they could not run
        f = functools.partial(pallas.nc_ssd_mixer, groups=groups, epsilon=epsilon)
        return dispatch.over_batch(f, (x, xbc, token_weights, z), weights)

    return dispatch.for_inference(kernels, one_by_one)(*arguments)
