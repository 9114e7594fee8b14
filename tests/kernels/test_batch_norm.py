"""Batch normalisation and its own gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from vssd_jax.kernels.batch_norm import batch_norm


def test_batch_norm_has_the_gradient_of_the_formula(x64):
    rng = np.random.default_rng(0)
    x, dy = map(jnp.asarray, rng.normal(2, 3, (2, 4, 5, 3, 2)))
    scale, bias = map(jnp.asarray, rng.normal(1, 0.2, (2, 2)))

    def formula(x, scale, bias):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    def ours(x, scale, bias):
        return batch_norm(x, scale, bias, 1e-5, x.dtype)[0]

    for f in (ours, jax.checkpoint(ours)):
        for a, b in zip(
            jax.vjp(f, x, scale, bias)[1](dy), jax.vjp(formula, x, scale, bias)[1](dy), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
