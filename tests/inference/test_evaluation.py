"""Evaluation of weights: what is refused, and the speed; the rest is in training/test_loop.py."""

import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs.digits import get_config
from vssd_jax.errors import UserError
from vssd_jax.inference.evaluation import evaluate_weights, measure_throughput
from vssd_jax.models.family import abstract, build
from vssd_jax.models.split import SplitModel
from vssd_jax.training.sharding import make_mesh
from vssd_jax.weights.folder import Weights, write_folder
from vssd_jax.weights.state import shapes

SMALL = {
    "embed_dim": 8, "depths": (1, 0, 0, 1), "num_heads": (1, 1, 2, 2), "d_state": 8,
    "stem": "patch", "downsample": "patch",
}  # fmt: skip


def test_weights_of_another_number_of_classes(tmp_path, capsys):
    model = abstract(lambda rngs: build("vssd_nano", num_classes=12, rngs=rngs, **SMALL))
    zeros = {name: jnp.zeros(shape) for name, shape in shapes(model).items()}
    write_folder(tmp_path / "w", Weights("vssd_nano", 12, SMALL, zeros))
    config = get_config()
    config.data_dir = str(tmp_path)
    with pytest.raises(UserError, match=r"w has 12 classes, and the digits in .* 10$"):
        evaluate_weights(config, tmp_path / "w")
    assert "multiply-adds at" in capsys.readouterr().out


def test_weights_without_a_head(tmp_path):
    model = abstract(lambda rngs: build("vssd_nano", num_classes=0, rngs=rngs, **SMALL))
    zeros = {name: jnp.zeros(shape) for name, shape in shapes(model).items()}
    write_folder(tmp_path / "w", Weights("vssd_nano", 0, SMALL, zeros))
    with pytest.raises(UserError, match="w has no head: there is nothing to evaluate"):
        evaluate_weights(get_config(), tmp_path / "w")


def test_weights_of_other_classes(tmp_path):
    model = abstract(lambda rngs: build("vssd_nano", num_classes=10, rngs=rngs, **SMALL))
    zeros = {name: jnp.zeros(shape) for name, shape in shapes(model).items()}
    names = [*map(str, range(9)), "ten"]
    write_folder(tmp_path / "w", Weights("vssd_nano", 10, SMALL, zeros, names))
    config = get_config()
    config.data_dir = str(tmp_path)
    with pytest.raises(UserError, match=r"label 9 is 'ten' and '9' \(1 of 10 names differ\)"):
        evaluate_weights(config, tmp_path / "w")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("folder", "is a folder; give a file in it"),
        ("none/report.html", "there is no folder .*none$"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_first(place, message, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):  # before the weights, which are nowhere
        evaluate_weights(get_config(), tmp_path / "weights", report=tmp_path / place)


def test_images_per_second(monkeypatch):
    class Toy(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.ones(3))

        def __call__(self, images):
            assert images.shape == (4, 6, 8, 3)
            return (images * self.w[...]).sum((1, 2, 3))

    config = types.SimpleNamespace(eval_batch_size=4)
    task = types.SimpleNamespace(config=config, image_shape=(6, 8))
    seconds = iter([second + half for second in range(10) for half in (0, 0.5)])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    model = SplitModel(Toy)
    arrays, _ = model.init(jax.random.key(0))
    mesh = make_mesh({"data": -1, "fsdp": 1})
    assert measure_throughput(task, model, arrays, mesh) == pytest.approx(8)
