"""Non-causal state space duality (VSSD, arXiv 2407.18559, section 3.2)."""

import jax

from vssd_jax.kernels.nc_ssd import xla


def nc_ssd(
    x: jax.Array, token_weights: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array
) -> jax.Array:
    """`y = C (B^T (m * x)) + D * x` for each head: linear in the number of tokens.

    Args:
      x: (B, L, heads * P).
      token_weights: (B, L, heads) float32, the `m` of the formula.
      b, c: (B, L, groups, N); head i takes group i mod groups.
      d: (heads,), the skip weight of each head.

    Returns:
      (B, L, heads * P) in the dtype of `x`; the state is accumulated in float32 at least.
    """
    return xla.nc_ssd(x, token_weights, b, c, d)
