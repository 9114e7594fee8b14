"""Pictures and label maps of one's own, in any of the usual layouts of `config.data_dir`.

    images/{train,val}/*       with annotations/, labels/ or masks/ of the same form
    {train,val}/images/*       the same the other way round
    images/*                   with annotations/*, labels/* or masks/*: a share is set aside
    JPEGImages/*               with SegmentationClass/* and ImageSets/Segmentation/{train,val}.txt
    leftImg8bit/{train,val}/*  with gtFine/{train,val}/*_labelTrainIds.png

The first is ADE20K's, the last two are those of Pascal VOC and Cityscapes. Other folders are named
by `config.train_images`, `train_labels`, `val_images` and `val_labels`.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from vssd_jax import known_classes
from vssd_jax.data.label_maps import LabelMaps, greatest_label, open_folders
from vssd_jax.data.registry import Dataset
from vssd_jax.data.splits import say_set_aside, set_aside
from vssd_jax.errors import UserError

FIELDS = (
    "class_names", "train_images", "train_labels", "val_images", "val_labels", "image_suffix",
    "label_suffix", "reduce_zero_label", "ignore_label",
)  # fmt: skip
LABELS = ("annotations", "labels", "masks")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}


def open_label_maps(
    config: ml_collections.ConfigDict,
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    reduce_zero_label: bool = False,
) -> LabelMaps:
    """The pairs of "train" or "val".

    Args:
      config: its `FIELDS`, where they are given, go before the layout.
      split: "train" or "val".
      class_names, reduce_zero_label: where the config does not say them.

    Raises:
      UserError: no known layout, no names of classes, or missing pairs.
    """
    root = pathlib.Path(config.data_dir)
    images, labels, found_names, only, aside = _locate(config, root, split)
    names: Sequence[str] = known_classes.parse(config.class_names) or class_names or found_names
    if config.reduce_zero_label is not None:
        reduce_zero_label = config.reduce_zero_label
    options: dict[str, Any] = {
        "image_suffix": config.image_suffix,
        "label_suffix": config.label_suffix,
        "only": only,
        "reduce_zero_label": reduce_zero_label,
        "ignore_label": config.ignore_label,
        "max_pixels": config.max_pixels,
    }
    source = open_folders(images, labels, class_names=names, **options)
    if not names:
        greatest = greatest_label(source, ignore_label=config.ignore_label)
        first = 1 if reduce_zero_label else 0
        raise UserError(
            f"config.class_names is missing: give the names of the labels {first} to {greatest} of "
            f"{labels}, separated by commas, or a text file with a name a line"
        )
    if aside:
        chosen = set_aside(source.image_names, config.validation_share, config.seed)
        if split == "val":
            say_set_aside(root, chosen, config.validation_share)
        source.keep(chosen if split == "val" else ~chosen)
        if not len(source):
            raise UserError(f"{root} has too few pictures to set some aside for validation")
    return source


Located = tuple[
    pathlib.Path, pathlib.Path, tuple[str, ...], "list[str] | None", bool
]  # pictures, label maps, names of the classes, names of the pairs, whether to set some aside


def _locate(config: ml_collections.ConfigDict, root: pathlib.Path, split: str) -> Located:
    if config.train_images or config.train_labels:
        return _given(config, root, split)
    if config.val_images or config.val_labels:
        raise UserError("config.val_images and val_labels need train_images and train_labels")
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; config.data_dir holds pictures and label maps")
    for voc in (root, *sorted(root.glob("VOCdevkit/VOC*")), *sorted(root.glob("VOC*"))):
        if (voc / "SegmentationClass").is_dir() and (voc / "JPEGImages").is_dir():
            folders = voc / "JPEGImages", voc / "SegmentationClass"
            return *folders, known_classes.read("voc"), _list(voc, split), False
    if (root / "leftImg8bit").is_dir():
        names = known_classes.read("cityscapes")
        return root / "leftImg8bit" / split, root / "gtFine" / split, names, None, False
    for labels in LABELS:
        if (root / "images").is_dir() and (root / labels).is_dir():
            for part in SPLITS[split]:
                if (root / "images" / part).is_dir():
                    return root / "images" / part, root / labels / part, (), None, False
            aside = not any((root / "images" / part).is_dir() for part in SPLITS["val"])
            inside = [p for p in SPLITS["train"] if (root / "images" / p).is_dir()]
            if aside and inside:
                return root / "images" / inside[0], root / labels / inside[0], (), None, True
            if aside:
                return root / "images", root / labels, (), None, True
    for part in SPLITS[split]:
        for labels in LABELS:
            if (root / part / "images").is_dir() and (root / part / labels).is_dir():
                # Without a second part, the first is divided.
                alone = not any((root / p / "images").is_dir() for p in SPLITS["val"])
                return root / part / "images", root / part / labels, (), None, alone
    for part in SPLITS["train"] if split == "val" else ():
        for labels in LABELS:
            if (root / part / "images").is_dir() and (root / part / labels).is_dir():
                return root / part / "images", root / part / labels, (), None, True
    there = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise UserError(
        f"no known layout of pictures and label maps in {root} (there: {there}): expected images/ "
        f"with {', '.join(LABELS[:-1])} or {LABELS[-1]}/, JPEGImages/ with SegmentationClass/, or "
        "leftImg8bit/ with gtFine/; or give config.train_images, train_labels, val_images and "
        "val_labels"
    )


def _given(config: ml_collections.ConfigDict, root: pathlib.Path, split: str) -> Located:
    folders = {}
    for name in ("train_images", "train_labels", "val_images", "val_labels"):
        folders[name] = None if config[name] is None else root / config[name]
    for name in ("train", "val"):
        if (folders[f"{name}_images"] is None) != (folders[f"{name}_labels"] is None):
            raise UserError(f"config.{name}_images and config.{name}_labels belong together")
    aside = folders["val_images"] is None
    source = "train" if aside else split
    images, labels = folders[f"{source}_images"], folders[f"{source}_labels"]
    if images is None or labels is None:
        raise UserError(f"config.{source}_images and config.{source}_labels are missing")
    return images, labels, (), None, aside


def _list(voc: pathlib.Path, split: str) -> list[str]:
    """The names in Pascal VOC's list of a split."""
    path = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: it should list the pictures of {split}") from error


def open_split(config: ml_collections.ConfigDict, split: str) -> LabelMaps:
    """The pairs of "train" or "val" in `config.data_dir`."""
    return open_label_maps(config, split)


DATASET = Dataset("label_maps", "segmentation", open_split, fields=FIELDS)
