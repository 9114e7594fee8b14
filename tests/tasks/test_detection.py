"""The detection task: its batches, and a run of a small model through the real loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from configs import digits_detection as digits_config
from tests.conftest import ROOT, flags_for
from tests.resume import assert_same_run, train_with_stops
from tests.tasks.test_coco_metrics import perfect, whole_batch
from vssd_jax.data.datasets import digits_detection
from vssd_jax.errors import UserError
from vssd_jax.inference.evaluation import evaluate_weights
from vssd_jax.tasks import make_task
from vssd_jax.tasks.coco_metrics import NUMBERS
from vssd_jax.tasks.detection import Detection
from vssd_jax.training.loop import train
from vssd_jax.training.metrics import read_metrics

LOSSES = ("rpn_cls", "rpn_box", "roi_cls", "roi_box", "roi_mask")
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tests"])  # Grain reads absl flags


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Scenes in the folders of COCO; some are turned on their side."""
    folder = tmp_path_factory.mktemp("coco")
    scenes = digits_detection.prepare(folder, train=12, test=5)
    (folder / "annotations").mkdir()
    for ours, theirs in (("train", "train2017"), ("test", "val2017")):
        path = scenes / "annotations" / f"instances_{ours}.json"
        dataset = json.loads(path.read_text())
        for image in dataset["images"][::3]:
            turn(image, dataset["annotations"], scenes / ours)
        (folder / "annotations" / f"instances_{theirs}.json").write_text(json.dumps(dataset))
        (scenes / ours).rename(folder / theirs)
    return str(folder)


def turn(image, annotations, folder):
    """Swaps the axes of an image and its boxes; a polygon around the box becomes the mask."""
    path = folder / image["file_name"]
    Image.open(path).transpose(Image.Transpose.TRANSPOSE).save(path)
    image["height"], image["width"] = image["width"], image["height"]
    for annotation in annotations:
        if annotation["image_id"] == image["id"]:
            y, x, h, w = annotation["bbox"]
            annotation["bbox"] = [x, y, w, h]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


