"""A miniature imagenet2012 from generated archives, by the real builder, and as folders; training
on both."""

import importlib.util
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.conftest import FAST_COMPILATION, ROOT
from tests.data.pictures import jpeg
from tests.data.test_prepare_imagenet import run_prepare
from vssd_jax.data.classification_transforms import TrainTransform
from vssd_jax.data.datasets import imagenet2012
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.image_folder import ImageFolder
from vssd_jax.errors import UserError
from vssd_jax.training.metrics import read_metrics

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None
    or importlib.util.find_spec("importlib_resources") is None,
    reason="the real builder needs TensorFlow: pip install '.[imagenet]'",
)
FACTS = pathlib.Path(tfds.__file__).parent / "datasets" / "imagenet2012"


def synsets():
    return (FACTS / "labels.txt").read_text().split()


def test_tfds_orders_labels_by_synset():
    names = synsets()
    assert len(names) == 1000
    assert names == sorted(names)


FREQUENT, EACH = 4, 160
TRAIN, VAL = 1000 + FREQUENT * (EACH - 1), 12


def pictures():
    """split -> {synset: {file name: bytes}}: all 1000 classes for training, 12 for validation.

    In training the first four have 160 pictures each, alike but for the size: they can be learned.
    """
    train = {
        synset: {
            f"{synset}_{n}.JPEG": jpeg(label, 12 + n // 8, 15 + n % 8)
            for n in range(EACH if label < FREQUENT else 1)
        }
        for label, synset in enumerate(synsets())
    }
    # The builder knows the labels of the real validation set, in the order of its file names.
    known = (FACTS / "validation_labels.txt").read_text().split()
    val = {}
    for i in range(VAL):
        val.setdefault(known[i], {})[f"ILSVRC2012_val_{i + 1:08d}.JPEG"] = jpeg(5000 + i, 20, 16)
    return {"train": train, "val": val}


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_archives(folder):
    folder.mkdir()
    train, val = pictures().values()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset, files in train.items():
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for name, data in files.items():
                    add(inner, name, data)
            add(outer, f"{synset}.tar", buffer.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for files in val.values():
            for name, data in files.items():
                add(archive, name, data)


def write_folders(root):
    for split, classes in pictures().items():
        for synset, files in classes.items():
            (root / split / synset).mkdir(parents=True)
            for name, data in files.items():
                (root / split / synset / name).write_bytes(data)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    write_archives(root / "archives")
    result = run_prepare(root / "archives", root / "data")
    assert result.returncode == 0, result.stderr
    return root


def read(source, indices):
    """One batch of training pictures, a generator per picture."""
    decoded = DecodedSource(source)
    transform = TrainTransform(image_size=16)
    examples = [transform(decoded[i], np.random.default_rng(n)) for n, i in enumerate(indices)]
    return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


@needs_tensorflow
def test_folders_and_archives_give_equal_batches(prepared, tmp_path):
    write_folders(tmp_path)
    for split, length in (("train", TRAIN), ("val", VAL)):
        source = pickle.loads(pickle.dumps(imagenet2012.open_imagenet(prepared / "data", split)))
        assert isinstance(source, imagenet2012.TfdsImageNet)
        folders = imagenet2012.open_imagenet(tmp_path, split)
        assert isinstance(folders, ImageFolder)
        assert len(source) == len(folders) == length
        # The builder shuffles: find each of its pictures among the folders by its bytes.
        position = {folders[i]["image"]: i for i in range(length)}
        assert len(position) == length
        order = [position[source[i]["image"]] for i in range(length)]
        assert sorted(order) == list(range(length))
        batch, expected = read(source, range(length)), read(folders, order)
        assert set(batch) == {"image", "label", "replaced", "erase"}
        for key in batch:
            np.testing.assert_array_equal(batch[key], expected[key])
        assert batch["replaced"].sum() == 0
    assert "tensorflow" not in sys.modules


@needs_tensorflow
def test_preparing_twice_changes_nothing(prepared):
    folder = imagenet2012.prepared_folder(prepared / "data")
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    result = run_prepare(prepared / "archives", prepared / "data")
    assert result.returncode == 0
    assert f"Already prepared: {folder}" in result.stdout
    assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before


CONFIG = """
from configs.tiny import get_config as tiny

def get_config():
    config = tiny("mesa")
    config.model_options = dict(
        embed_dim=8, depths=(1, 0, 0, 1), num_heads=(1, 1, 2, 2), d_state=8, drop_path=0.1,
        stem="patch", downsample="patch",  # compile fast
    )
    config.update(
        dtype="float32", image_size=32, num_workers=1, batch_size=64, eval_batch_size=8, steps=30,
        learning_rate=0.08, warmup_epochs=0.5, ema_decay=0.9, mesa_start_epoch=1,
        eval_every_epochs=2, log_every_steps=1,
    )
    return config
"""


def run_train(folder, workdir, data_dir, *options):
    (folder / "miniature.py").write_text(CONFIG)
    return subprocess.run(
        [
            sys.executable,
            "train.py",
            f"--config={folder / 'miniature.py'}",
            f"--workdir={workdir}",
            f"--config.data_dir={data_dir}",
            *options,
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": FAST_COMPILATION,
        },
        capture_output=True,
        text=True,
    )


def check_run(result, workdir):
    assert result.returncode == 0, result.stderr
    lines = read_metrics(workdir)
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 31))
    epoch = TRAIN // 64
    assert steps[epoch - 1]["train/mesa"] == 0 < steps[epoch]["train/mesa"]
    # Without MESA's share: from a uniform guess to more than the classes' frequencies.
    own = [line["train/loss"] - line["train/mesa"] for line in steps]
    assert np.mean(own[:3]) == pytest.approx(np.log(1000), abs=0.2)
    assert np.mean(own[-5:]) < np.mean(own[:3]) - 0.2
    return steps, lines[-1]


