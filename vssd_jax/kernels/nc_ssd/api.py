"""Non-causal state space duality (VSSD, arXiv 2407.18559, section 3.2)."""

import importlib

from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float


def _jax_triton(device: dispatch.Target) -> str | None:
    """Why jax-triton cannot run kernels on `device`, or None."""
    reason = dispatch.nvidia_gpu(device)
    if reason is None:
        try:
            importlib.import_module("triton")
            importlib.import_module("jax_triton")
        except ImportError as error:
            reason = f"jax-triton is not usable ({error}); install it with `pip install jax-triton`"
    return reason


_TABLE = {
    "pallas": dispatch.Implementation("vssd_jax.kernels.nc_ssd.pallas", dispatch.pallas_triton),
    "triton": dispatch.Implementation(
        "vssd_jax.kernels.nc_ssd.triton", _jax_triton, automatic=False
    ),
    "onednn": dispatch.by_onednn("vssd_jax.kernels.nc_ssd.onednn"),
    "xla": dispatch.plain("vssd_jax.kernels.nc_ssd.xla"),
}
OPERATION = dispatch.Operation("nc_ssd", _TABLE)
GATED_OPERATION = dispatch.Operation("nc_ssd_gated", _TABLE)


def nc_ssd(
    xbc: Float[Array, "B L width"],
    token_weights: Float[Array, "B L heads"],
    d: Float[Array, " heads"],
    *,
    inner: int,
    groups: int = 1,
    implementation: str | None = None,
) -> Float[Array, "B L inner"]:
    """`y = C (B^T (m * x)) + D * x` for each head: linear in the number of tokens.

    Args:
      xbc: (B, L, inner + 2 * groups * N), the columns of x, B and C side by side, as projection
        and convolution write them. Heads of P = inner / heads columns; head i takes the group
        i mod groups of B and C.
      token_weights: (B, L, heads) float32, the `m` of the formula.
      d: (heads,), the skip weight of each head.
      inner: columns of x.
      groups: of B and C.
      implementation: "xla", "pallas" or "triton" (on an NVIDIA GPU), "onednn" (on a CPU with
        AMX), or see `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      (B, L, inner) in the dtype of `xbc`; the state is accumulated in float32 at least.

    Raises:
      UserError: see `choose`.
    """
    batched = {"xbc": xbc, "token_weights": token_weights}
    return OPERATION.run(implementation, batched, {"d": d}, inner=inner, groups=groups)


def nc_ssd_gated(
    xbc: Float[Array, "B L width"],
    token_weights: Float[Array, "B L heads"],
    d: Float[Array, " heads"],
    z: Float[Array, "B L inner"],
    scale: Float[Array, " inner"],
    bias: Float[Array, " inner"],
    *,
    inner: int,
    groups: int = 1,
    epsilon: float = 1e-5,
    silu: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B L inner"]:
    """`LayerNorm(nc_ssd(...)) * z`, the whole of the mixer between its two projections.

    Args:
      xbc, token_weights, d, inner, groups, implementation: see `nc_ssd`.
      z: (B, L, inner), the gate; no activation.
      scale, bias: (inner,), of the LayerNorm over all heads.
      epsilon: of the LayerNorm.
      silu: whether to take SiLU(xbc) instead of xbc, see `applies_silu_on_load`.

    Returns:
      (B, L, inner) in the dtype of `z`.

    Raises:
      UserError: see `choose`.
    """
    return GATED_OPERATION.run(
        implementation,
        {"xbc": xbc, "token_weights": token_weights, "z": z},
        {"d": d, "scale": scale, "bias": bias},
        inner=inner,
        groups=groups,
        epsilon=epsilon,
        silu=silu,
    )


def applies_silu_on_load(
    xbc: Float[Array, "B *tokens width"],
    token_weights: Float[Array, "B *tokens heads"],
    *,
    inner: int,
    groups: int,
    implementation: str | None,
) -> bool:
    """Whether `nc_ssd_gated` would run as a kernel that applies SiLU while it loads xbc.

    Then `silu=True` saves a pass over the memory; otherwise SiLU belongs to the convolution that
    xbc comes from, with which XLA fuses it. A module says so by `SILU_ON_LOAD = True`.
    """
    name = GATED_OPERATION.choose(
        implementation, xbc=xbc, token_weights=token_weights, inner=inner, groups=groups
    )
    return getattr(GATED_OPERATION.module(name), "SILU_ON_LOAD", False)
