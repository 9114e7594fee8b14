"""The predictor and its files, against the evaluation of the same weights."""

import csv
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image
from pycocotools.coco import COCO

import vssd_jax
from tests.conftest import ROOT
from tests.tasks import test_detection, test_segmentation
from vssd_jax import UserError
from vssd_jax.config import classification_config
from vssd_jax.inference.evaluation import evaluate_weights
from vssd_jax.inference.predict_files import find_pictures, predict_files
from vssd_jax.models import family
from vssd_jax.models.split import SplitModel
from vssd_jax.tasks import make_task
from vssd_jax.weights.folder import Weights, write_folder

NAMES = ("ant", "bee", "дом")
SMALL = {
    "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "d_state": 4,
    "mixers": ("ncssd", "attention", "attention", "attention"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tests"])  # Grain reads absl flags


def save_weights(config, folder, seed=3):
    """Writes fresh weights of the config's model, as a run would be converted."""
    task = make_task(config)
    params, statistics = SplitModel(task.build).init(jax.random.key(seed))
    arrays = {name: np.asarray(value) for name, value in {**params, **statistics}.items()}
    options = dict(config.model_options.to_dict())
    names = list(task.class_names)
    write_folder(
        folder,
        Weights(config.model, task.num_classes, options, arrays, names, task.preprocessing),
    )
    return task


def picture(rng, height, width):
    coarse = rng.integers(0, 255, (-(-height // 8), -(-width // 8), 3))
    return np.kron(coarse, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Pictures of many sizes in class folders, and weights."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for name in NAMES:
        for number in range(7):
            path = root / "data" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = rng.integers(20, 90, 2)
            exif = Image.Exif()
            exif[0x0112] = 6 if number == 3 else 1
            Image.fromarray(picture(rng, *size)).save(path, exif=exif)
    config = classification_config()
    config.update(
        model="vssd_nano", dataset="folder", data_dir=str(root / "data"), image_size=32,
        eval_crop=0.9, eval_batch_size=8, batch_size=4,
    )  # fmt: skip
    config.model_options = SMALL
    save_weights(config, root / "weights")
    return config, root


def test_classes_and_scores_are_those_of_the_evaluation(classifier):
    config, root = classifier
    results = evaluate_weights(config, root / "weights")
    source = make_task(config).source("val")
    predictor = vssd_jax.load_predictor(root / "weights", batch_size=8, top=2)
    assert (predictor.task, predictor.class_names) == ("classification", list(NAMES))
    files = [root / "data" / os.fsdecode(name) for name in source.names]
    found = predictor(files)
    right = [r.labels[0] == label for r, label in zip(found, source.labels, strict=True)]
    assert np.mean(right) == results["val/top1"]
    losses = [-np.log(r.probabilities[i]) for r, i in zip(found, source.labels, strict=True)]
    assert np.mean(losses) == pytest.approx(results["val/loss"], rel=1e-5)
    for result in found:
        assert result.scores == sorted(result.scores, reverse=True)
        assert result.names == [NAMES[label] for label in result.labels]
        assert len(result.names) == 2


def test_files_pictures_and_arrays_give_the_same(classifier):
    _, root = classifier
    predictor = vssd_jax.load_predictor(root / "weights")
    file = root / "data/ant/3.png"  # upright only by its EXIF
    turned = np.rot90(np.asarray(Image.open(file)), -1)
    one, two, three, four = (
        predictor(file), predictor(Image.open(file)), predictor(turned), predictor([str(file)])[0],
    )  # fmt: skip
    for other in (two, three, four):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
    grey = np.full((9, 12), 7, np.uint8)
    np.testing.assert_array_equal(
        predictor(grey).probabilities, predictor(np.stack([grey] * 3, -1)).probabilities
    )


def test_what_is_no_picture_is_said(classifier, tmp_path, capsys):
    _, root = classifier
    predictor = vssd_jax.load_predictor(root / "weights")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.jpg cannot be read: no known picture format"):
        predictor(broken)
    results = predictor([broken, root / "data/ant/1.png", tmp_path / "missing.png"])
    assert [r is None for r in results] == [True, False, True]
    said = capsys.readouterr().out
    assert "broken.jpg cannot be read" in said
    assert "missing.png cannot be read: No such file" in said
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 3), np.uint8)):
        with pytest.raises(UserError, match="a picture "):
            predictor(wrong)
    assert predictor([]) == []


def test_eight_devices_give_the_same(classifier, tmp_path):
    _, root = classifier
    files = sorted(map(str, (root / "data").rglob("*.png")))
    expected = [r.probabilities for r in vssd_jax.load_predictor(root / "weights")(files)]
    program = (
        "import sys, numpy, vssd_jax\n"
        "found = vssd_jax.load_predictor(sys.argv[1], batch_size=9)(sys.argv[3:])\n"
        "numpy.save(sys.argv[2], [r.probabilities for r in found])"
    )
    flag = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"}
    subprocess.run(
        [sys.executable, "-c", program, root / "weights", tmp_path / "p.npy", *files],
        check=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), expected, rtol=1e-5, atol=1e-6)


def test_classification_writes_lines_a_table_and_a_sheet(classifier, tmp_path, capsys):
    _, root = classifier
    photos = tmp_path / "photos"
    for number, path in enumerate(sorted((root / "data").rglob("*.png"))):
        place = photos / ("a" if number % 2 else "b/c") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    (photos / "broken.jpg").write_bytes(b"nothing")
    (photos / "notes.txt").touch()
    out = photos / "predictions"  # inside: its pictures are no input
    numbers = predict_files(root / "weights", str(photos), out)
    assert (numbers["pictures"], numbers["unreadable"]) == (21, 1)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 22
    assert [line["file"] for line in lines if "error" in line] == ["broken.jpg"]
    with open(out / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows)
    by_file = {line["file"]: line for line in lines}
    for row in rows:
        assert row["name1"] == by_file[row["file"]]["predictions"][0]["name"]
    with Image.open(out / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 500
    said = capsys.readouterr().out
    assert "1 x .txt" in said
    assert "1 of 22 pictures cannot be read" in said

    with pytest.raises(UserError, match="--skip-existing goes on with it"):
        predict_files(root / "weights", str(photos), out)
    # A run that was ended in the middle of a line goes on to the same result.
    table = (out / "predictions.csv").read_text()
    text = (out / "predictions.jsonl").read_text().splitlines(keepends=True)
    (out / "predictions.jsonl").write_text("".join(text[:9]) + text[9][:20])
    (out / "predictions.csv").unlink()
    numbers = predict_files(root / "weights", str(photos), out, skip_existing=True)
    assert (numbers["pictures"], numbers["skipped"], numbers["unreadable"]) == (13, 8, 1)
    assert (out / "predictions.csv").read_text() == table


def test_inputs_are_files_folders_and_patterns(tmp_path):
    for name in ("a/1.jpg", "a/b/2.PNG", "a/.hidden/3.jpg", "c/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    out = tmp_path / "out"
    assert find_pictures(str(tmp_path), out) == (tmp_path, ["a/1.jpg", "a/b/2.PNG", "c/4.jpg"])
    assert find_pictures(str(tmp_path / "a/1.jpg"), out) == (tmp_path / "a", ["1.jpg"])
    assert find_pictures(f"{tmp_path}/*/[14].jpg", out) == (tmp_path, ["a/1.jpg", "c/4.jpg"])
    assert find_pictures(f"{tmp_path}/**/*.jpg", out)[1] == ["a/1.jpg", "c/4.jpg"]
    assert find_pictures(f"{tmp_path}/**/*.jpg", tmp_path / "c")[1] == ["a/1.jpg"]
    for wrong in ("nowhere", "*.gif", "out/empty"):
        (tmp_path / "out/empty").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match=r"there is no file or folder|has no pictures"):
            find_pictures(str(tmp_path / wrong), out)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    root = tmp_path_factory.mktemp("boxes")
    test_detection.digits_detection.prepare(root, train=3, test=5)
    config = test_detection.small_config(str(root))
    config.dataset = "digits_detection"
    scenes = next(root.glob("digits_detection_*"))
    config.update(
        dataset="coco", train_images=str(scenes / "train"), val_images=str(scenes / "test"),
        train_annotations=str(scenes / "annotations/instances_train.json"),
        val_annotations=str(scenes / "annotations/instances_test.json"),
        padded_shapes=((64, 96), (96, 64)), short_sides=(64,), long_side=96, eval_batch_size=2,
    )  # fmt: skip
    for path in sorted((scenes / "test").iterdir())[::2]:  # some upright, with their JSON
        Image.open(path).transpose(Image.Transpose.TRANSPOSE).save(path)
    annotations = scenes / "annotations/instances_test.json"
    data = json.loads(annotations.read_text())
    for image in data["images"][::2]:
        image["height"], image["width"] = image["width"], image["height"]
    odd = {image["id"] for image in data["images"][::2]}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] not in odd]
    annotations.write_text(json.dumps(data))
    save_weights(config, root / "weights")
    return config, root, scenes / "test"


def test_objects_are_those_of_the_evaluation(detector, tmp_path):
    config, root, photos = detector
    evaluate_weights(config, root / "weights", save_predictions=tmp_path / "eval")
    boxes, masks = (json.loads((tmp_path / f"eval/{k}.json").read_text()) for k in ("bbox", "segm"))
    out = tmp_path / "out"
    numbers = predict_files(root / "weights", str(photos), out, draw_score=0.0, batch_size=2)
    assert numbers["pictures"] == 5
    images = COCO(out / "coco_images.json")
    results = json.loads((out / "coco_results.json").read_text())
    assert len(images.loadRes(results).anns) == len(results) > 5
    file_of = {number: image["file_name"] for number, image in images.imgs.items()}
    for number, file in file_of.items():
        got = [r for r in results if r["image_id"] == number]
        expected = [r for r in boxes if f"{r['image_id']:06d}.png" == file and r["score"] >= 0.05]
        codes = [r for r in masks if f"{r['image_id']:06d}.png" == file and r["score"] >= 0.05]
        assert [r["category_id"] for r in got] == [r["category_id"] for r in expected]
        np.testing.assert_allclose(
            [r["bbox"] for r in got], [r["bbox"] for r in expected], rtol=1e-4, atol=1e-3
        )
        np.testing.assert_allclose(
            [r["score"] for r in got], [r["score"] for r in expected], rtol=1e-5
        )
        assert len(codes) == len(got)
        with Image.open(out / "pictures" / f"{file[:-4]}.jpg") as drawn:
            assert min(drawn.size) >= 128


def test_a_detector_of_boxes_has_no_masks(detector, tmp_path):
    _, root, photos = detector
    path = tmp_path / "weights"
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        (path / name).write_bytes((root / "weights" / name).read_bytes())
    fields = json.loads((path / "config.json").read_text())
    fields["preprocessing"]["boxes_only"] = True
    (path / "config.json").write_text(json.dumps(fields))
    result = vssd_jax.load_predictor(path)(next(photos.iterdir()))
    assert result.masks is None
    assert len(result.boxes) == len(result.labels) > 0
    whole = vssd_jax.load_predictor(root / "weights")(next(photos.iterdir()))
    assert whole.masks.shape[1:] == whole.size
    np.testing.assert_allclose(whole.boxes, result.boxes, rtol=1e-5)


@pytest.mark.parametrize("zero_is_class", [False, True])
def test_label_maps_are_those_of_the_evaluation(tmp_path, zero_is_class):
    data = tmp_path / "data"
    sizes = [(40, 56), (56, 40), (40, 56), (80, 48)]
    for split in ("training", "validation"):
        test_segmentation.write_pairs(data, split, sizes)
    changes = {"eval_batch_size": 2}
    if zero_is_class:
        changes |= {"dataset": "label_maps", "class_names": "a,b,c,d"}
    config = test_segmentation.small_config(data, **changes)
    task = save_weights(config, tmp_path / "weights", seed=5)
    assert task.preprocessing["reduce_zero_label"] == (not zero_is_class)
    evaluate_weights(config, tmp_path / "weights", save_predictions=tmp_path / "eval")
    out = tmp_path / "out"
    predict_files(tmp_path / "weights", str(data / "images/validation"), out)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == len(sizes)
    classes = set()
    for line in lines:
        name = line["label_map"]
        got, expected = (np.asarray(Image.open(path / name)) for path in (out, tmp_path / "eval"))
        assert got.shape == expected.shape
        assert (got != expected).mean() < 1e-3
        assert sum(line["shares"].values()) == pytest.approx(1)
        assert (out / "overlays" / f"{name[7:]}").is_file()
        classes |= set(np.unique(got))
    assert len(classes) > 1


def test_weights_say_what_they_lack(classifier, tmp_path, capsys):
    _, root = classifier
    path = tmp_path / "weights"
    path.mkdir()
    (path / "model.safetensors").write_bytes((root / "weights/model.safetensors").read_bytes())
    fields = json.loads((root / "weights/config.json").read_text())

    def load(**changes):
        (path / "config.json").write_text(json.dumps(fields | changes))
        return vssd_jax.load_predictor(path)

    predictor = load(class_names=None, preprocessing={})
    assert "does not name its classes: they are numbered" in capsys.readouterr().out
    assert predictor.class_names == ["class 0", "class 1", "class 2"]
    assert predictor.preprocessing["image_size"] == 224
    old = {key: value for key, value in fields.items() if key not in ("preprocessing", "task")}
    (path / "config.json").write_text(json.dumps(old))
    assert vssd_jax.load_predictor(path).preprocessing["eval_crop"] == 0.875
    for changes, message in (
        ({"preprocessing": {"image_size": "x"}}, "preprocessing.image_size='x' must be"),
        ({"preprocessing": {"size": 3}}, "preprocessing has no field 'size'"),
        ({"preprocessing": {"std": [0, 1, 1]}}, "preprocessing.std"),
        ({"preprocessing": 3}, "preprocessing is no object"),
    ):
        with pytest.raises(UserError, match=message):
            load(**changes)


def test_the_command(classifier, tmp_path):
    _, root = classifier

    cache = tmp_path / "cache"
    environment = os.environ | {"VSSD_JAX_CACHE": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # however fast the machine

    def run(*args):
        return subprocess.run(
            [sys.executable, "predict.py", *args],
            cwd=ROOT, env=environment, text=True, capture_output=True,
        )  # fmt: skip

    given = ("--weights", root / "weights", "--input", root / "data", "--output", tmp_path / "o")
    done = run(*given, "--top=1", "--batch-size=4")
    assert done.returncode == 0, done.stderr
    assert "21 pictures predicted" in done.stdout
    assert any("forward" in path.name for path in cache.rglob("*-cache"))
    for wrong, message in (
        (given, "--skip-existing goes on with it"),
        (given[:4], "--weights, --input and --output are needed"),
        ((*given[:2], "--input=/nowhere", "--output=o"), "there is no file or folder /nowhere"),
        ((*given, "--min-score=3"), "--min_score=3.0 must be from 0 to 1"),
    ):
        failed = run(*wrong)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1


def test_tasks_are_told_from_the_models():
    tasks = {name: family.task_of(name) for name in vssd_jax.list_models()}
    assert tasks["vssd_tiny"] == "classification"
    assert tasks["mask_rcnn_vssd_tiny"] == "detection"
    assert tasks["upernet_vssd_tiny"] == "segmentation"
