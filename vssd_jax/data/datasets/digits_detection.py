"""A small dataset in COCO's format: scenes of hand-written digits, made where they are needed."""

import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from vssd_jax.data.datasets.coco import CocoSource
from vssd_jax.data.registry import Dataset
from vssd_jax.data.scenes import NUM_CLASSES, make_scene
from vssd_jax.errors import UserError

CLASSES = tuple(map(str, range(NUM_CLASSES)))
SIZE = (128, 160)
MAX_OBJECTS = 6
_VERSION = 1  # of the scenes: a new number lets `prepare` make them anew
_SPLITS = ("train", "test")


def prepare(
    data_dir: str | os.PathLike, *, train: int = 2000, test: int = 200, seed: int = 0
) -> pathlib.Path:
    """Makes the dataset unless it is there, and returns its folder.

    The folder holds `train/*.png`, `test/*.png`, `annotations/instances_train.json` and
    `annotations/instances_test.json`. It is made beside its place and then renamed: it is there
    completely or not at all.

    Args:
      data_dir: where the folder is, or will be.
      train, test: number of scenes.
      seed: of the scenes.

    Raises:
      UserError: a folder that cannot be written.
    """
    name = f"digits_detection_{_VERSION}_{train}_{test}_{seed}"
    folder = pathlib.Path(data_dir) / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"no scenes can be made in {data_dir}: {error.strerror}") from error
    try:
        (work / "annotations").mkdir()
        for split, count in zip(_SPLITS, (train, test), strict=True):
            (work / split).mkdir()
            dataset = _write_scenes(work / split, split, count, seed)
            text = json.dumps(dataset)
            (work / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")
        work.chmod(0o755)  # mkdtemp's folder is for its owner only
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster: its scenes are equal
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def open_split(config: ml_collections.ConfigDict, split: str) -> CocoSource:
    """The scenes of "train" or "val" in `config.data_dir`, prepared at the first call."""
    folder, name = prepare(config.data_dir), {"train": "train", "val": "test"}[split]
    return CocoSource(
        folder / name,
        folder / "annotations" / f"instances_{name}.json",
        training=split == "train",
        filter_empty=config.filter_empty,
        bad_annotations=config.bad_annotations,
    )


def _write_scenes(folder: pathlib.Path, split: str, count: int, seed: int) -> dict[str, Any]:
    """Writes the pictures and returns their JSON."""
    from pycocotools import mask as coco_mask

    images: list[dict] = []
    annotations: list[dict] = []
    for number in range(count):
        rng = np.random.default_rng([seed, _SPLITS.index(split), number])
        image, instances = make_scene(rng, size=SIZE, num_digits=(1, MAX_OBJECTS), split=split)
        name = f"{number:06d}.png"
        Image.fromarray(image).save(folder / name, compress_level=1)
        images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        for instance in instances:
            code = coco_mask.encode(np.asfortranarray(instance.mask, np.uint8))
            x1, y1, x2, y2 = map(float, instance.box)
            annotations.append(
                {
                    "id": len(annotations) + 1,  # COCO's evaluation takes 0 for "no match"
                    "image_id": number,
                    "category_id": instance.label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(instance.mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": list(SIZE), "counts": code["counts"].decode()},
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


DATASET = Dataset("digits_detection", "detection", open_split, class_names=CLASSES)