@pytest.fixture(scope="module")
def run_on_folders(tmp_path_factory):
    """A run on folders with damaged pictures, 13 of 1636 for training and one for evaluation."""
    root = tmp_path_factory.mktemp("folders")
    write_folders(root)
    files = sorted((root / "train" / synsets()[0]).iterdir())[:13]
    files.append(next((root / "val").glob("*/*")))
    for file in files:
        file.write_bytes(file.read_bytes()[:-50])
    result = run_train(root, root / "run", root, "--config.max_unreadable=0.2")
    return root, result


def test_training_on_folders(run_on_folders):
    root, result = run_on_folders
    steps, evaluation = check_run(result, root / "run")
    unreadable = [line["train/unreadable"] for line in steps]
    assert np.mean(unreadable) == pytest.approx(13 / TRAIN, rel=0.6)
    assert evaluation["val/unreadable"] == pytest.approx(1 / VAL)


@pytest.mark.slow
def test_fine_tuning_and_too_many_unreadable(run_on_folders):
    """At another size and number of classes, in micro-batches, with remat, from decoded pictures,
    until the first unreadable picture, where no share of them is accepted."""
    root, _ = run_on_folders
    result = run_train(
        root,
        root / "tuned",
        root,
        f"--config.init_from={root / 'run'}",
        "--config.num_classes=1003",
        "--config.image_size=40",
        "--config.accumulate=2",
        "--config.remat=True",
        f"--config.cache_decoded={root / 'cache'}",
        "--config.max_unreadable=0",
    )
    assert result.returncode == 2, result.stderr
    assert "has 1000 classes: the classifier starts fresh" in result.stdout
    assert "are unreadable, more than config.max_unreadable=0.0%" in result.stderr
    assert "Traceback" not in result.stderr
    assert (root / "cache" / "cache.json").exists()
    lines = read_metrics(root / "tuned")
    assert [line["train/unreadable"] > 0 for line in lines] == [False] * (len(lines) - 1) + [True]


@needs_tensorflow
def test_training_on_what_the_builder_makes(prepared):
    result = run_train(prepared, prepared / "run", prepared / "data")
    _, evaluation = check_run(result, prepared / "run")
    assert evaluation["val/unreadable"] == 0


def test_incomplete_and_foreign_datasets_are_refused(tmp_path):
    (tmp_path / "imagenet2012" / "incomplete.ABC_5.1.0").mkdir(parents=True)
    assert imagenet2012.prepared_folder(tmp_path) is None
    with pytest.raises(UserError, match="No prepared imagenet2012"):
        imagenet2012.TfdsImageNet(tmp_path, "train")
    for version in ("5.1.0", "5.0.0"):
        folder = tmp_path / "imagenet2012" / version
        folder.mkdir()
        (folder / "features.json").write_text(
            json.dumps(
                {
                    "pythonClassName": "tensorflow_datasets.core.features.features_dict."
                    "FeaturesDict",
                    "featuresDict": {"features": {}},
                }
            )
        )
        description = {"name": "imagenet2012", "version": version, "fileFormat": "tfrecord"}
        (folder / "dataset_info.json").write_text(json.dumps(description))
    assert imagenet2012.prepared_folder(tmp_path).name == "5.1.0"
    with pytest.raises(UserError, match="holds tfrecord files"):
        imagenet2012.TfdsImageNet(tmp_path, "train")
