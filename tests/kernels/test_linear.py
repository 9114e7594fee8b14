"""The linear layer and its own gradient against the automatic one of the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssd_jax.kernels.linear import linear
from vssd_jax.kernels.linear.xla import MANY_ROWS


def arguments(with_bias, dtype, pixels=(5, 4)):
    rng = np.random.default_rng(0)
    wide = jnp.promote_types(dtype, jnp.float32)
    x, dy = (jnp.asarray(rng.standard_normal((3, *pixels, size)), dtype) for size in (24, 8))
    kernel, bias = (jnp.asarray(rng.standard_normal(shape), wide) for shape in ((24, 8), (8,)))
    return (x, kernel, bias if with_bias else None), dy


def value_and_gradients(f, values, dy):
    y, vjp = jax.vjp(f, *values)
    return y, *jax.tree.leaves(vjp(dy))


# So many pixels that a CPU takes other forms of the products.
@pytest.mark.parametrize("pixels", [(5, 4), (48, 32)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float64, 1e-14), (jnp.float32, 1e-6), (jnp.bfloat16, 1e-2), (jnp.float16, 1.5e-3)],
)
def test_against_the_formula(pixels, with_bias, dtype, tolerance):
    with jax.enable_x64(True):
        values, dy = arguments(with_bias, dtype, pixels)
        assert (values[0].size // 24 >= MANY_ROWS) == (pixels != (5, 4))
        wide = jax.tree.map(lambda t: t.astype(jnp.float64), (values, dy))

        def formula(x, kernel, bias):
            return x @ kernel if bias is None else x @ kernel + bias

        expected = value_and_gradients(formula, *wide)
        found = value_and_gradients(linear, values, dy)
        assert [a.dtype for a in found] == [dtype, *(t.dtype for t in jax.tree.leaves(values))]
        for a, b in zip(found, expected, strict=True):
            error = np.linalg.norm(a.astype(jnp.float64) - b)
            assert error < tolerance * np.linalg.norm(b)


def test_the_bias_is_added_before_the_rounding():
    x, kernel = jnp.full((1, 2), 16.0, jnp.bfloat16), jnp.asarray([[16.0], [0.0625]])
    # 257 lies between bfloat16's 256 and 258.
    assert linear(x, kernel, jnp.asarray([1.0]))[0, 0] == 258
    assert linear(x, kernel)[0, 0] + jnp.bfloat16(1) == 256


def test_the_gradient_of_the_bias_is_added_up_in_float32():
    dy = jnp.full((100_000, 1), 0.1, jnp.bfloat16)
    values = jnp.ones((100_000, 1), jnp.bfloat16), jnp.ones((1, 1)), jnp.ones(1)
    dbias = jax.vjp(linear, *values)[1](dy)[2]
    np.testing.assert_allclose(dbias, [1e5 * float(dy[0, 0])], rtol=1e-4)
