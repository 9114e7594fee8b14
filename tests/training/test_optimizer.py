"""Schedules against their formulas, and which parameters have weight decay."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import GOLDEN
from vssd_jax.config import base_config
from vssd_jax.errors import UserError
from vssd_jax.models import family, torch_names, vssd
from vssd_jax.models.layers import BatchNorm, LayerNorm, Linear, Precision
from vssd_jax.models.split import SplitModel
from vssd_jax.models.vssd import VSSD, VSSDConfig
from vssd_jax.training.optimizer import (
    decayed,
    frozen_parts,
    layer_rates,
    make_optimizer,
    make_schedule,
)


def test_cosine_with_warm_up_scales_with_the_batch():
    config = base_config()
    config.update(
        batch_size=2048, epochs=30, learning_rate=5e-4, learning_rate_batch=512, warmup_epochs=2,
        min_learning_rate=5e-6, warmup_learning_rate=5e-7,
    )  # fmt: skip
    schedule = make_schedule(config, 100)
    for step in np.linspace(0, 3000, 20, dtype=int):
        if step < 200:
            expected = 4 * (5e-7 + (5e-4 - 5e-7) * step / 200)
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 200) / 2800))
            expected = 4 * (5e-6 + (5e-4 - 5e-6) * cosine)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)


def test_steps_and_linear():
    config = base_config()
    config.update(
        epochs=12, learning_rate=1e-4, schedule="steps", decay_epochs=(8, 11), warmup_steps=50,
        warmup_learning_rate=1e-7,
    )  # fmt: skip
    schedule = make_schedule(config, 100)
    for step, expected in ((0, 1e-7), (49, 1e-4), (50, 1e-4), (799, 1e-4), (801, 1e-5),
                           (1099, 1e-5), (1101, 1e-6)):  # fmt: skip
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)


def test_linear_is_mmengines():
    """The rates that MMEngine 0.10.7 gives for LinearLR (0.001, end 50), then PolyLR (end 200)."""
    config = base_config()
    config.update(
        steps=200, learning_rate=1.0, schedule="linear", warmup_steps=50,
        warmup_learning_rate=1e-3,
    )  # fmt: skip
    schedule = make_schedule(config, 100)
    rates = {
        0: 0.001, 1: 0.021387755102040818, 2: 0.041775510204081635, 47: 0.9592244897959172,
        48: 0.979612244897958, 49: 1, 50: 1, 51: 0.9932885906040256, 52: 0.9865771812080525,
        197: 0.01342281879194631, 198: 0.006711409395973155, 199: 0,
    }  # fmt: skip
    for step, expected in rates.items():
        assert float(schedule(step)) == pytest.approx(expected, rel=2e-5, abs=1e-7)


def test_weight_decay_spares_the_authors_tensors():
    model = SplitModel(lambda rngs: VSSD(VSSDConfig.nano(), num_classes=10, rngs=rngs))
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


def test_the_authors_segmentor_decays_the_norms_of_its_heads():
    """26 of 189 tensors of UperNet with VSSD-Tiny: scale and bias of 13 BatchNorms."""
    model = SplitModel(lambda rngs: family.build("upernet_vssd_tiny", rngs=rngs))
    all_spared, spared = (
        {name for name, value in decayed(model, rule).items() if not value}
        for rule in ("norms", "backbone_norms")
    )
    assert spared < all_spared
    heads = all_spared - spared
    assert len(heads) == 26
    assert not any(name.startswith("backbone.") for name in heads)
    assert spared == {name for name in all_spared if name.startswith("backbone.")}


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="did you mean 'norms'"):
        decayed(SplitModel(_Odd), "norm")
    config = base_config()
    config.schedule = "cosin"
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        make_schedule(config, 10)


def nano(**fields):
    config = base_config()
    config.update({"model": "vssd_nano", "num_classes": 10} | fields)
    return config


def names_of(config):
    def build(rngs):
        return family.build(config.model, rngs=rngs, num_classes=10, **config.model_options)

    return SplitModel(build).parameter_shapes


def test_rates_fall_with_the_distance_from_the_head():
    config = nano(layer_decay=0.7, model_options={"depths": (1, 2, 1, 1)})
    rates = layer_rates(config, names_of(config))
    assert rates is not None
    # Stem, five blocks, head: the distance of each from the head.
    expected = {
        "stem.": 6, "stages.0.blocks.0.": 5, "stages.0.downsample.": 4, "stages.1.blocks.0.": 4,
        "stages.1.blocks.1.": 3, "stages.1.downsample.": 2, "stages.2.blocks.0.": 2,
        "stages.2.downsample.": 1, "stages.3.blocks.0.": 1, "norm.": 0, "head.": 0,
    }  # fmt: skip
    seen = set()
    for name, rate in rates.items():
        start = next(start for start in expected if name.startswith(start))
        assert rate == pytest.approx(0.7 ** expected[start], rel=1e-12), name
        seen.add(start)
    assert seen == set(expected)
    inside = nano(model="upernet_vssd_nano", layer_decay=0.7, num_classes=3)
    of_head = layer_rates(inside, names_of(inside))
    assert of_head is not None
    assert {rate for name, rate in of_head.items() if not name.startswith("backbone.")} == {1.0}
    blocks = sum(VSSDConfig.nano().depths)
    stem = {rate for name, rate in of_head.items() if name.startswith("backbone.stem.")}
    assert stem == {0.7 ** (blocks + 1)}


def test_an_update_is_scaled_by_the_rate_its_decay_too():
    config = nano(layer_decay=0.5, weight_decay=0.1, clip_grad_norm=0.0)
    params = {"stem.w": jnp.full((2, 2), 3.0), "head.w": jnp.full((2, 2), 3.0)}
    mask, rates = dict.fromkeys(params, True), {"stem.w": 0.25, "head.w": 1.0}
    optimizer = make_optimizer(config, lambda step: 1e-2, mask, rates)
    gradient = {name: jnp.full((2, 2), 0.5) for name in params}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    plain = make_optimizer(config, lambda step: 1e-2, mask)
    expected, _ = plain.update(gradient, plain.init(params), params)
    np.testing.assert_allclose(updates["head.w"], expected["head.w"], rtol=1e-7)
    np.testing.assert_allclose(updates["stem.w"], 0.25 * expected["stem.w"], rtol=1e-7)


def test_what_is_frozen_is_asked_of_the_model():
    assert frozen_parts(nano()) == ()
    assert frozen_parts(nano(freeze_stages=1)) == ("stem.", "stages.0.")
    assert frozen_parts(nano(linear_probe=True)) == ("norm.", "stages.", "stem.")
    of_detector = nano(model="mask_rcnn_vssd_nano", freeze_stages=2)
    assert frozen_parts(of_detector)[-1] == "backbone.stages.1."
    assert frozen_parts(nano(model="upernet_vssd_nano", linear_probe=True)) == ("backbone.",)
    with pytest.raises(UserError, match="freeze_stages=5, and vssd_nano has 4 stages"):
        frozen_parts(nano(freeze_stages=5))
    config = nano(freeze_stages=4, layer_decay=0.5)
    rates = layer_rates(config, names_of(config))
    assert {name.partition(".")[0] for name, rate in rates.items() if rate == 0} == {
        "stem", "stages",
    }  # fmt: skip
