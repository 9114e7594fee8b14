"""The MLP branch against the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton as plgpu

from tests.kernels.poison import poisoned
from vssd_jax.errors import UserError
from vssd_jax.kernels import tiles
from vssd_jax.kernels.mlp import mlp, pallas, xla

CASES = [(2, 5, 7, 48), (1, 131, 24), (3, 1, 1, 20)]  # shapes of x
SIXTEEN_BITS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 1.5e-3)]
)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def formula(x, branch_weights, scale, bias, w1, b1, w2, b2):
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    hidden = (normed * scale + bias) @ w1 + b1
    branch = hidden * jax.scipy.stats.norm.cdf(hidden) @ w2 + b2
    return x + branch_weights.reshape(-1, *(1,) * (x.ndim - 1)) * branch


def arguments(shape, dtype):
    rng = np.random.default_rng(0)
    channels, wide = shape[-1], jnp.promote_types(dtype, jnp.float32)

    def normal(*shape, dtype=wide):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return [
        normal(*shape, dtype=dtype),
        jnp.ones(shape[0], wide),
        1 + 0.1 * normal(channels),
        0.1 * normal(channels),
        normal(channels, 4 * channels) / channels**0.5,
        0.1 * normal(4 * channels),
        normal(4 * channels, channels) / channels**0.5,
        0.1 * normal(channels),
    ]


def compare(f, args, tolerance):
    """`f` takes no branch weights where those of `args` are ones."""
    expected = formula(*(a.astype(jnp.float64) for a in args))
    actual = f(*args)
    assert actual.dtype == args[0].dtype
    error = jnp.linalg.norm((actual.astype(jnp.float64) - expected).ravel())
    assert error < tolerance * jnp.linalg.norm(expected.ravel())


def interpreted(x, branch_weights, *weights):
    return jax.jit(functools.partial(pallas.mlp, epsilon=1e-5, interpret=True))(x, *weights)


@pytest.mark.parametrize("shape", CASES)
def test_xla_float64(shape):
    args = arguments(shape, jnp.float64)
    args[1] = jnp.asarray(np.random.default_rng(1).uniform(0, 2, shape[0]))
    f = functools.partial(xla.mlp, epsilon=1e-5)
    compare(f, args, 1e-13)
    actual, expected = (
        jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), argnums=range(8))(*args)
        for f in (f, formula)
    )
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * np.abs(b).max())


# GELU's series is right to 1e-7.
@pytest.mark.parametrize("shape", CASES)
def test_pallas_float32(shape, monkeypatch):
    monkeypatch.setattr(tiles, "plgpu", poisoned(plgpu))
    compare(interpreted, arguments(shape, jnp.float32), 1e-6)


@SIXTEEN_BITS
def test_pallas_narrow(dtype, tolerance):
    compare(interpreted, arguments(CASES[0], dtype), tolerance)


def test_gelu_in_the_tails():
    x = jnp.linspace(-9, 9, 1001, dtype=jnp.float32)
    expected = x.astype(jnp.float64) * jax.scipy.stats.norm.cdf(x.astype(jnp.float64))
    np.testing.assert_allclose(pallas._gelu(x), expected, atol=3e-7, rtol=2e-7)


def test_what_it_cannot_do():
    x = jnp.zeros((1, 4, 512), jnp.bfloat16)
    assert "512 channels" in pallas.supports(x, None)
    assert "stochastic depth" in pallas.supports(x, jnp.ones(1))
    assert "float32" in pallas.supports(x.astype(jnp.float32), None)
    with pytest.raises(UserError, match="no such kernel"):
        mlp(*arguments(CASES[1], jnp.float32), implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("shape", [(4, 56, 56, 64), (2, 13, 7, 192), (2, 14, 14, 256), *CASES])
@SIXTEEN_BITS
def test_gpu(shape, implementation, dtype, tolerance):
    def f(x, branch_weights, *weights):
        return mlp(x, None, *weights, implementation=implementation)

    compare(f, arguments(shape, dtype), tolerance)
