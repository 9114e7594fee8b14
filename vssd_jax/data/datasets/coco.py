"""COCO's instances: its folders and JSON as a random-access source.

    DATA_DIR/{train2017,val2017}/*.jpg
    DATA_DIR/annotations/instances_{train2017,val2017}.json

The JSON is read once and checked; a picture is read when it is asked for.
"""

import json
import math
import os
import pathlib
import pickle
from collections.abc import Container
from typing import Any, TypeGuard

import ml_collections
import numpy as np

from vssd_jax.data.coco_masks import decode_counts
from vssd_jax.data.registry import Dataset
from vssd_jax.errors import UserError

_SHOWN = 20  # problems in a message


class BadAnnotation(ValueError):
    """What is wrong with one annotation."""


class CocoSource:
    """Images and their objects, a `DetectionSource`.

    The `segmentations` of an element are polygons or run lengths, as in the JSON. Crowds are no
    objects to learn from and are left out of the elements; `ground_truth` has them.

    Args:
      images: folder of the pictures.
      annotations: the JSON file, in COCO's "instances" format.
      training: leave out images without objects or with a side below 32 pixels.
      bad_annotations: "skip" leaves out what is wrong and notes it in `problems`; "refuse" raises.

    Attributes:
      category_ids: (classes,) COCO's id of each label; labels number the ids in their order.
      class_names: of the labels.
      image_ids: COCO's ids of the images.
      sizes: (images, 2) height and width.
      problems: one line for everything left out, with the ids of image and annotation.
      bad_annotations: the places of the annotations among them in the JSON's list.

    Raises:
      UserError: a file that is missing or of another format, and with "refuse" bad annotations.
    """

    def __init__(
        self,
        images: str | os.PathLike,
        annotations: str | os.PathLike,
        *,
        training: bool = False,
        bad_annotations: str = "skip",
    ):
        if bad_annotations not in ("skip", "refuse"):
            raise UserError(f'bad_annotations must be "skip" or "refuse": {bad_annotations!r}')
        self.folder, self.annotations = pathlib.Path(images), pathlib.Path(annotations)
        dataset = read_annotations(self.annotations)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder; it should hold the images of COCO")
        categories = sorted(dataset["categories"], key=lambda c: c["id"])
        self.category_ids = np.array([c["id"] for c in categories], np.int64)
        self.class_names = [str(c.get("name", c["id"])) for c in categories]
        present = {entry.name for entry in os.scandir(self.folder)}
        objects, self.problems, self.bad_annotations = self._check(dataset, present)
        if self.problems and bad_annotations == "refuse":
            raise UserError(
                f'{self.describe_problems()}. Mend them, or leave them out: bad_annotations="skip"'
            )
        records, files, sizes = [], [], []
        self.image_ids: list[int | str] = []
        for image in dataset["images"]:
            found = objects.get(image["id"])
            if found is None or (training and (not found or min(_size(image)) < 32)):
                continue
            # Bytes, not objects: a worker process gets and holds one array, not a million lists.
            records.append(pickle.dumps(found))
            files.append(os.fsencode(image["file_name"]))
            self.image_ids.append(image["id"])
            sizes.append(_size(image))
        if not records:
            what = " with objects" if training else ""
            raise UserError(f"{self.annotations} has no usable images{what} in {self.folder}")
        self._records = np.frombuffer(b"".join(records), np.uint8)
        self._ends = np.cumsum([len(record) for record in records])
        self._files, self.sizes = np.array(files), np.array(sizes, np.int32)

    def describe_problems(self) -> str:
        """The first `problems`, and how many more there are; empty if there are none."""
        if not self.problems:
            return ""
        rest = len(self.problems) - _SHOWN
        shown = self.problems[:_SHOWN] + ([f"and {rest} more"] if rest > 0 else [])
        return f"{self.annotations}: {'; '.join(shown)}"

    def ground_truth(self) -> dict[str, Any]:
        """The images of this source with all their good annotations, crowds too, as COCO's JSON."""
        dataset, images = read_annotations(self.annotations), set(self.image_ids)
        dataset["images"] = [image for image in dataset["images"] if image["id"] in images]
        # Ids of our own: pycocotools takes an annotation 0 for "no match".
        dataset["annotations"] = [
            {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a, "id": place + 1}
            for place, a in enumerate(dataset["annotations"])
            if place not in self.bad_annotations and a["image_id"] in images
        ]
        return dataset

    def _check(
        self, dataset: dict[str, Any], present: Container[str]
    ) -> tuple[dict[int | str, list], list[str], set[int]]:
        """Good objects by image id (no entry: image left out), problems, places of bad ones."""
        label = {int(category): i for i, category in enumerate(self.category_ids)}
        images: dict[int | str, dict] = {}
        objects: dict[int | str, list] = {}
        problems: list[str] = []
        bad: set[int] = set()
        for image in dataset["images"]:
            name = f"image {image['id']}"
            if image["id"] in images:
                problems.append(f"{name}: the id occurs twice, the second is left out")
                continue
            images[image["id"]] = image
            if image["file_name"] in present or (self.folder / image["file_name"]).is_file():
                objects[image["id"]] = []
            else:
                problems.append(f"{name}: the file {image['file_name']} is missing")
        for place, annotation in enumerate(dataset["annotations"]):
            image_id = annotation.get("image_id")
            name = f"image {image_id}, annotation {annotation.get('id')}"
            if not isinstance(image_id, int | str) or image_id not in images:
                problems.append(f"{name}: the image is not in the list of images")
                bad.add(place)
            elif image_id in objects:
                try:
                    good = check_annotation(annotation, _size(images[image_id]), label)
                except BadAnnotation as error:
                    problems.append(f"{name}: {error}")
                    bad.add(place)
                    continue
                if not annotation.get("iscrowd"):
                    objects[image_id].append(good)
        return objects, problems, bad

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        first = self._ends[index - 1] if index else 0
        objects = pickle.loads(self._records[first : self._ends[index]].tobytes())
        path = self.folder / os.fsdecode(bytes(self._files[index]))
        try:
            image = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        return {
            "image": image,
            "index": index,
            "image_id": self.image_ids[index],
            "size": tuple(map(int, self.sizes[index])),
            "boxes": np.array([o[0] for o in objects], np.float32).reshape(-1, 4),
            "labels": np.array([o[1] for o in objects], np.int32),
            "segmentations": [o[2] for o in objects],
        }


