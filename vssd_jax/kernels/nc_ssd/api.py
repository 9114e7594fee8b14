"""Non-causal state space duality (VSSD, arXiv 2407.18559, section 3.2)."""

import functools

import jax

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.nc_ssd import xla


def nc_ssd(
    xbc: jax.Array,
    token_weights: jax.Array,
    d: jax.Array,
    *,
    inner: int,
    groups: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """`y = C (B^T (m * x)) + D * x` for each head: linear in the number of tokens.

    Args:
      xbc: (B, L, inner + 2 * groups * N), the columns of x, B and C side by side, as projection
        and convolution leave them. Heads of P = inner / heads columns; head i takes the group
        i mod groups of B and C.
      token_weights: (B, L, heads) float32, the `m` of the formula.
      d: (heads,), the skip weight of each head.
      inner: columns of x.
      groups: of B and C.
      implementation: "xla", "pallas", "triton", or None for the device's best.

    Returns:
      (B, L, inner) in the dtype of `xbc`; the state is accumulated in float32 at least.

    Raises:
      UserError: if a forced implementation cannot run here.
    """
    run = _implementation(implementation, xbc, token_weights, inner, groups)
    f = functools.partial(run.nc_ssd, inner=inner, groups=groups)
    if run is xla:
        return f(xbc, token_weights, d)
    return dispatch.over_batch(f, (xbc, token_weights), (d,))


def nc_ssd_gated(
    xbc: jax.Array,
    token_weights: jax.Array,
    d: jax.Array,
    z: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    inner: int,
    groups: int = 1,
    epsilon: float = 1e-5,
    silu: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """`LayerNorm(nc_ssd(...)) * z`, the whole of the mixer between its two projections.

    Args:
      xbc, token_weights, d, inner, groups, implementation: see `nc_ssd`.
      z: (B, L, inner), the gate; no activation.
      scale, bias: (inner,), of the LayerNorm over all heads.
      epsilon: of the LayerNorm.
      silu: whether SiLU(xbc) takes the place of xbc: a kernel spares the memory another pass.

    Returns:
      (B, L, inner) in the dtype of `z`.

    Raises:
      UserError: if a forced implementation cannot run here.
    """
    run = _implementation(implementation, xbc, token_weights, inner, groups)
    options = {"inner": inner, "groups": groups, "epsilon": epsilon, "silu": silu}
    f = functools.partial(run.nc_ssd_gated, **options)
    args = (xbc, token_weights, d, z, scale, bias)
    if run is xla:
        return f(*args)
    # The sharded arguments first, the replicated ones after them.
    def reordered(xbc, token_weights, z, d, scale, bias):
        return f(xbc, token_weights, d, z, scale, bias)

    return dispatch.over_batch(reordered, (xbc, token_weights, z), (d, scale, bias))


def _implementation(implementation, xbc, token_weights, inner, groups):
    def pallas_reason(here):
        # Imported late: Pallas takes a while, and a CPU has no use for it.
        from vssd_jax.kernels.nc_ssd import pallas

        return here.lacks_triton() or pallas.supports(
            xbc, token_weights, inner=inner, groups=groups
        )

    def triton_reason(here):
        from vssd_jax.kernels.nc_ssd import triton

        return here.lacks_triton() or triton.supports(
            xbc, token_weights, inner=inner, groups=groups
        )

    reasons = {"pallas": pallas_reason, "triton": triton_reason}
    chosen = dispatch.choose("NC-SSD", implementation, reasons, automatic="pallas")
    if chosen == "xla":
        return xla
    if chosen == "pallas":
        from vssd_jax.kernels.nc_ssd import pallas

        return pallas
    from vssd_jax.kernels.nc_ssd import triton

    return triton
