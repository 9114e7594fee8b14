"""Modules as structure and named arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vssd_jax.models.layers import BatchNorm, Precision
from vssd_jax.models.split import SplitModel


class Toy(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (3,)))
        self.layers = nnx.List([BatchNorm(3, precision=Precision())])
        self.deterministic = False

    def __call__(self, x):
        return self.layers[0](x) * self.scale[...]


NAMES = {"scale", "layers.0.scale", "layers.0.bias"}
STATISTICS = {"layers.0.mean", "layers.0.var"}


def test_names_and_shapes():
    model = SplitModel(Toy)
    assert model.parameter_shapes == dict.fromkeys(NAMES, (3,))
    assert model.norm_parameters == NAMES - {"scale"}
    assert isinstance(model.abstract.scale.get_value(), jax.ShapeDtypeStruct)
    assert model.abstract.deterministic


def test_merging_gives_the_same_arrays_and_the_mode():
    model = SplitModel(Toy)
    params, batch_stats = model.init(jax.random.key(0))
    assert (params.keys(), batch_stats.keys()) == (NAMES, STATISTICS)
    arrays = {
        name: jnp.full((3,), float(index))
        for index, name in enumerate([*params, *batch_stats])
    }
    for training in (True, False):
        # In any order, with others among them.
        module = model.merge(dict(reversed(arrays.items())) | {"more": 1}, training=training)
        assert module.deterministic == (not training)
        assert module.layers[0].use_running_average == (not training)
        found = nnx.to_flat_state(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat)))
        found = {".".join(map(str, path)): leaf[...] for path, leaf in found}
        assert found.keys() == arrays.keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(found[name], value)


def test_statistics_after_the_forward_pass():
    model = SplitModel(Toy)
    params, before = model.init(jax.random.key(0))
    module = model.merge({**params, **before}, training=True)
    module(jnp.arange(12.0).reshape(4, 3))
    after = model.batch_stats(module)
    np.testing.assert_allclose(after["layers.0.mean"], [0.45, 0.55, 0.65], rtol=1e-6)
    np.testing.assert_array_equal(before["layers.0.mean"], 0)  # the arrays given are left alone


def test_keys_decide_the_fresh_values():
    model = SplitModel(Toy)
    first, again, other = (model.init(jax.random.key(seed))[0]["scale"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
