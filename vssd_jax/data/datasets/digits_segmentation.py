"""Scenes of hand-written digits in the folder layout of ADE20K.

The classes are the background, with its clutter of lines, rings and discs, and the ten digits.
"""

import os
import pathlib
import shutil

import ml_collections
import numpy as np
from PIL import Image

from vssd_jax.data import scenes
from vssd_jax.data.label_maps import LabelMaps, open_folders
from vssd_jax.data.registry import Dataset
from vssd_jax.errors import UserError

CLASSES = ("background", *map(str, range(scenes.NUM_CLASSES)))
SIZES = {"training": 2000, "validation": 200}

_VERSION = 1  # of the scenes: a new number lets `prepare` make them anew
_HANDWRITING = {"training": "train", "validation": "test"}


def write(root: str | os.PathLike, *, sizes: dict[str, int] = SIZES, seed: int = 0) -> None:
    """Writes the scenes of all splits into a new folder, which appears only when complete.

    Args:
      root: the folder to make.
      sizes: number of scenes per split, "training" and "validation".
      seed: the same seed and sizes make the same files.

    Raises:
      UserError: the folder exists or cannot be written.
    """
    root = pathlib.Path(root)
    part = root.with_name(f"{root.name}.part-{os.getpid()}")
    if root.exists():
        raise UserError(f"{root} exists; remove it or choose another folder")
    try:
        for number, split in enumerate(("training", "validation")):
            folders = [part / kind / split for kind in ("images", "annotations")]
            for folder in folders:
                folder.mkdir(parents=True)
            for index in range(sizes[split]):
                rng = np.random.default_rng((seed, number, index))
                image, instances = scenes.make_scene(
                    rng,
                    size=(64, 64),
                    num_digits=(1, 2),
                    digit_size=(36, 52),
                    min_visible=0.8,
                    clutter=4,
                    split=_HANDWRITING[split],
                )
                label = np.ones(image.shape[:2], np.uint8)
                for instance in instances:
                    label[instance.mask] = instance.label + 2
                name = f"scene_{index:05d}"
                Image.fromarray(image).save(folders[0] / f"{name}.jpg", quality=95)
                Image.fromarray(label).save(folders[1] / f"{name}.png")
        os.rename(part, root)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def prepare(data_dir: str | os.PathLike) -> pathlib.Path:
    """The folder of the scenes in `data_dir`, written at the first call."""
    folder = pathlib.Path(data_dir) / f"digits_segmentation_{_VERSION}"
    if not folder.exists():
        try:
            write(folder)
        except UserError:
            if not folder.exists():  # or else another process was first
                raise
    return folder


def open_split(config: ml_collections.ConfigDict, split: str) -> LabelMaps:
    """The scenes of "train" or "val" in `config.data_dir`, written at the first call."""
    root, part = prepare(config.data_dir), {"train": "training", "val": "validation"}[split]
    return open_folders(
        root / "images" / part,
        root / "annotations" / part,
        class_names=CLASSES,
        reduce_zero_label=True,
        max_pixels=config.max_pixels,
    )


DATASET = Dataset("digits_segmentation", "segmentation", open_split, class_names=CLASSES)
