"""One step: weight decay's mask, micro-batches, and what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.golden_model import GOLDEN
from vssd_jax.models import torch_names, vssd
from vssd_jax.models.family import build
from vssd_jax.models.layers import BatchNorm, LayerNorm, Linear, Precision
from vssd_jax.models.split import SplitModel
from vssd_jax.models.vssd import VSSD, VSSDConfig
from vssd_jax.training.optimizer import decayed
from vssd_jax.training.state import init_state
from vssd_jax.training.step import make_train_step


def _nano(dtype):
    return SplitModel(
        lambda rngs: VSSD(VSSDConfig.nano(), num_classes=10, dtype=dtype, rngs=rngs)
    )


def test_weight_decay_spares_the_authors_tensors():
    model = _nano("float32")
    decays = decayed(model, "vectors")
    spared = {name: shape for name, shape in model.parameter_shapes.items() if not decays[name]}
    zeros = {name: np.zeros(shape) for name, shape in spared.items()}
    names = torch_names.to_torch(vssd.TORCH_TABLE, zeros)
    golden = np.load(GOLDEN / "training_nano.npz")["no_decay"]
    assert sorted(names) == sorted(golden)


class _Odd(nnx.Module):
    """Norms of several types, under names that do not say so."""

    def __init__(self, rngs):
        self.first = LayerNorm(4, precision=Precision())
        self.second = nnx.List([BatchNorm(4, precision=Precision())])
        self.third = nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
        self.norm = Linear(4, 4, precision=Precision(), rngs=rngs)
        self.A_log = nnx.Param(jnp.zeros(3))


def test_decay_of_detectors_spares_norms_under_any_name():
    decays = decayed(SplitModel(_Odd), "norms")
    assert {name for name, value in decays.items() if value} == {
        "A_log", "norm.kernel", "norm.bias",
    }  # fmt: skip
    assert len(decays) == 9


@pytest.mark.parametrize("name", ["vssd_nano", "mask_rcnn_vssd_nano", "upernet_vssd_nano"])
def test_the_norms_of_every_model_are_found(name):
    """By the names that they happen to have, as weight decay was chosen in earlier versions."""
    model = SplitModel(lambda rngs: build(name, rngs=rngs))
    named = {
        name
        for name in model.parameter_shapes
        if {"norm", "norm1", "norm2", "out_norms"} & set(name.split("."))
    }
    assert model.norm_parameters == named


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
    step = make_train_step(model, optimizer, loss, ema_decay=0.75, accumulate=accumulate)
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