def small_config(data_dir):
    config = digits_config.get_config()
    # What compiles fast.
    config.model_options = {
        "embed_dim": 8, "depths": (1, 0, 0, 1), "num_heads": (1, 1, 2, 2), "drop_path": 0.1,
        "mixers": ("attention",) * 4, "stem": "patch", "downsample": "patch", "fpn_channels": 8,
        "box_channels": 16, "rpn_pre_nms": 40, "rpn_pre_nms_train": 40, "rpn_proposals": 20,
        "roi_samples": 8, "max_detections": 10,
    }  # fmt: skip
    config.update(
        dataset="coco", data_dir=data_dir, short_sides=(64,), long_side=80, flip=0.5,
        padded_shapes=((96, 96),), batch_size=4, eval_batch_size=4, steps=STEPS,
        warmup_steps=2, learning_rate=1e-3, log_every_steps=1, ema_decay=0.5, clip_grad_norm=0.0,
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """A finished run: its config, workdir and result."""
    workdir = tmp_path_factory.mktemp("run") / "detection"
    config = small_config(data_dir)
    return config, workdir, train(Detection(config), config, workdir)


def losses(workdir):
    lines = read_metrics(workdir)
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_a_run_writes_losses_and_the_twelve_numbers(run):
    _, workdir, results = run
    lines = read_metrics(workdir)
    train_lines = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train_lines] == list(range(1, STEPS + 1))
    for line in train_lines:
        parts = [line[f"train/{name}"] for name in LOSSES]
        assert line["train/loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert min(parts) > 0
    assert results == {
        f"val/{kind}_{name}": lines[-1][f"val/{kind}_{name}"]
        for kind in ("box", "mask")
        for name in NUMBERS
    } | {"val/unreadable": 0}
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (workdir / "report.html").read_text()
    for part in ("classes", "confusion-matrix", "worst-mistakes", "a-few-predictions"):
        assert f'<section id="{part}">' in page


def test_evaluation_of_the_workdir_gives_the_same_numbers(run, tmp_path, capsys):
    config, workdir, results = run
    again = evaluate_weights(config, workdir, save_predictions=tmp_path / "found")
    assert {name: again[name] for name in results} == results
    *lines, last = capsys.readouterr().out.splitlines()
    printed = dict(line.split() for line in lines[1:])
    assert set(printed) == set(results)
    assert json.loads(last) == again
    found = json.loads((tmp_path / "found/bbox.json").read_text())
    assert {r["image_id"] for r in found} == set(range(5))  # the padding image is none of them
    counts = np.bincount([r["image_id"] for r in found])
    assert counts.max() <= config.model_options["max_detections"]
    for result in found:  # in pixels of the original images
        x, y, width, height = result["bbox"]
        portrait = result["image_id"] % 3 == 0
        assert x + width <= (128 if portrait else 160) + 1e-3
        assert y + height <= (160 if portrait else 128) + 1e-3
    with Image.open(tmp_path / "found/0.png") as picture:  # drawn larger, perhaps with a legend
        assert picture.width == 2 * 128
        assert picture.height >= 2 * 160


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stopped_run_resumes_bitwise(run, tmp_path, num_workers):
    config, workdir, results = run
    config = config.copy_and_resolve_references()
    config.num_workers = num_workers
    assert train_with_stops(Detection, config, tmp_path, (3, 4, 5)) == results
    assert_same_run(tmp_path, workdir)


def test_printed_numbers_are_those_of_the_written_predictions(data_dir, tmp_path):
    config = small_config(data_dir)
    task = Detection(config, save_predictions=tmp_path / "found")
    source = task.source("val")
    batch = whole_batch(source)
    found = perfect(source, batch, wrong=1)._asdict()
    found["masks"][:, 1, :, 10:] = -9  # a third of the mask is left
    # Two batches of three: the last image is padding, a copy of the first.
    order, valid = np.array([[0, 1, 2], [3, 4, 0]]), [np.ones(3, bool), np.array([1, 1, 0], bool)]
    outputs = (
        {
            "detections": {name: value[rows] for name, value in found.items()},
            **{name: value[rows] for name, value in batch.items() if name != "image"},
            "valid": real,
        }
        for rows, real in zip(order, valid, strict=True)
    )
    metrics = task.summarize(outputs)
    task.write_predictions()
    assert 0.1 < metrics["val/mask_map"] < metrics["val/box_map"] < 0.95
    truth = COCO(str(source.annotations))
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        results = truth.loadRes(str(tmp_path / f"found/{name}.json"))
        evaluation = COCOeval(truth, results, name)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        ours = [metrics[f"val/{kind}_{number}"] for number in NUMBERS]
        np.testing.assert_allclose(ours, evaluation.stats, rtol=0, atol=1e-12)


def test_images_that_cannot_be_read_or_scored_are_counted(data_dir, capsys):
    config = small_config(data_dir)
    task = Detection(config)
    source = task.source("val")
    batch = whole_batch(source)
    found = perfect(source, batch)._asdict()

    def summarize(replaced):
        batch["replaced"] = np.array(replaced, np.int32)
        return task.summarize(iter([{**batch, "detections": found, "valid": np.ones(5, bool)}]))

    whole = summarize([0] * 5)
    assert whole["val/box_map"] > 0.99
    with pytest.raises(UserError, match=r"20.0% of the pictures for evaluation .* unreadable"):
        summarize([0, 1, 0, 0, 0])
    config.max_unreadable = 0.2
    assert summarize([0, 1, 0, 0, 0]) == {**whole, "val/unreadable": 0.2}
    found["scores"][3] = np.nan
    found["valid"][3] = False  # as `predict` does where a score is not finite
    assert summarize([0] * 5)["val/box_map"] < 0.99
    assert "warning: the outputs for 1 of 5 images are not finite" in capsys.readouterr().out


def test_what_is_not_trained_on_is_said(data_dir, capsys):
    config = small_config(data_dir)
    config.update(max_objects=1, padded_shapes=((64, 96), (96, 64)))
    next(Detection(config).train_batches(0))
    said = capsys.readouterr().out
    assert "training images have more than config.max_objects=1 objects" in said
    assert "padded shapes of the training images: 2, each" in said
    task = Detection(config)
    for left_out in (0.0, 0.5, 0.5):
        task.check({"train/masks_left_out": left_out})
    assert capsys.readouterr().out.count("cover them more than eight times") == 1


def test_batches_are_of_one_shape_and_repeatable(data_dir):
    config = small_config(data_dir)
    config.padded_shapes = ((64, 96), (96, 64))
    task = Detection(config)
    assert task.num_classes == 10
    batches = list(task.train_batches(0))
    assert len(batches) == STEPS
    shapes = {batch["image"].shape for batch in batches}
    assert shapes == {(4, 64, 96, 3), (4, 96, 64, 3)}
    for batch in batches:
        height, width = batch["image"].shape[1:3]
        assert batch["masks"].shape == (4, height * width)
        assert batch["image"].dtype == np.uint8
        assert batch["valid"].any(1).all()
    for batch, again in zip(batches[2:], task.train_batches(2), strict=True):
        for name, value in batch.items():
            np.testing.assert_array_equal(value, again[name])
    seen = list(task.eval_batches())
    assert sum(batch["valid"].sum() for batch in seen) == 5
    assert len(seen) == 2


def test_exact_padding_is_to_multiples_of_32(data_dir):
    config = small_config(data_dir)
    config.update(exact_padding=True, short_sides=(64, 90), long_side=100)
    with pytest.raises(UserError, match="add --config"):
        Detection(config)
    config.eval_batch_size = 1
    shapes = [batch["image"].shape for batch in Detection(config).eval_batches()]
    assert sorted(set(shapes)) == [(1, 96, 128, 3), (1, 128, 96, 3)]
    assert len(shapes) == 5


def test_what_is_wrong_with_the_data_is_said(data_dir, tmp_path, capsys):
    config = small_config(data_dir)
    for changes, message in (
        ({"dataset": "coc"}, "did you mean 'coco'"),
        ({"data_dir": "/nowhere"}, "there is no folder /nowhere; config.data_dir holds"),
        ({"data_dir": f"{data_dir}/val2017"}, "no known layout of COCO's format"),
        ({"bad_annotations": "ignore"}, "must be one of skip, refuse"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.update(changes)
        with pytest.raises(UserError, match=message):
            next(make_task(wrong).train_batches(0))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        make_task(config, save_predictions=tmp_path / "file/found")
    annotations = tmp_path / "annotations"
    for split in ("train2017", "val2017"):
        (tmp_path / split).symlink_to(f"{data_dir}/{split}")
    annotations.mkdir()
    names = ("instances_train2017.json", "instances_val2017.json")
    train_set, val_set = (json.loads(Path(data_dir, "annotations", n).read_text()) for n in names)
    val_set["categories"].append({"id": 11, "name": "letter"})
    train_set["annotations"][0]["category_id"] = 77
    for name, dataset in zip(names, (train_set, val_set), strict=True):
        (annotations / name).write_text(json.dumps(dataset))
    config.data_dir = str(tmp_path)
    with pytest.raises(UserError, match="the category 'letter', which is not among those"):
        next(Detection(config).train_batches(0))
    assert "left out of" in (printed := capsys.readouterr().out)
    assert "image 0, annotation 1: unknown category: 77" in printed
    config.bad_annotations = "refuse"
    with pytest.raises(UserError, match="image 0, annotation 1: unknown category: 77"):
        Detection(config).train_size  # noqa: B018


def test_the_digits_are_made_when_they_are_needed(tmp_path, monkeypatch):
    def few(folder, prepare=digits_detection.prepare):
        return prepare(folder, train=3, test=2)

    monkeypatch.setattr(digits_detection, "prepare", few)
    config = digits_config.get_config()
    config.update(data_dir=str(tmp_path), batch_size=2)
    task = Detection(config)
    assert (task.train_size, task.num_classes) == (3, 10)
    assert next(task.train_batches(0))["image"].shape == (2, 128, 160, 3)
    assert next(task.eval_batches())["valid"].sum() == 2


SEVERAL_DEVICES = """
import sys
from absl import flags
flags.FLAGS(["test"])
from tests.tasks.test_detection import small_config
from vssd_jax.tasks import make_task
from vssd_jax.training.loop import train
config = small_config(sys.argv[1])
config.update(steps=4, dtype="float64", padded_shapes=((64, 96), (96, 64)))
train(make_task(config), config, sys.argv[2])
"""


@pytest.mark.slow
def test_four_devices_train_as_one(tmp_path, data_dir):
    workdirs = [tmp_path / str(devices) for devices in (1, 4)]
    for workdir in workdirs:
        count = flags_for(workdir.name)
        subprocess.run(
            [sys.executable, "-c", SEVERAL_DEVICES, data_dir, str(workdir)],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": count, "JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)},
            check=True,
        )
    one, four = (losses(workdir) for workdir in workdirs)
    assert list(one) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(four.values()), list(one.values()), rtol=0, atol=1e-6)
    one, four = (read_metrics(workdir)[-1] for workdir in workdirs)
    for name, value in one.items():
        assert four[name] == pytest.approx(value, abs=1e-6), name
