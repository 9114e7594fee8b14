"""NC-SSD in plain JAX: the reference of the other implementations, and the fallback."""

import jax
import jax.numpy as jnp


def nc_ssd(
    xbc: jax.Array, token_weights: jax.Array, d: jax.Array, *, inner: int, groups: int
) -> jax.Array:
    """See `vssd_jax.kernels.nc_ssd.api.nc_ssd`."""
    batch, length, width = xbc.shape
    heads = token_weights.shape[-1]
    x, b, c = jnp.split(xbc, (inner, (inner + width) // 2), axis=-1)
    b, c = (t.reshape(batch, length, groups, -1) for t in (b, c))
    # Head i belongs to group i mod groups: heads split as (heads / groups, groups).
    split = (batch, length, heads // groups, groups, inner // heads)
    acc = jnp.promote_types(x.dtype, jnp.float32)
    xh = x.reshape(split)
    weighted = (xh.astype(acc) * token_weights.reshape(*split[:-1], 1)).astype(x.dtype)
    # The state grows with the number of tokens, hence the wide accumulator.
    state = jnp.einsum("blgn,blhgp->bhgnp", b, weighted, preferred_element_type=acc)
    y = jnp.einsum("blgn,bhgnp->blhgp", c, state.astype(c.dtype), preferred_element_type=acc)
    y = y + d.reshape(heads // groups, groups, 1).astype(acc) * xh.astype(acc)
    return y.reshape(x.shape).astype(x.dtype)


def nc_ssd_gated(
    xbc: jax.Array,
    token_weights: jax.Array,
    d: jax.Array,
    z: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    inner: int,
    groups: int,
    epsilon: float,
) -> jax.Array:
    """See `vssd_jax.kernels.nc_ssd.api.nc_ssd_gated`."""
    y = nc_ssd(xbc, token_weights, d, inner=inner, groups=groups)
    return gated_norm(y, z, scale, bias, epsilon=epsilon)


def gated_norm(
    y: jax.Array, z: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float
) -> jax.Array:
    """`LayerNorm(y) * z` over the last axis, in two passes and float32 at least."""
    acc = jnp.promote_types(y.dtype, jnp.float32)
    y = y.astype(acc)
    centred = y - y.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon) * scale.astype(acc) + bias.astype(acc)
    return (normed.astype(z.dtype) * z).astype(z.dtype)
