"""One step: weight decay's mask, micro-batches, and what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.golden_model import GOLDEN
from vssd_jax.models.vssd import VSSD, VSSDConfig
from vssd_jax.training.optimizer import decay_mask
from vssd_jax.training.state import Functional, init_state, make_train_step
from vssd_jax.weights import names


def _functional(dtype):
    return Functional(
        lambda rngs: VSSD(VSSDConfig.nano(), num_classes=10, dtype=dtype, rngs=rngs)
    )


def test_weight_decay_spares_the_authors_tensors():
    params, _ = jax.eval_shape(lambda: _functional("float32").init(jax.random.key(0)))
    decayed = decay_mask(params, "vectors")
    spared = {name: value for name, value in params.items() if not decayed[name]}
    torch_names = names.to_torch(names.VSSD, {k: np.zeros(v.shape) for k, v in spared.items()})
    golden = np.load(GOLDEN / "training_nano.npz")["no_decay"]
    assert sorted(torch_names) == sorted(golden)


def test_decay_of_detectors_spares_norms_only():
    params = dict.fromkeys(
        ["a.norm.scale", "a.norm1.bias", "out_norms.0.scale", "mlp.fc1.bias", "mixer.A_log"], 0
    )
    decayed = [name for name, decays in decay_mask(params, "norms").items() if decays]
    assert decayed == ["mlp.fc1.bias", "mixer.A_log"]


class _Line(nnx.Module):
    """y = w x, enough to follow a step by hand."""

    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones(()))

    def __call__(self, x, rngs=None):
        return self.w[...] * x


def _line_step(accumulate=1):
    functional = Functional(_Line)
    optimizer = optax.sgd(0.1)

    def loss(model, batch, *, step, rngs, teacher):
        error = model(batch["x"]) - batch["y"]
        return jnp.square(error).mean(), {"error": jnp.abs(error).mean()}

    state = init_state(functional, optimizer, jax.random.key(0))
    step = make_train_step(functional, optimizer, loss, ema_decay=0.75, accumulate=accumulate)
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
