import pickle

import numpy as np
import pytest

from tests.data.pictures import jpeg
from vssd_jax.data.datasets.imagenet2012 import open_imagenet
from vssd_jax.data.image_folder import ImageFolder
from vssd_jax.errors import UserError


def write(root, *paths):
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())


def contents(source):
    return [(source[i]["image"].decode(), int(source[i]["label"])) for i in range(len(source))]


def test_order_and_labels(tmp_path):
    write(
        tmp_path,
        "train/n02/b.JPEG",
        "train/n02/deep/er/c.JPEG",
        "train/n02/.cache/d.JPEG",
        "train/n02/a.jpeg",
        "train/n01/z.png",
        "train/n10/ä.JPG",
        "train/n01/notes.txt",
        "train/n01/.hidden.jpg",
        "train/.cache/x.jpg",
        "train/readme.jpg",
        "val/n02/v.JPEG",
        "val/n10/v.JPEG",
    )
    source = ImageFolder(tmp_path / "train")
    assert contents(source) == [
        ("train/n01/z.png", 0),
        ("train/n02/a.jpeg", 1),
        ("train/n02/b.JPEG", 1),
        ("train/n02/deep/er/c.JPEG", 1),
        ("train/n10/ä.JPG", 2),
    ]
    assert source.class_names == ["n01", "n02", "n10"]
    # n01 is absent from val: the labels stay those of train.
    validation = pickle.loads(pickle.dumps(open_imagenet(tmp_path, "val")))
    assert contents(validation) == [("val/n02/v.JPEG", 1), ("val/n10/v.JPEG", 2)]
    assert [int(source[np.int64(i)]["label"]) for i in (4, 0)] == [2, 0]


def test_val_alone_numbers_its_own_classes(tmp_path):
    write(tmp_path, "val/b/v.JPEG", "val/a/v.JPEG")
    assert contents(ImageFolder(tmp_path / "val")) == [("val/a/v.JPEG", 0), ("val/b/v.JPEG", 1)]


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(UserError, match=r"No ImageNet in .*nowhere"):
        open_imagenet(tmp_path / "nowhere", "train")
    write(tmp_path, "train/n01/a.jpg", "train/n02/notes.txt")
    with pytest.raises(UserError, match=r"No pictures in 1 class folder.*n02"):
        open_imagenet(tmp_path, "train")
    with pytest.raises(UserError, match=r"No such folder: .*val"):
        open_imagenet(tmp_path, "val")
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=r"No class folders in .*val"):
        open_imagenet(tmp_path, "val")
    write(tmp_path, "val/n01/a.jpg", "val/n77/a.jpg")
    with pytest.raises(UserError, match=r"classes that are not among those for training: n77"):
        open_imagenet(tmp_path, "val")


def test_a_real_picture_passes_through(tmp_path):
    (tmp_path / "train" / "n01").mkdir(parents=True)
    (tmp_path / "train" / "n01" / "a.JPEG").write_bytes(jpeg(0))
    assert ImageFolder(tmp_path / "train")[0]["image"] == jpeg(0)
