"""Pictures of one's own in a folder per class."""

import pytest

from tests.data.pictures import jpeg
from vssd_jax import UserError
from vssd_jax.config import classification_config
from vssd_jax.data.datasets import folder


def write(root, parts, classes=("cat", "dog"), count=5):
    for part in parts:
        for name in classes:
            for number in range(count):
                path = root / part / name / f"sub{number % 2}" / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg(number))
    config = classification_config()
    config.dataset, config.data_dir = "folder", str(root)
    return config


@pytest.mark.parametrize("part", ["val", "valid", "validation", "test"])
def test_parts_have_the_usual_names(tmp_path, part):
    config = write(tmp_path, ["train"], count=3)
    write(tmp_path, [part], classes=["dog"], count=2)
    train, val = (folder.open_split(config, split) for split in ("train", "val"))
    assert train.class_names == val.class_names == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert val.labels.tolist() == [1, 1]


@pytest.mark.parametrize("parts", [["."], ["train"]])
def test_a_share_of_each_class_is_set_aside(tmp_path, parts, capfd):
    config = write(tmp_path, parts)
    train, val = (folder.open_split(config, split) for split in ("train", "val"))
    assert sorted(train.names + val.names) == sorted(
        f"{c}/sub{n % 2}/{n}.jpg".encode() for c in ("cat", "dog") for n in range(5)
    )
    assert val.labels.tolist() == [0, 1]
    assert "2 of 10 pictures are set aside" in capfd.readouterr().out
    assert folder.open_split(config, "val").names == val.names
    config.validation_share = 0.5
    assert set(val.names) < set(folder.open_split(config, "val").names)


def test_classes_are_chosen_and_ordered(tmp_path):
    config = write(tmp_path, ["train", "val"], classes=("ant", "bee", "cat"), count=1)
    config.class_names = "cat, ant"
    source = folder.open_split(config, "val")
    assert source.class_names == ["cat", "ant"]
    assert source.labels.tolist() == [1, 0]
    assert "1 other classes (bee)" in source.describe_problems()
    config.class_names = "cat,aunt"
    with pytest.raises(UserError, match="has no class 'aunt'; did you mean 'ant'"):
        folder.open_split(config, "val")


def test_what_is_wrong_is_said(tmp_path):
    config = classification_config()
    config.dataset, config.data_dir = "folder", str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there is no folder"):
        folder.open_split(config, "train")
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(UserError, match="No class folders"):
        folder.open_split(config, "train")
    config = write(tmp_path / "one", ["."], count=1)
    with pytest.raises(UserError, match="too few pictures"):
        folder.open_split(config, "val")
    config = write(tmp_path / "val_only", ["val"])
    with pytest.raises(UserError, match="has no folder train"):
        folder.open_split(config, "train")
