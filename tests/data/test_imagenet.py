"""A miniature imagenet2012 from generated archives, by the real builder, and as folders."""

import importlib.util
import io
import json
import pathlib
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data.pictures import jpeg
from vssd_jax.data import imagenet, prepare_imagenet
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.image_folder import ImageFolder
from vssd_jax.data.transforms import TrainTransform
from vssd_jax.errors import UserError

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


def pictures():
    """split -> {synset: {file name: bytes}}: all 1000 classes for training, 12 for validation."""
    train = {s: {f"{s}_{i}.JPEG": jpeg(i, 12, 15)} for i, s in enumerate(synsets())}
    # The builder knows the labels of the real validation set, in the order of its file names.
    known = (FACTS / "validation_labels.txt").read_text().split()
    val = {}
    for i in range(12):
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


def run_prepare(manual_dir, data_dir):
    # A process of its own: TensorFlow and Triton in one process abort it.
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "vssd_jax.data.prepare_imagenet",
            f"--manual-dir={manual_dir}",
            f"--data-dir={data_dir}",
        ],
        capture_output=True,
        text=True,
    )


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
    for split, length in (("train", 1000), ("val", 12)):
        source = pickle.loads(pickle.dumps(imagenet.open_imagenet(prepared / "data", split)))
        assert isinstance(source, imagenet.TfdsImageNet)
        folders = imagenet.open_imagenet(tmp_path, split)
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
    folder = imagenet.prepared_folder(prepared / "data")
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    result = run_prepare(prepared / "archives", prepared / "data")
    assert result.returncode == 0
    assert f"Already prepared: {folder}" in result.stdout
    assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before


def test_missing_archives_are_named(tmp_path):
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"")
    result = run_prepare(tmp_path, tmp_path / "data")
    assert result.returncode == 2
    assert "Missing in" in result.stderr
    assert "ILSVRC2012_img_train.tar" in result.stderr
    assert "ILSVRC2012_img_val.tar" not in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "data").exists()


def archives_in_name_only(folder):
    for name in prepare_imagenet.ARCHIVES:
        (folder / name).write_bytes(b"")


def test_missing_tensorflow_is_named(tmp_path, monkeypatch):
    archives_in_name_only(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tensorflow.*pip install 'vssd_jax\[imagenet\]'"):
        prepare_imagenet.prepare(tmp_path, tmp_path / "data")


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    archives_in_name_only(tmp_path)
    (tmp_path / prepare_imagenet.ARCHIVES[0]).write_bytes(b"x" * 100)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    usage = prepare_imagenet.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prepare_imagenet.shutil, "disk_usage", lambda path: usage._replace(free=50))
    with pytest.raises(UserError, match="GB free"):
        prepare_imagenet.prepare(tmp_path, tmp_path / "data")


def test_incomplete_and_foreign_datasets_are_refused(tmp_path):
    (tmp_path / "imagenet2012" / "incomplete.ABC_5.1.0").mkdir(parents=True)
    assert imagenet.prepared_folder(tmp_path) is None
    with pytest.raises(UserError, match="No prepared imagenet2012"):
        imagenet.TfdsImageNet(tmp_path, "train")
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
    assert imagenet.prepared_folder(tmp_path).name == "5.1.0"
    with pytest.raises(UserError, match="holds tfrecord files"):
        imagenet.TfdsImageNet(tmp_path, "train")
