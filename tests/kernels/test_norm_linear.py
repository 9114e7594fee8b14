"""LayerNorm and linear layers against the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import rows
from vssd_jax.kernels.norm_linear import OPERATION, norm_linear, xla

CASES = [((2, 5, 7, 48), (96, 192, 2)), ((1, 131, 20), (33, 5))]  # shape of x, widths
SIXTEEN_BITS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 1.5e-3)]
)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def formula(x, scale, bias, kernel, *, widths):
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return tuple(jnp.split((normed * scale + bias) @ kernel, np.cumsum(widths)[:-1], axis=-1))


def arguments(shape, widths, dtype):
    rng = np.random.default_rng(0)
    channels, wide = shape[-1], jnp.promote_types(dtype, jnp.float32)
    sizes = (shape, (channels,), (channels,), (channels, sum(widths)))
    x, scale, bias, kernel = (rng.standard_normal(s) for s in sizes)
    return jnp.asarray(x, dtype), *(
        jnp.asarray(a, wide) for a in (1 + 0.1 * scale, 0.1 * bias, kernel)
    )


def compare(f, case, dtype, tolerance):
    shape, widths = case
    args = arguments(shape, widths, dtype)
    dtypes = (dtype,) * (len(widths) - 1) + (jnp.promote_types(dtype, jnp.float32),)
    expected = formula(*(a.astype(jnp.float64) for a in args), widths=widths)
    f = functools.partial(f, widths=widths, dtypes=dtypes, epsilon=1e-5)
    for a, b, expected_dtype in zip(jax.jit(f)(*args), expected, dtypes, strict=True):
        assert a.dtype == expected_dtype
        error = jnp.linalg.norm((a.astype(jnp.float64) - b).ravel())
        assert error < tolerance * jnp.linalg.norm(b.ravel())


@pytest.mark.parametrize("case", CASES)
def test_xla_float64(case):
    compare(xla.norm_linear, case, jnp.float64, 1e-13)


@pytest.mark.parametrize("case", CASES)
def test_pallas_float32(case, poisoned_tails):
    compare(rows.pallas(OPERATION).norm_linear, case, jnp.float32, 1e-6)


@SIXTEEN_BITS
def test_pallas_narrow(dtype, tolerance):
    compare(rows.pallas(OPERATION).norm_linear, CASES[0], dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [((4, 56, 56, 64), (128, 256, 2)), *CASES])
@SIXTEEN_BITS
def test_gpu(case, dtype, tolerance):
    compare(norm_linear, case, dtype, tolerance)


def test_what_the_kernel_cannot_do():
    supports = rows.pallas(OPERATION).supports
    assert "512 channels" in supports(jnp.zeros((1, 4, 512), jnp.bfloat16))
    assert "float32" in supports(jnp.zeros((1, 4, 8), jnp.float32))
