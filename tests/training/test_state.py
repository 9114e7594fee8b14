"""The training state, and the named arrays that a checkpoint holds of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vssd_jax.models.layers import BatchNorm, Precision
from vssd_jax.models.split import SplitModel
from vssd_jax.training.state import from_parts, init_state, to_parts


def fresh(weights=None):
    model = SplitModel(lambda rngs: BatchNorm(3, precision=Precision()))
    return init_state(model, optax.adam(0.1), jax.random.key(0), weights)


def test_the_average_starts_at_the_initialisation():
    state = fresh()
    assert (int(state.step), int(state.nonfinite)) == (0, 0)
    assert (state.params.keys(), state.batch_stats.keys()) == ({"scale", "bias"}, {"mean", "var"})
    start = {**state.params, **state.batch_stats}
    assert state.ema.keys() == start.keys()
    for name, value in start.items():
        np.testing.assert_array_equal(state.ema[name], value)
        assert state.ema[name] is not value  # both are donated


def test_weights_take_the_place_of_fresh_values():
    state = fresh({"scale": np.array([1, 2, 3], np.float64), "mean": np.full(3, 4, np.float16)})
    np.testing.assert_array_equal(state.params["scale"], [1, 2, 3])
    np.testing.assert_array_equal(state.batch_stats["mean"], [4, 4, 4])
    np.testing.assert_array_equal(state.ema["mean"], [4, 4, 4])
    np.testing.assert_array_equal(state.batch_stats["var"], [1, 1, 1])
    assert {leaf.dtype for leaf in state.ema.values()} == {np.dtype("float32")}


def test_parts_and_back():
    state = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape).astype(x.dtype), fresh())
    parts = to_parts(state)
    assert parts.keys() == {"ema", "train"}
    assert parts["ema"].keys() == {"scale", "bias", "mean", "var"}
    assert {"step", "nonfinite", "params/scale", "batch_stats/var"} < parts["train"].keys()
    assert len(parts["train"]) == 6 + 1 + 4  # Adam: a count and two moments of each parameter
    back = from_parts(parts, fresh())
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    with pytest.raises(KeyError):
        from_parts({"ema": {}, "train": {}}, state)


def test_a_state_is_a_tree():
    assert isinstance(jax.eval_shape(lambda: fresh()).ema["scale"], jax.ShapeDtypeStruct)
    assert not isinstance(fresh().ema["scale"], nnx.Variable)
