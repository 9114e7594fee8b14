"""ReLU, GELU and SiLU and their own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssd_jax.kernels.gelu import gelu
from vssd_jax.kernels.relu import relu
from vssd_jax.kernels.silu import silu

FORMULAS = {
    relu: lambda x: jnp.maximum(x, 0),
    gelu: lambda x: x * jax.scipy.stats.norm.cdf(x),
    silu: lambda x: x * jax.nn.sigmoid(x),
}


@pytest.mark.parametrize("f", FORMULAS)
def test_value_and_gradient(f, x64):
    x = jnp.linspace(-6, 6, 40)  # without zero, where ReLU has no derivative
    for wrap in (jax.jit, jax.checkpoint):
        actual, expected = (jax.vjp(wrap(g), x) for g in (f, FORMULAS[f]))
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12, atol=1e-14)
        a, b = (vjp(jnp.cos(x))[0] for _, vjp in (actual, expected))
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("f", FORMULAS)
def test_the_dtype_stays(f):
    x = jnp.linspace(-6, 6, 40, dtype=jnp.bfloat16)
    y, vjp = jax.vjp(f, x)
    assert y.dtype == vjp(y)[0].dtype == jnp.bfloat16
