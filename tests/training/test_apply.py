"""What a gradient does to the state: kernels (in the interpreter) against plain JAX."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vssd_jax.config import base_config
from vssd_jax.models.split import SplitModel
from vssd_jax.training import apply
from vssd_jax.training.optimizer import make_optimizer, make_split
from vssd_jax.training.state import TrainState, init_state
from vssd_jax.training.step import make_train_step

SHAPES = {"b.kernel": (5, 7), "b.bias": (7,), "a.scale": (), "c.kernel": (3, 3, 2, 4)}
MASK = {name: len(shape) > 1 for name, shape in SHAPES.items()}
RATES = {"a.scale": 0.25, "b.bias": 0.5, "b.kernel": 0.5, "c.kernel": 1.0}


@pytest.fixture
def interpreted(monkeypatch):
    """Takes kernels where the program is for a CPU."""
    pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)
    from vssd_jax.kernels import multi_tensor

    monkeypatch.setattr(multi_tensor, "BLOCK", 16)
    anywhere = types.SimpleNamespace(target=lambda: None, pallas_triton=lambda device: None)
    monkeypatch.setattr(apply, "dispatch", anywhere)


def arrays(seed, shapes):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}


def first_state(optimizer):
    params, statistics = arrays(0, SHAPES), arrays(1, {"b.mean": (7,)})
    return TrainState(
        step=jnp.int32(3),
        params=params,
        batch_stats=statistics,
        opt_state=optimizer.init(params),
        ema=arrays(2, SHAPES) | arrays(3, {"b.mean": (7,)}),
        nonfinite=jnp.int32(2),
    )


def fields(clip, rates):
    config = base_config()
    config.update(weight_decay=0.3, clip_grad_norm=clip, betas=(0.9, 0.99), epsilon=1e-8)
    return config, lambda count: 0.1 / (1 + count), MASK, rates


def steps(clip, rates, split, gradients):
    optimizer = make_optimizer(*fields(clip, rates), packed=True)
    split = make_split(*fields(clip, rates)) if split else None
    step = jax.jit(functools.partial(apply.apply_gradient, optimizer, split, 0.75))
    state, said = first_state(optimizer), []
    for number, gradient in enumerate(gradients):
        state, norm, finite = step(state, gradient, arrays(number, {"b.mean": (7,)}), jnp.ones(()))
        said.append((norm, finite))
    return state, said


@pytest.mark.parametrize("rates", [None, RATES])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_kernels_do_as_plain_jax_does(clip, rates, interpreted, x64):
    gradients = [arrays(seed, SHAPES) for seed in (5, 6, 7)]
    found, expected = (steps(clip, rates, split, gradients) for split in (True, False))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)
    assert (int(found[0].step), int(found[0].nonfinite)) == (6, 0)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_changes_nothing_bit_for_bit(value, interpreted):
    gradient = arrays(5, SHAPES)
    gradient["b.kernel"] = gradient["b.kernel"].at[2, 3].set(value)
    state, [(_, finite)] = steps(1.0, RATES, True, [gradient])
    assert not finite
    before = first_state(make_optimizer(*fields(1.0, RATES), packed=True))
    assert (int(state.step), int(state.nonfinite)) == (4, 3)
    for part in ("params", "batch_stats", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(before, part))


class _Net(nnx.Module):
    """Two layers and statistics."""

    def __init__(self, rngs):
        # Without a bias: before a norm its gradient is rounding alone, and Adam scales that up.
        self.first = nnx.Linear(3, 20, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(20, rngs=rngs)
        self.last = nnx.Linear(20, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


def _loss(model, batch, *, step, rngs, teacher):
    return jnp.square(model(batch["x"]) - batch["y"]).mean(), {}


def test_a_whole_step_in_kernels_is_the_plain_one(interpreted):
    model = SplitModel(_Net)
    mask = {name: len(shape) > 1 for name, shape in model.parameter_shapes.items()}
    config, schedule, *_ = fields(0.5, None)
    optimizer = make_optimizer(config, schedule, mask, packed=True)
    rng = np.random.default_rng(0)
    batch = {"x": rng.standard_normal((8, 3)), "y": rng.standard_normal((8, 1))}
    results = []
    for split in (None, make_split(config, schedule, mask)):
        applied = functools.partial(apply.apply_gradient, optimizer, split, 0.75)
        step = jax.jit(make_train_step(model, applied, _loss), donate_argnums=0)
        state = init_state(model, optimizer, jax.random.key(0))
        for _ in range(3):
            state, metrics = step(state, batch, jax.random.key(0))
        results.append((state, metrics))
    fresh = init_state(model, optimizer, jax.random.key(0))
    assert not np.allclose(results[0][0].ema["first.kernel"], fresh.params["first.kernel"])
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
