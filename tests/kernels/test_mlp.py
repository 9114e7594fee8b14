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
SCALED = pytest.mark.parametrize("scaled", [True, False])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def formula(x, branch_scale, params):
    scale, bias, w1, b1, w2, b2 = params
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    hidden = (normed * scale + bias) @ w1 + b1
    branch = hidden * jax.scipy.stats.norm.cdf(hidden) @ w2 + b2
    if branch_scale is None:
        return x + branch
    return x + branch_scale.reshape(-1, *(1,) * (x.ndim - 1)) * branch


def arguments(shape, dtype, scaled=True):
    rng = np.random.default_rng(0)
    channels, wide = shape[-1], jnp.promote_types(dtype, jnp.float32)

    def normal(*shape, dtype=wide):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return [
        normal(*shape, dtype=dtype),
        # A dropped branch first.
        1.25 * jnp.arange(shape[0], dtype=wide) if scaled and shape[0] > 1 else None,
        MLPParams(
            1 + 0.1 * normal(channels),
            0.1 * normal(channels),
            normal(channels, 4 * channels) / channels**0.5,
            0.1 * normal(4 * channels),
            normal(4 * channels, channels) / channels**0.5,
            0.1 * normal(channels),
        ),
    ]


def in_float64(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


def error(actual, expected):
    """Relative to the norm of `expected`."""
    difference = jnp.linalg.norm((actual.astype(jnp.float64) - expected).ravel())
    return float(difference / jnp.linalg.norm(expected.ravel()))


def compare(f, args, tolerance):
    actual = f(*args)
    assert actual.dtype == args[0].dtype
    assert error(actual, formula(*in_float64(args))) < tolerance


def gradient_of_result(args):
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.standard_normal(args[0].shape), args[0].dtype)


@functools.partial(jax.jit, static_argnums=0)
def gradients(f, args):
    return jax.vjp(f, *args)[1](gradient_of_result(args))


def gradient_errors(f, args):
    """For each argument, by its path."""
    expected = jax.vjp(formula, *in_float64(args))[1](in_float64(gradient_of_result(args)))
    actual = gradients(f, args)
    assert [a.dtype for a in jax.tree.leaves(actual)] == [a.dtype for a in jax.tree.leaves(args)]
    errors = jax.tree.map(error, actual, expected)
    return {jax.tree_util.keystr(path): e for path, e in jax.tree.leaves_with_path(errors)}


def interpreted(x, branch_scale, params):
    return rows.pallas(OPERATION).mlp(x, branch_scale, params, epsilon=1e-5)


def in_xla(x, branch_scale, params):
    return xla.mlp(x, branch_scale, params, epsilon=1e-5)


@pytest.mark.parametrize("shape", CASES)
def test_xla_float64(shape):
    args = arguments(shape, jnp.float64)
    args[1] = jnp.asarray(np.random.default_rng(1).uniform(0, 2, shape[0]))
    compare(in_xla, args, 1e-13)
    actual, expected = (
        jax.tree.leaves(jax.grad(lambda a, f=f: jnp.sin(f(*a)).sum())(args))
        for f in (in_xla, formula)
    )
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * np.abs(b).max())


# GELU's series is right to 1e-7.
@pytest.mark.parametrize("shape", CASES)
def test_pallas_float32(shape, poisoned_tails):
    compare(jax.jit(interpreted), arguments(shape, jnp.float32), 1e-6)


@SCALED
@SIXTEEN_BITS
def test_pallas_narrow(dtype, tolerance, scaled):
    compare(jax.jit(interpreted), arguments(CASES[0], dtype, scaled), tolerance)


# Blocks of 128 and of 64 tokens in two layouts, and several of them in a program; many channels.
@pytest.mark.parametrize("shape", [CASES[0], CASES[2], (1, 70, 72), (2, 1400, 36), (3, 50, 136)])
def test_pallas_gradients_float32(shape, poisoned_tails):
    errors = gradient_errors(interpreted, arguments(shape, jnp.float32))
    assert max(errors.values()) < 2e-6, errors


@SCALED
@SIXTEEN_BITS
@pytest.mark.parametrize("shape", [CASES[0], (2, 3, 136)])
def test_pallas_gradients_narrow(shape, dtype, tolerance, scaled):
    """As exact as XLA's, which rounds more of the arrays in between."""
    args = arguments(shape, dtype, scaled)
    errors, of_xla = (gradient_errors(f, args) for f in (interpreted, in_xla))
    assert max(errors.values()) < tolerance
    for path, e in errors.items():
        assert e < 1.2 * of_xla[path] + 1e-6, path


def test_the_result_of_many_channels_is_that_of_xla():
    args = arguments((2, 3, 264), jnp.bfloat16)
    np.testing.assert_array_equal(interpreted(*args), in_xla(*args))


def test_gelu_in_the_tails():
    x = jnp.linspace(-9, 9, 1001, dtype=jnp.float32)
    expected = x.astype(jnp.float64) * jax.scipy.stats.norm.cdf(x.astype(jnp.float64))
    np.testing.assert_allclose(rows.pallas(OPERATION).gelu(x), expected, atol=3e-7, rtol=2e-7)


def test_the_derivative_of_gelu():
    gelu_and_derivative = rows.pallas(OPERATION).gelu_and_derivative
    x = jnp.linspace(-9, 9, 1001, dtype=jnp.float32)
    wide = x.astype(jnp.float64)
    expected = jax.vmap(jax.grad(lambda x: x * jax.scipy.stats.norm.cdf(x)))(wide)
    np.testing.assert_allclose(gelu_and_derivative(x)[1], expected, atol=5e-7, rtol=2e-7)


def test_what_the_kernel_cannot_do():
    x, supports = jnp.zeros((1, 4, 4096), jnp.bfloat16), rows.pallas(OPERATION).supports
    assert "4096 channels" in supports(x)
    assert "float32" in supports(x[..., :8].astype(jnp.float32))
    assert supports(x[..., :8], branch_scale=jnp.ones(1)) is None


GPU_CASES = [(4, 56, 56, 64), (2, 28, 28, 128), (2, 13, 7, 96), (2, 14, 14, 256), (4, 49, 768)]
GPU_CASES += CASES


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("shape", [*GPU_CASES, (2, 13, 7, 192)])
@SCALED
@SIXTEEN_BITS
def test_gpu(shape, implementation, dtype, tolerance, scaled):
    f = functools.partial(mlp, implementation=implementation)
    compare(f, arguments(shape, dtype, scaled), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_CASES)
@SCALED
@SIXTEEN_BITS
def test_gpu_gradients(shape, dtype, tolerance, scaled):
    f, args = functools.partial(mlp, implementation="pallas"), arguments(shape, dtype, scaled)
    errors = gradient_errors(f, args)
    assert max(errors.values()) < tolerance, errors
    for a, b in zip(*(jax.tree.leaves(gradients(f, args)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(a, b)
