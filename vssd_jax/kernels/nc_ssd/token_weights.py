"""The token weights of NC-SSD in plain JAX.

The gradient is written out: both parameters' gradients are sums over the same tokens, and a GPU
adds them up together. The automatic gradient takes twice as many kernels.
"""

import functools

import jax
import jax.numpy as jnp

from vssd_jax.kernels import dispatch, mesh
from vssd_jax.types import Array, Float


@dispatch.unit
def token_weights(
    dt: Float[Array, "B *tokens heads"],
    bias: Float[Array, " heads"],
    a_log: Float[Array, " heads"],
    *,
    sign: int,
) -> Float[Array, "B *tokens heads"]:
    """`sign * softplus(dt + bias) * exp(a_log)`, the `m` of `nc_ssd`."""
    return dispatch.differentiable(_token_weights)(dt, bias, a_log, sign)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_weights(dt: jax.Array, bias: jax.Array, a_log: jax.Array, sign: int) -> jax.Array:
    return sign * jax.nn.softplus(dt + bias) * jnp.exp(a_log)


def _forward(
    dt: jax.Array, bias: jax.Array, a_log: jax.Array, sign: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    weights = _token_weights(dt, bias, a_log, sign)
    return weights, (dt, bias, a_log, weights)


def _backward(
    sign: int, saved: tuple[jax.Array, ...], dweights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    dt, bias, a_log, weights = saved
    f = functools.partial(_on_device, sign=sign)
    # XLA divides a sum of two arrays among devices, but gathers what each of them has.
    ddt, dbias, da_log = mesh.over_batch(f, (dt, weights, dweights), (bias, a_log))
    return ddt, dbias.sum(0), da_log.sum(0)


def _on_device(
    batched: tuple[jax.Array, ...], shared: tuple[jax.Array, jax.Array], *, sign: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of dt, and those of bias and a_log (1, heads)."""
    (dt, weights, dweights), (bias, a_log) = batched, shared
    ddt = dweights * sign * jnp.exp(a_log) * jax.nn.sigmoid(dt + bias)
    dbias, da_log = jax.lax.reduce(
        (ddt, dweights * weights),
        (jnp.zeros((), ddt.dtype),) * 2,
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(dt.ndim - 1)),
    )
    return ddt, dbias[None], da_log[None]


_token_weights.defvjp(_forward, _backward)
