"""The token weights of NC-SSD and their own gradient against the automatic one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssd_jax.kernels.dispatch import automatic_gradients
from vssd_jax.kernels.nc_ssd import token_weights


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 7, 1)])
def test_gradients(shape, sign, x64):
    rng = np.random.default_rng(0)
    dt, dweights = (jnp.asarray(3 * rng.standard_normal(shape)) for _ in range(2))
    bias, a_log = (jnp.asarray(rng.standard_normal(shape[-1])) for _ in range(2))

    def run():
        def f(*arguments):
            return token_weights(*arguments, sign=sign)

        weights, vjp = jax.vjp(f, dt, bias, a_log)
        return weights, *vjp(dweights)

    found = run()
    with automatic_gradients():
        expected = run()
    np.testing.assert_allclose(found[0], sign * np.log1p(np.exp(dt + bias)) * np.exp(a_log))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
