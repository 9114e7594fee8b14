"""The loads and stores that show what a GPU would do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.poison import poisoned


def test_poison_finds_a_missing_mask():
    plgpu = pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)
    from jax.experimental import pallas as pl

    def kernel(x_ref, y_ref, *, masked):
        index = jnp.arange(8)
        load, store = poisoned(plgpu).load, poisoned(plgpu).store
        mask = index < (5 if masked else 6)
        store(y_ref.at[index], load(x_ref.at[index], mask=mask, other=0.0), mask=index < 5)

    def run(masked):
        return pl.pallas_call(
            functools.partial(kernel, masked=masked),
            out_shape=jax.ShapeDtypeStruct((5,), jnp.float32),
            interpret=True,
        )(jnp.ones(5, jnp.float32))

    assert np.isfinite(run(True)).all()

    def overwrite(x_ref, y_ref):
        index = jnp.arange(8)
        poisoned(plgpu).store(y_ref.at[index], jnp.ones(8, jnp.float32), mask=index < 6)

    y = pl.pallas_call(
        overwrite, out_shape=jax.ShapeDtypeStruct((5,), jnp.float32), interpret=True
    )(jnp.ones(5, jnp.float32))
    assert np.isnan(y).any()
