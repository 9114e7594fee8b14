"""The MLP branch against the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import rows
from vssd_jax.kernels.mlp import OPERATION, MLPParams, mlp, xla

CASES = [(2, 5, 7, 48), (1, 131, 24), (3, 1, 1, 20)]  # shapes of x
SIXTEEN_BITS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 1.5e-3)]
)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def formula(x, branch_scale, params):
    scale, bias, w1, b1, w2, b2 = params
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    hidden = (normed * scale + bias) @ w1 + b1
    branch = hidden * jax.scipy.stats.norm.cdf(hidden) @ w2 + b2
    return x + branch_scale.reshape(-1, *(1,) * (x.ndim - 1)) * branch


def arguments(shape, dtype):
    rng = np.random.default_rng(0)
    channels, wide = shape[-1], jnp.promote_types(dtype, jnp.float32)

    def normal(*shape, dtype=wide):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return [
        normal(*shape, dtype=dtype),
        jnp.ones(shape[0], wide),
        MLPParams(
            1 + 0.1 * normal(channels),
            0.1 * normal(channels),
            normal(channels, 4 * channels) / channels**0.5,
            0.1 * normal(4 * channels),
            normal(4 * channels, channels) / channels**0.5,
            0.1 * normal(channels),
        ),
    ]


def compare(f, args, tolerance):
    """`args` scale the branch by ones where `f` takes no scale."""
    expected = formula(*jax.tree.map(lambda a: a.astype(jnp.float64), args))
    actual = f(*args)
    assert actual.dtype == args[0].dtype
    error = jnp.linalg.norm((actual.astype(jnp.float64) - expected).ravel())
    assert error < tolerance * jnp.linalg.norm(expected.ravel())


def interpreted(x, branch_scale, params):
    f = functools.partial(rows.pallas(OPERATION).mlp, epsilon=1e-5)
    return jax.jit(f)(x, None, params)


@pytest.mark.parametrize("shape", CASES)
def test_xla_float64(shape):
    args = arguments(shape, jnp.float64)
    args[1] = jnp.asarray(np.random.default_rng(1).uniform(0, 2, shape[0]))
    f = functools.partial(xla.mlp, epsilon=1e-5)
    compare(f, args, 1e-13)
    actual, expected = (
        jax.tree.leaves(jax.grad(lambda a, f=f: jnp.sin(f(*a)).sum())(args)) for f in (f, formula)
    )
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * np.abs(b).max())


# GELU's series is right to 1e-7.
@pytest.mark.parametrize("shape", CASES)
def test_pallas_float32(shape, poisoned_tails):
    compare(interpreted, arguments(shape, jnp.float32), 1e-6)


@SIXTEEN_BITS
def test_pallas_narrow(dtype, tolerance):
    compare(interpreted, arguments(CASES[0], dtype), tolerance)


def test_gelu_in_the_tails():
    x = jnp.linspace(-9, 9, 1001, dtype=jnp.float32)
    expected = x.astype(jnp.float64) * jax.scipy.stats.norm.cdf(x.astype(jnp.float64))
    np.testing.assert_allclose(rows.pallas(OPERATION).gelu(x), expected, atol=3e-7, rtol=2e-7)


def test_what_the_kernel_cannot_do():
    x, supports = jnp.zeros((1, 4, 512), jnp.bfloat16), rows.pallas(OPERATION).supports
    assert "512 channels" in supports(x, None)
    assert "stochastic depth" in supports(x, jnp.ones(1))
    assert "float32" in supports(x[..., :8].astype(jnp.float32), None)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("shape", [(4, 56, 56, 64), (2, 13, 7, 192), (2, 14, 14, 256), *CASES])
@SIXTEEN_BITS
def test_gpu(shape, implementation, dtype, tolerance):
    def f(x, branch_scale, params):
        return mlp(x, None, params, implementation=implementation)

    compare(f, arguments(shape, dtype), tolerance)
