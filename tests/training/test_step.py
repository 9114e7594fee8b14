"""One step: micro-batches, and what is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vssd_jax.models.split import SplitModel
from vssd_jax.training.apply import apply_gradient
from vssd_jax.training.state import init_state
from vssd_jax.training.step import make_train_step


class _Line(nnx.Module):
    """y = w x, enough to follow a step by hand."""

    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones(()))

    def __call__(self, x, rngs=None):
        return self.w[...] * x


def _line_step(accumulate=1):
    model = SplitModel(_Line)
    optimizer = optax.sgd(0.1)

    def loss(model, batch, *, step, rngs, teacher):
        error = model(batch["x"]) - batch["y"]
        return jnp.square(error).mean(), {"error": jnp.abs(error).mean()}

    state = init_state(model, optimizer, jax.random.key(0))
    apply = functools.partial(apply_gradient, optimizer, None, 0.75)
    step = make_train_step(model, apply, loss, accumulate=accumulate)
    return state, step


def test_micro_batches_average_to_the_whole_batch():
    batch = {"x": jnp.arange(8.0), "y": 3 * jnp.arange(8.0) + 1}
    results = []
    for accumulate in (1, 4):
        state, step = _line_step(accumulate)
        state, metrics = jax.jit(step)(state, batch, jax.random.key(0))
        results.append((float(state.params["w"]), float(metrics["loss"]), float(metrics["error"])))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
    assert results[0][0] > 1.5


def test_a_step_that_is_not_finite_changes_only_the_counters():
    state, step = _line_step()
    bad = {"x": jnp.array([1.0, jnp.nan]), "y": jnp.zeros(2)}
    good = {"x": jnp.ones(2), "y": jnp.zeros(2)}
    for expected in (1, 2):
        state, metrics = step(state, bad, jax.random.key(0))
        assert (int(state.step), int(state.nonfinite)) == (expected, expected)
        assert float(metrics["skipped"]) == 1
    assert float(state.params["w"]) == float(state.ema["w"]) == 1
    state, metrics = step(state, good, jax.random.key(0))
    assert (int(state.step), int(state.nonfinite), float(metrics["skipped"])) == (3, 0, 0)
    assert float(state.params["w"]) == pytest.approx(0.8)
    assert float(state.ema["w"]) == pytest.approx(0.75 + 0.25 * 0.8)
