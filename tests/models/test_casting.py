"""Parameters that are cast together have the values, and the gradients, that they had."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.shared_one import shared_one
from vssd_jax.models.casting import cast_together


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    special = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 2e-38, 3.4e38, 1 + 2**-23])
    return {
        "matrix": jnp.asarray(np.vstack([rng.standard_normal((7, 8)), special]), jnp.float32),
        "convolution": jnp.asarray(rng.standard_normal((3, 3, 4, 5)), jnp.float32),
        "depthwise": jnp.ones((3, 3, 6)),
        "bias": jnp.ones(6),
        "rounded": jnp.ones((2, 2), jnp.bfloat16),
    }


def test_values_and_gradients_stay(arrays, monkeypatch):
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("gpu", "NVIDIA H200"))
    found = jax.jit(lambda arrays: cast_together(arrays, "bfloat16"))(arrays)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name

    def loss(arrays, together):
        if together:
            arrays = cast_together(arrays, "bfloat16")
        x = arrays["matrix"][:7].astype(jnp.bfloat16)
        y = arrays["convolution"].astype(jnp.bfloat16)
        return (jnp.sin(x).sum() + jnp.square(y).sum()).astype(jnp.float32)

    one, other = (jax.grad(loss)(arrays, together) for together in (True, False))
    for name in ("matrix", "convolution"):
        assert np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes(), name


def test_what_is_not_cast_is_left_alone(arrays, monkeypatch):
    assert cast_together(arrays, "bfloat16") is arrays  # on a CPU
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("gpu", "NVIDIA H200"))
    assert cast_together(arrays, "float32") is arrays
    text = str(jax.make_jaxpr(lambda arrays: cast_together(arrays, jnp.bfloat16))(arrays))
    assert text.count(" mul ") == 2


def test_a_one_that_xla_does_not_see_through(monkeypatch):
    assert shared_one() == 1.0
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("gpu", "NVIDIA H200"))
    assert jax.jit(shared_one)() == 1
    text = str(jax.make_jaxpr(lambda x: [x * shared_one(), x + shared_one()])(1.0))
    assert text.count("optimization_barrier") == 2
