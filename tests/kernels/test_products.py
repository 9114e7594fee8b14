"""Matrix products: values, gradients, and what XLA makes of them on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssd_jax.host import compiler_options
from vssd_jax.kernels import products

# M, K, N and the batch: also those that XLA's library refuses, of single rows and columns and tiny.
SHAPES = [((), 96, 40, 24), ((2,), 33, 17, 65), ((), 1, 64, 9), ((3,), 5, 3, 2), ((), 70, 8, 1)]
TRANSPOSES = (None, "left", "right")


def operands(shape, transpose, dtype):
    batch, m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(*batch, m, k)), rng.normal(size=(*batch, k, n))
    a = np.swapaxes(a, -1, -2) if transpose == "left" else a
    b = np.swapaxes(b, -1, -2) if transpose == "right" else b
    return jnp.asarray(a, dtype), jnp.asarray(b, dtype)


def plain(a, b, transpose):
    """In float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    a = np.swapaxes(a, -1, -2) if transpose == "left" else a
    return a @ (np.swapaxes(b, -1, -2) if transpose == "right" else b)


@pytest.mark.parametrize("transpose", TRANSPOSES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_values_and_gradients(shape, transpose, dtype):
    a, b = operands(shape, transpose, dtype)
    f = jax.jit(lambda a, b: products.matmul(a, b, transpose=transpose))
    y, vjp = jax.vjp(f, a, b)
    assert y.dtype == jnp.float32
    expected = plain(a, b, transpose)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)  # exact products, float32 sums
    dy = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), dtype)
    da, db = vjp(dy.astype(y.dtype))
    assert da.dtype == db.dtype == dtype
    wide_da = plain(b, dy, "right") if transpose == "left" else plain(
        dy, b, None if transpose == "right" else "right")  # fmt: skip
    wide_db = plain(dy, a, "left") if transpose == "right" else plain(
        a, dy, None if transpose == "left" else "left")  # fmt: skip
    # Sums of exact products, rounded once to the dtype.
    bound = {"rtol": float(jnp.finfo(dtype).eps), "atol": 1e-5}
    np.testing.assert_allclose(np.asarray(da, np.float64), wide_da, **bound)
    np.testing.assert_allclose(np.asarray(db, np.float64), wide_db, **bound)


@pytest.mark.parametrize("transpose", TRANSPOSES)
def test_in_float64(x64, transpose):
    a, b = operands(SHAPES[1], transpose, np.float64)
    y = products.matmul(a, b, transpose=transpose)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, plain(a, b, transpose), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sizes", [(96, 40, 24), (24, 40, 96)])
@pytest.mark.parametrize("transpose", TRANSPOSES)
def test_no_product_is_widened_on_a_cpu(transpose, sizes):
    """Neither forward nor backward; each widened one would be a `dot` of float32."""
    if "xla_cpu_experimental_ynn_fusion_type" not in compiler_options():
        pytest.skip("this version of XLA has no library for such products")
    a, b = operands(((), *sizes), transpose, jnp.bfloat16)

    def gradients(a, b, dy):
        y, vjp = jax.vjp(lambda a, b: products.matmul(a, b, transpose=transpose), a, b)
        return y, vjp(dy)

    dy = jnp.zeros((sizes[0], sizes[2]))
    f = jax.jit(gradients, compiler_options=compiler_options())
    text = f.lower(a, b, dy).compile().as_text()
    dots = [line for line in text.splitlines() if " dot(" in line]
    assert len(dots) == 3
    assert text.count('"__ynn_fusion"') == 3
    assert "convert(%a" not in text
    assert "convert(%b" not in text
