"""NC-SSD in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import products
from vssd_jax.kernels.layer_norm import layer_norm


def nc_ssd(
    xbc: Array,
    token_weights: Array,
    d: Array,
    *,
    inner: int,
    groups: int,
    matmul: Callable[..., Array] = products.matmul,
) -> Array:
    """See `vssd_jax.kernels.nc_ssd.api.nc_ssd`; `matmul` as that of `products`."""
    batch, length, width = xbc.shape
    head_dim = inner // token_weights.shape[-1]
    x, b, c = jnp.split(xbc, (inner, (inner + width) // 2), axis=-1)
    acc = jnp.promote_types(x.dtype, jnp.float32)

    def by_group(t: Array, size: int) -> Array:
        """(B, L, ...), each `size` columns of another group in turn -> (B * groups, L, ...)."""
        t = t.reshape(batch, length, -1, groups, size)
        return jnp.moveaxis(t, 3, 1).reshape(batch * groups, length, -1)

    # Flat arrays, with the groups (mostly one) beside the batch: two products without a transposed
    # copy. Head i belongs to group i mod groups.
    weighted = (x.astype(acc) * jnp.repeat(token_weights, head_dim, axis=-1)).astype(x.dtype)
    weighted = by_group(weighted, head_dim)
    b, c = (by_group(t, t.shape[-1] // groups) for t in (b, c))
    # The state is a sum over all tokens, hence the wide accumulator.
    state = matmul(b, weighted, transpose="left")
    y = matmul(c, state.astype(c.dtype))
    y = jnp.moveaxis(y.reshape(batch, groups, length, -1, head_dim), 1, 3).reshape(x.shape)
    y = y + jnp.repeat(d, head_dim).astype(acc) * x.astype(acc)
    return y.astype(x.dtype)


def nc_ssd_gated(
    xbc: Array,
    token_weights: Array,
    d: Array,
    z: Array,
    scale: Array,
    bias: Array,
    *,
    inner: int,
    groups: int,
    epsilon: float,
    silu: bool = False,
    matmul: Callable[..., Array] = products.matmul,
) -> Array:
    """See `vssd_jax.kernels.nc_ssd.api.nc_ssd_gated`; `matmul` as that of `products`."""
    xbc = jax.nn.silu(xbc) if silu else xbc
    y = nc_ssd(xbc, token_weights, d, inner=inner, groups=groups, matmul=matmul)
    return layer_norm(y, scale, bias, z, epsilon, implementation="xla")