def read_annotations(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON of an annotation file, with its outer form checked.

    Raises:
      UserError: it cannot be read or is of another format.
    """
    try:
        with open(path, encoding="utf-8") as file:
            dataset = json.load(file)
    except OSError as error:
        raise UserError(f"cannot read the annotations {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    needed: dict[str, tuple[str, ...]] = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": (),
        "categories": ("id",),
    }
    for key, fields in needed.items():
        items = dataset.get(key) if isinstance(dataset, dict) else None
        if not isinstance(items, list):
            raise UserError(f"{path} has no list {key!r}; it should be COCO's instances format")
        for i, item in enumerate(items):
            lacking = [f for f in fields if f not in item] if isinstance(item, dict) else ["{}"]
            if lacking:
                raise UserError(f"{path}: {key}[{i}] lacks {', '.join(lacking)}")
    return dataset


def _size(image: dict[str, Any]) -> tuple[int, int]:
    return int(image["height"]), int(image["width"])


def check_annotation(
    annotation: dict[str, Any], size: tuple[int, int], label: dict[int, int]
) -> tuple[tuple[float, float, float, float], int, Any]:
    """One annotation as (box x1 y1 x2 y2, label, segmentation).

    Args:
      annotation: of the JSON.
      size: (H, W) of the image.
      label: of each category id.

    Raises:
      BadAnnotation: it has no such category, no area, lies outside, or its mask is broken.
    """
    category = annotation.get("category_id")
    if not isinstance(category, int) or category not in label:
        raise BadAnnotation(f"unknown category {category!r}")
    box = annotation.get("bbox")
    if not _numbers(box) or len(box) != 4:
        raise BadAnnotation(f"the box is not four numbers: {box!r}")
    x, y, w, h = box
    height, width = size
    if w < 1 or h < 1 or annotation.get("area", 1) <= 0:
        raise BadAnnotation(f"zero area: box {box}, area {annotation.get('area')}")
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        raise BadAnnotation(f"the box {box} is outside the image of {width}x{height}")
    segmentation = annotation.get("segmentation")
    check_segmentation(segmentation, size)
    return (x, y, x + w, y + h), label[category], segmentation


def check_segmentation(segmentation: Any, size: tuple[int, int]) -> None:
    """Raises BadAnnotation unless these are polygons or a run-length code of the image's size."""
    if isinstance(segmentation, list):
        if not segmentation:
            raise BadAnnotation("no mask")
        for polygon in segmentation:
            if not _numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                raise BadAnnotation("a polygon is not three or more pairs of numbers")
        return
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise BadAnnotation("the mask is neither polygons nor a run-length code")
    counts = segmentation["counts"]
    if list(segmentation["size"]) != list(size):
        raise BadAnnotation(f"broken RLE: its size {segmentation['size']} is not {list(size)}")
    if isinstance(counts, list):
        runs = counts if _numbers(counts) else [-1]
    else:
        runs = decode_counts(counts)
    if min(runs, default=-1) < 0 or sum(runs) != size[0] * size[1]:
        raise BadAnnotation(f"broken RLE: its runs do not add up to {size[0]}x{size[1]} pixels")


def _numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(
        isinstance(v, int | float) and math.isfinite(v) for v in values
    )


def open_split(config: ml_collections.ConfigDict, split: str) -> CocoSource:
    """COCO 2017's "train" or "val" in `config.data_dir`."""
    root, name = pathlib.Path(config.data_dir), f"{split}2017"
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; config.data_dir holds train2017/, val2017/ and "
            "annotations/ of COCO"
        )
    return CocoSource(
        root / name,
        root / "annotations" / f"instances_{name}.json",
        training=split == "train",
        bad_annotations=config.bad_annotations,
    )


DATASET = Dataset("coco", "detection", open_split)
