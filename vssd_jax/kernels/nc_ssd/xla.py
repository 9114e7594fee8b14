"""NC-SSD in plain JAX: the reference of the other implementations, and the fallback."""

import jax
import jax.numpy as jnp


def nc_ssd(
    x: jax.Array, token_weights: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array
) -> jax.Array:
    """See `vssd_jax.kernels.nc_ssd.api.nc_ssd`."""
    batch, length, inner = x.shape
    heads = token_weights.shape[-1]
    head_dim = inner // heads
    groups = b.shape[-2]
    # Head i belongs to group i mod groups: heads split as (heads / groups, groups).
    split = (batch, length, heads // groups, groups, head_dim)
    acc = jnp.promote_types(x.dtype, jnp.float32)
    xh = x.reshape(split)
    weighted = (xh.astype(acc) * token_weights.reshape(*split[:-1], 1)).astype(x.dtype)
    # The state grows with the number of tokens, hence the wide accumulator.
    state = jnp.einsum("blgn,blhgp->bhgnp", b, weighted, preferred_element_type=acc)
    y = jnp.einsum("blgn,bhgnp->blhgp", c, state.astype(c.dtype), preferred_element_type=acc)
    y = y + d.reshape(heads // groups, groups, 1).astype(acc) * xh.astype(acc)
    return y.reshape(x.shape).astype(x.dtype)
