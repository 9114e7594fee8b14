"""The first two convolutions of a downsampling against XLA's convolutions in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import rows
from vssd_jax.errors import UserError
from vssd_jax.kernels.expand_depthwise import OPERATION, expand_depthwise, xla

# Shapes of x: even and odd heights and widths, pixels beyond a block, one pixel.
CASES = [(2, 6, 8, 16), (3, 5, 7, 20), (1, 1, 1, 8), (2, 3, 46, 12)]
SIXTEEN_BITS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 5e-3), (jnp.float16, 6e-4)]
)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def formula(x, w1, b1, kernel, bias, *, dtype=jnp.float64):
    """`dtype`: to which the hidden layer is rounded, so that ReLUs let the same values pass."""
    h = x @ w1 + b1
    h += jax.lax.stop_gradient(h.astype(dtype).astype(h.dtype) - h)
    y = jax.lax.conv_general_dilated(
        jnp.maximum(h, 0),
        kernel[:, :, None],
        (2, 2),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=kernel.shape[-1],
    )
    return jnp.maximum(y + bias, 0)


def arguments(shape, dtype):
    rng = np.random.default_rng(0)
    channels, wide = shape[-1], jnp.promote_types(dtype, jnp.float32)
    hidden = 8 * channels
    sizes = (channels, hidden), (hidden,), (3, 3, hidden), (hidden,)
    w1, b1, kernel, bias = (jnp.asarray(rng.standard_normal(s), wide) for s in sizes)
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    w1 = (w1 / channels**0.5).astype(dtype).astype(wide)  # as the products take it
    return x, w1, 0.1 * b1, kernel / 3, 0.1 * bias


def error(actual, expected):
    """Relative to the norm of `expected`."""
    difference = jnp.linalg.norm((actual.astype(jnp.float64) - expected).ravel())
    return float(difference / (jnp.linalg.norm(expected.ravel()) + 1e-30))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(f, *args):
    y, vjp = jax.vjp(f, *args)
    dy = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(args[0].dtype)
    return y, *vjp(dy.astype(y.dtype))


def errors(f, args):
    """Of the result and of the gradients."""
    actual = value_and_gradients(f, *args)
    assert [a.dtype for a in actual] == [args[0].dtype, *(a.dtype for a in args)]
    expected = value_and_gradients(
        functools.partial(formula, dtype=args[0].dtype), *(a.astype(jnp.float64) for a in args)
    )
    return [error(*pair) for pair in zip(actual, expected, strict=True)]


def interpreted(*args):
    return rows.pallas(OPERATION).expand_depthwise(*args)


@pytest.mark.parametrize("shape", CASES)
def test_xla_float64(shape):
    assert max(errors(xla.expand_depthwise, arguments(shape, jnp.float64))) < 1e-12


# Measured: up to 2e-7.
@pytest.mark.parametrize("shape", [*CASES, (1, 4, 5, 72)])
def test_pallas_float32(shape, poisoned_tails):
    args = arguments(shape, jnp.float32)
    assert max(errors(interpreted, args)) < 1e-6
    for a, b in zip(*(value_and_gradients(interpreted, *args) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(a, b)  # bit for bit


# Several steps and several parts of the rows in a program.
@pytest.mark.parametrize("programs", [1, 40])
def test_pallas_float32_by_other_numbers_of_programs(programs, poisoned_tails, monkeypatch):
    module = rows.pallas(OPERATION)
    monkeypatch.setattr(module, "WARPS", 8 * programs)
    monkeypatch.setattr(module, "FORWARD_PROGRAMS", programs)
    jax.clear_caches()
    assert max(errors(interpreted, arguments((3, 9, 26, 8), jnp.float32))) < 1e-6
    jax.clear_caches()


# Measured: up to 2.8e-3 and 3.4e-4.
@SIXTEEN_BITS
@pytest.mark.parametrize("shape", CASES[:2])
def test_pallas_narrow(shape, dtype, tolerance):
    """As exact as XLA's, which rounds more of the arrays in between."""
    args = arguments(shape, dtype)
    found, of_xla = (errors(f, args) for f in (interpreted, xla.expand_depthwise))
    assert max(found) < tolerance
    for a, b in zip(found, of_xla, strict=True):
        assert a < 1.2 * b + 1e-6


def test_many_channels_have_the_kernel_in_inference_alone(poisoned_tails):
    args = arguments((1, 3, 4, 136), jnp.float32)
    expected = formula(*(a.astype(jnp.float64) for a in args))
    assert 0 < error(jax.jit(interpreted)(*args), expected) < 1e-6
    both = (value_and_gradients(f, *args) for f in (interpreted, xla.expand_depthwise))
    for a, b in zip(*both, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_the_kernel_cannot_do():
    supports = rows.pallas(OPERATION).supports
    x = jnp.zeros((1, 4, 4, 512), jnp.bfloat16)
    assert "512 channels" in supports(x)
    assert "float32" in supports(x[..., :8].astype(jnp.float32))
    assert "elements" in supports(jax.ShapeDtypeStruct((2**22, 8, 8, 8), jnp.bfloat16))
    assert supports(x[..., :8]) is None


def test_unknown_implementation():
    with pytest.raises(UserError, match="unknown implementation 'palas'"):
        expand_depthwise(*arguments(CASES[2], jnp.float32), implementation="palas")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize(
    "shape", [(4, 56, 56, 64), (2, 28, 28, 128), (3, 13, 27, 96), (4, 14, 14, 256), *CASES]
)
@SIXTEEN_BITS
def test_gpu(shape, implementation, dtype, tolerance):
    f = functools.partial(expand_depthwise, implementation=implementation)
    args = arguments(shape, dtype)
    assert max(errors(f, args)) < tolerance
    for a, b in zip(*(value_and_gradients(f, *args) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(a, b)
