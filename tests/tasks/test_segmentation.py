"""Whole runs of a small segmentor on pictures in ADE20K's layout."""

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

from configs import upernet
from tests.conftest import ROOT
from tests.resume import assert_same_run, train_with_stops
from vssd_jax import UserError, create_model
from vssd_jax.data.datasets import ade20k
from vssd_jax.data.label_maps import open_folders, read_labels
from vssd_jax.data.normalization import normalize
from vssd_jax.inference.evaluation import evaluate_weights
from vssd_jax.tasks import make_task
from vssd_jax.tasks import segmentation_metrics as metrics
from vssd_jax.tasks.segmentation import Segmentation
from vssd_jax.training.loop import train
from vssd_jax.training.metrics import read_metrics
from vssd_jax.weights.folder import Weights, write_folder
from vssd_jax.weights.load import load
from vssd_jax.weights.state import get_state

STEPS = 20
OPTIONS = {  # what compiles fast
    "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "d_state": 8,
    "mixers": ("ncssd", "attention", "attention", "attention"),
    "channels": 8, "aux_channels": 8, "pool_scales": (1, 2),
}  # fmt: skip
CHANGES = {
    "image_size": 32, "image_shape": (32, 64), "short_side": 32, "long_side": 64,
    "size_multiple": 16, "batch_size": 2, "eval_batch_size": 8, "steps": STEPS,
    "warmup_steps": 1, "learning_rate": 1e-2, "log_every_steps": 1, "dtype": "float32",
    "num_workers": 0, "tta_ratios": (0.5, 1.0),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tests"])  # Grain reads absl flags


def write_pairs(root, split, sizes):
    """Pictures whose brightness follows the classes 1, 2 and 3; 0 is ignored."""
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for number, (height, width) in enumerate(sizes):
        rng = np.random.default_rng(number)
        label = np.kron(rng.integers(0, 4, (height // 8, width // 8)), np.ones((8, 8), np.uint8))
        image = np.repeat(60 * label[..., None], 3, -1) + rng.integers(0, 20, (*label.shape, 3))
        Image.fromarray(label.astype(np.uint8)).save(root / f"annotations/{split}/{number}.png")
        Image.fromarray(image.astype(np.uint8)).save(root / f"images/{split}/{number}.jpg")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("ade")
    write_pairs(root, "training", [(40, 56)] * 4)
    write_pairs(root, "validation", [(40, 56)] * 3)
    return root


def small_config(data_dir, **changes):
    config = upernet.get_config("micro")
    config.update(model="upernet_vssd_nano", data_dir=str(data_dir), init_from=None, **CHANGES)
    config.model_options = OPTIONS
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights folder whose model predicts the first four classes, each somewhere."""
    model = create_model("upernet_vssd_nano", num_classes=150, **OPTIONS)
    params = get_state(model)
    kernel, bias = (f"decode_head.classifier.{leaf}" for leaf in ("kernel", "bias"))
    params[kernel] = 100 * params[kernel]
    params[bias] = np.where(np.arange(150) < 4, params[bias], -1e3)
    folder = tmp_path_factory.mktemp("weights") / "upernet"
    write_folder(folder, Weights("upernet_vssd_nano", 150, OPTIONS, params))
    return folder


@pytest.fixture(scope="module")
def evaluation(weights, data_dir, tmp_path_factory):
    """With everything: numbers, printed lines and the folder of predictions."""
    folder, printed = tmp_path_factory.mktemp("saved"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        results = evaluate_weights(
            small_config(data_dir), weights, tta=True, save_predictions=folder,
            report=folder / "report.html",
        )  # fmt: skip
    return results, printed.getvalue().splitlines(), folder


NUMBERS = ("miou", "mean_accuracy", "pixel_accuracy")


def test_both_scales_and_the_classes_are_printed(evaluation):
    results, lines, _ = evaluation
    for number in NUMBERS:
        for name in (f"val/{number}", f"val/multi_scale_{number}"):
            assert f"{name} {results[name]:.6g}" in lines
    assert results["val/pixel_accuracy"] > 0
    table = [line for line in lines if line.startswith(ade20k.CLASSES)]
    assert len(table) == 150


def test_saved_labels_give_the_printed_numbers(evaluation, data_dir):
    results, _, folder = evaluation
    source = open_folders(
        data_dir / "images/validation",
        data_dir / "annotations/validation",
        class_names=ade20k.CLASSES,
        reduce_zero_label=True,
    )
    names = [f"{name}.png" for name in source.image_names]
    assert sorted(os.listdir(folder / "labels")) == sorted(os.listdir(folder / "overlays")) == names
    confusion = 0
    for index, name in enumerate(names):
        predicted = read_labels(folder / "labels" / name) - 1
        assert predicted.max() < 150
        assert len(np.unique(predicted)) > 1
        confusion += metrics.confusion_matrix(predicted[None], source[index]["label"][None], 150)
        with Image.open(folder / "overlays" / name) as overlay:
            assert overlay.height > len(predicted)  # the legend
    for name, value in metrics.summarize_confusion(confusion).items():
        assert results[f"val/multi_scale_{name}"] == pytest.approx(value, rel=1e-12)


def test_the_report_has_the_classes_and_pictures(evaluation):
    results, _, folder = evaluation
    page = (folder / "report.html").read_text()
    assert f"<b>{results['val/miou']:.4g}</b>" in page
    assert page.count("<td>wall</td>") >= 1
    gallery = re.search('<section id="worst-mistakes">.*?</section>', page)[0]
    shares = [float(share) for share in re.findall(r"IoU ([\d.]+)%</span>", gallery)]
    assert len(shares) == len(os.listdir(folder / "labels"))
    assert shares == sorted(shares)
    assert gallery.count("<img") == 2 * len(shares)


def command(script, data_dir, *arguments, devices=1):
    """Runs a script with the small config as a file."""
    path = data_dir.parent / f"{data_dir.name}_config.py"
    path.write_text(
        "from tests.tasks.test_segmentation import small_config\n\n\n"
        f"def get_config(arg=None):\n    return small_config({str(data_dir)!r})\n"
    )
    count = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, script, f"--config={path}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": count},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_eight_devices_evaluate_as_one(weights, evaluation, data_dir):
    results = evaluation[0]
    done = command("eval.py", data_dir, "--weights", weights, "--tta", devices=8)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    eight = json.loads(last)
    assert eight == pytest.approx(results, abs=1e-3)
    assert f"val/miou {eight['val/miou']:.6g}" in lines


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """A finished run: config, workdir, results."""
    config, workdir = small_config(data_dir), tmp_path_factory.mktemp("run") / "upernet"
    return config, workdir, train(Segmentation(config), config, workdir)


@pytest.mark.slow
def test_a_run_trains_and_evaluates(run):
    config, workdir, results = run
    lines = read_metrics(workdir)
    losses = [line for line in lines if "train/loss" in line]
    assert len(losses) == STEPS
    for line in losses:
        total = line["train/decode"] + 0.4 * line["train/auxiliary"]
        assert line["train/loss"] == pytest.approx(total, rel=1e-5)
    assert set(results) == {f"val/{name}" for name in (*NUMBERS, "unreadable")}
    assert lines[-1]["val/miou"] == results["val/miou"] > 0
    again = evaluate_weights(config, workdir, tta=True)
    assert {name: again[name] for name in results} == results
    assert again["val/multi_scale_pixel_accuracy"] != again["val/pixel_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stopped_run_resumes_bitwise(run, tmp_path, num_workers):
    config, workdir, results = run
    config = config.copy_and_resolve_references()
    config.num_workers = num_workers
    assert train_with_stops(Segmentation, config, tmp_path, (5, 10, 15)) == results
    assert_same_run(tmp_path, workdir)


BAD = {
    "is 56x40 pixels, its annotations are for 40x56": lambda label: Image.fromarray(label.T),
    "holds the label 151; it must lie in 0 to 150": lambda label: Image.fromarray(label + 151),
    "is a PNG of mode RGB": lambda label: Image.fromarray(np.stack([label] * 3, -1)),
    "without a file in": None,
}


def spoil(root, split, message):
    write_pairs(root, "training", [(40, 56)] * 2)
    write_pairs(root, "validation", [(40, 56)] * 2)
    path = root / "annotations" / split / "0.png"
    if BAD[message] is None:
        path.unlink()
    else:
        BAD[message](np.zeros((40, 56), np.uint8)).save(path)


@pytest.mark.parametrize("message", BAD)
def test_bad_labels_end_a_run(tmp_path, message):
    spoil(tmp_path / "ade", "training", message)
    config = small_config(tmp_path / "ade")
    with pytest.raises(UserError, match=message):
        train(Segmentation(config), config, tmp_path / "run")


@pytest.mark.parametrize("message", BAD)
def test_bad_labels_end_an_evaluation(weights, tmp_path, message):
    spoil(tmp_path, "validation", message)
    with pytest.raises(UserError, match=message):
        evaluate_weights(small_config(tmp_path), weights)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 255), "every pixel of the train label maps of .* is ignored"),
        ((0, 1), "are of one class, 'wall': there is nothing to tell apart"),
    ],
)
def test_label_maps_with_nothing_to_learn_are_refused(tmp_path, values, message):
    for split in ("training", "validation"):
        write_pairs(tmp_path, split, [(40, 56)] * 2)
        for path in (tmp_path / "annotations" / split).iterdir():
            Image.fromarray(np.random.default_rng(0).choice(np.uint8(values), (40, 56))).save(path)
    with pytest.raises(UserError, match=message):
        Segmentation(small_config(tmp_path)).train_batches(0)


def test_a_first_batch_without_labels_is_refused(tmp_path):
    write_pairs(tmp_path, "validation", [(40, 56)] * 2)
    write_pairs(tmp_path, "training", [(40, 56)] * 500)
    for path in (tmp_path / "annotations/training").iterdir():
        if path.name != "0.png":
            Image.fromarray(np.zeros((40, 56), np.uint8)).save(path)
    with pytest.raises(UserError, match="every pixel of the first batch is ignored"):
        next(Segmentation(small_config(tmp_path)).train_batches(0))


class Witness:
    """A segmentor that keeps the images that it is called with."""

    aux_weight = 0.0

    def __call__(self, images, rngs=None):
        self.images = np.asarray(images)
        return (jnp.zeros((len(images), 8, 8, 150)),)


def test_models_see_normalised_pixels_and_padding_of_zeros(data_dir):
    task, model = Segmentation(small_config(data_dir)), Witness()
    sides = set()
    for batch in itertools.islice(task.train_batches(0), 5):
        assert batch["image"].dtype == np.uint8
        task.loss(model, batch, step=0, rngs=None, teacher=None)
        for pixels, (height, width), seen in zip(
            batch["image"], batch["image_shape"], model.images, strict=True
        ):
            inside = seen[:height, :width]
            np.testing.assert_allclose(inside, normalize(pixels[:height, :width]), atol=1e-6)
            assert np.count_nonzero(seen) == np.count_nonzero(inside)
            sides |= {height, width}
    assert min(sides) < 32 == max(sides)
    batch = next(task.eval_batches())
    task.eval_step(model, batch)
    assert batch["images"]["0"].dtype == np.uint8
    np.testing.assert_allclose(model.images, normalize(batch["images"]["0"]), atol=1e-6)


def test_pictures_that_cannot_be_read_do_not_count(weights, tmp_path, capfd):
    write_pairs(tmp_path, "validation", [(40, 56)] * 3 + [(56, 40)])
    config = small_config(tmp_path)
    config.max_unreadable = 0.5
    whole = evaluate_weights(config, weights)
    write_pairs(tmp_path, "validation", [(40, 56)] * 3 + [(56, 40)] + [(48, 48)] * 2)
    for path in ("images/validation/4.jpg", "annotations/validation/5.png"):
        (tmp_path / path).write_bytes(b"")
    results = evaluate_weights(config, weights, save_predictions=tmp_path / "found")
    assert results == {**whole, "val/unreadable": 2 / 6}
    assert len(list((tmp_path / "found/labels").iterdir())) == 4


@pytest.mark.slow
def test_too_many_pictures_that_cannot_be_read_end_an_evaluation(weights, tmp_path):
    write_pairs(tmp_path, "validation", [(40, 56)] * 3)
    (tmp_path / "images/validation/0.jpg").write_bytes(b"")
    config = small_config(tmp_path)
    config.max_unreadable = 0.1
    with pytest.raises(UserError, match=r"33.3% of the pictures for evaluation"):
        evaluate_weights(config, weights)


def test_metrics_come_before_pictures(weights, data_dir, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        evaluate_weights(small_config(data_dir), weights, save_predictions=tmp_path / "file")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["val/miou"] >= 0


def test_bad_labels_are_one_line_of_the_command(tmp_path):
    message = next(iter(BAD))
    spoil(tmp_path / "ade", "training", message)
    done = command("train.py", tmp_path / "ade", f"--workdir={tmp_path}/run")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("\r")]
    assert message in lines[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "ade"}, "did you mean 'ade20k'"),
        ({"num_classes": 11}, "num_classes=11, and ade20k has 150"),
        ({"data_dir": "/nowhere"}, "/nowhere has no folder images"),
        ({"init_from": "/nowhere"}, "/nowhere"),
    ],
)
def test_impossible_configs_are_refused(data_dir, tmp_path, changes, message):
    config = small_config(**{"data_dir": data_dir} | changes)
    with pytest.raises(UserError, match=message):
        train(make_task(config), config, tmp_path / "run")


def test_weights_do_not_contradict_what_changes_training_alone(weights):
    overrides = {"dropout": 0.2, "aux_weight": 0.1, "drop_path": 0.5}
    assert load(weights, model="upernet_vssd_nano", overrides=overrides).num_classes == 150
    with pytest.raises(UserError, match="contradict channels=16"):
        load(weights, overrides={"channels": 16})


def test_weights_of_another_number_of_classes_are_refused(weights, data_dir):
    config = small_config(data_dir, dataset="digits_segmentation")
    with pytest.raises(UserError, match="has 150 classes, and the digits_segmentation"):
        evaluate_weights(config, weights)
