"""Fine-tuning: what a new model takes from given weights, and what stays fresh."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import GOLDEN
from vssd_jax.errors import UserError
from vssd_jax.models.family import abstract, build
from vssd_jax.models.split import SplitModel
from vssd_jax.training.checkpoints import Checkpoints
from vssd_jax.training.state import init_state
from vssd_jax.weights.checkpoint import read_ema
from vssd_jax.weights.load import load
from vssd_jax.weights.pretrained import pretrained_weights
from vssd_jax.weights.state import shapes

NANO = GOLDEN / "checkpoints/classification_nano.pth"
SMALL = {
    "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "d_state": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The folder of a small classifier's run, with a checkpoint of random values."""
    folder = tmp_path_factory.mktemp("run")
    config = {"model": "vssd_nano", "num_classes": 10, "model_options": SMALL}
    (folder / "config.json").write_text(json.dumps(config))
    model = abstract(lambda rngs: build("vssd_nano", num_classes=10, rngs=rngs, **SMALL))
    rng = np.random.default_rng(0)
    arrays = {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for name, shape in shapes(model).items()
    }
    with Checkpoints(folder, best_metric="val/top1") as checkpoints:
        checkpoints.save(1, {"ema": arrays}, {})
    return folder


def started(source, name, num_classes, options):
    """The state of a run that starts from the weights `source`, all arrays by name."""
    model = SplitModel(lambda rngs: build(name, num_classes=num_classes, rngs=rngs, **options))
    weights = pretrained_weights(source, name, model.abstract, options)
    state = init_state(model, optax.sgd(1.0), jax.random.key(1), weights)
    return {**state.params, **state.batch_stats}


@pytest.mark.parametrize("num_classes", [10, 12])
def test_fine_tuning_starts_from_weights(workdir, num_classes):
    filled = started(workdir, "vssd_nano", num_classes, SMALL)
    expected, _ = read_ema(workdir)
    for name, value in filled.items():
        if name.startswith("head.") and num_classes != 10:
            assert value.shape[-1] == 12
        else:
            np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize("kind", ["workdir", "file"])
def test_a_classifier_starts_a_backbone(workdir, kind):
    if kind == "workdir":
        source, options = workdir, {**SMALL, "channels": 8, "aux_channels": 8}
        expected, _ = read_ema(workdir)
    else:
        source, options = NANO, {}
        expected = load(source).params
    filled = started(source, "upernet_vssd_nano", 11, options)
    left = {name for name in expected if name.split(".")[0] in ("norm", "head")}
    assert len(left) == 4
    for name in expected.keys() - left:
        np.testing.assert_array_equal(filled[f"backbone.{name}"], expected[name], err_msg=name)
    fresh = {name for name in filled if name.removeprefix("backbone.") not in expected}
    assert {name.split(".")[0] for name in fresh} == {
        "backbone", "decode_head", "auxiliary_head",
    }  # fmt: skip
    assert {name.split(".")[1] for name in fresh if name.startswith("backbone")} == {"out_norms"}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("upernet_vssd_micro", {}, "vssd_nano, not of vssd_micro"),
        ("upernet_vssd_nano", {"d_state": 4}, "12 of another shape"),
        ("upernet_vssd_nano", {"depths": (1, 1, 1, 1)}, "vssd_nano, not of vssd_nano"),
    ],
)
def test_a_backbone_that_does_not_fit_is_named(model, options, message):
    with pytest.raises(UserError, match=message):
        started(NANO, model, 11, options)


def test_a_head_of_other_classes_is_no_start(workdir, capsys):
    config = json.loads((workdir / "config.json").read_text())
    config["class_names"] = list("abcdefghij")
    (workdir / "config.json").write_text(json.dumps(config))
    model = abstract(lambda rngs: build("vssd_nano", num_classes=10, rngs=rngs, **SMALL))

    def taken(names):
        return pretrained_weights(workdir, "vssd_nano", model, SMALL, class_names=names)

    assert "head.kernel" in taken(tuple("abcdefghij"))
    assert "head.kernel" in taken(None)
    assert capsys.readouterr().out == ""
    assert "head.kernel" not in taken(list("abcdefghix"))
    assert (
        "has other classes (a, b, c, ...): the classifier starts fresh" in capsys.readouterr().out
    )
