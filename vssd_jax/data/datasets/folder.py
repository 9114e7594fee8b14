"""Pictures of one's own for classification, in a folder per class.

    DATA_DIR/{train,val}/<class>/*.jpg    the second may be called valid, validation or test
    DATA_DIR/<class>/*.jpg                a share of each class is set aside for validation

Pictures may lie in sub-folders of their class. A `train` folder without a second one is divided in
the same way (`config.validation_share`, `config.seed`).
"""

import pathlib

import ml_collections

from vssd_jax.data.image_folder import ImageFolder, class_folders
from vssd_jax.data.registry import Dataset
from vssd_jax.data.splits import say_set_aside, set_aside
from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.known_classes import parse

TRAIN, VALIDATION = ("train", "training"), ("val", "valid", "validation", "test")


def _first(root: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def open_split(config: ml_collections.ConfigDict, split: str) -> ImageFolder:
    """The pictures of "train" or "val" in `config.data_dir`.

    Raises:
      UserError: no such folder, or what `ImageFolder` raises.
    """
    root = pathlib.Path(config.data_dir)
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; config.data_dir holds train/<class>/ and val/<class>/, or "
            "<class>/ alone"
        )
    train, validation = _first(root, TRAIN), _first(root, VALIDATION)
    if train is None and validation is None:
        train = root
    chosen = parse(config.class_names)
    classes = chosen or class_folders(train if train is not None else str(validation))
    if chosen:
        there = class_folders(train if train is not None else str(validation))
        for name in chosen:
            if name not in there:
                near = did_you_mean(name, there)
                raise UserError(f"config.class_names: {root} has no class {name!r}{near}")
    wanted = {"train": train, "val": validation}[split]
    if wanted is not None and validation is not None:
        return ImageFolder(wanted, classes, subset=bool(chosen), oriented=True)
    if train is None:
        raise UserError(f"{root} has no folder train; only {validation} is there")
    source = ImageFolder(train, classes, subset=bool(chosen), oriented=True)
    aside = set_aside(source.names, config.validation_share, config.seed, source.labels.tolist())
    if split == "val":
        say_set_aside(root, aside, config.validation_share)
    source.keep(aside if split == "val" else ~aside)
    if not len(source):
        raise UserError(f"{root} has too few pictures to set some aside for validation")
    return source


DATASET = Dataset("folder", "classification", open_split, fields=("class_names",))
