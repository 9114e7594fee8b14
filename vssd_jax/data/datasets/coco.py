"""COCO's instances: its folders and JSON as a random-access source.

    DATA_DIR/{train2017,val2017}/*.jpg
    DATA_DIR/annotations/instances_{train2017,val2017}.json

The JSON is read once and checked; a picture is read when it is asked for.
"""

import os
import pathlib
import pickle
from collections.abc import Iterable
from typing import Any

import ml_collections
import numpy as np

from vssd_jax.data import coco_json
from vssd_jax.data.coco_json import Problem
from vssd_jax.data.registry import Dataset
from vssd_jax.errors import UserError

_SMALLEST_SIDE = 32  # of an image to train on, in pixels


class CocoSource:
    """Images and their objects, a `DetectionSource`.

    The `segmentations` of an element are polygons or run lengths, as in the JSON. Crowds are no
    objects to learn from and are left out of the elements; `ground_truth` has them.

    Args:
      images: folder of the pictures.
      annotations: the JSON file, in COCO's "instances" format.
      training: leave out images with a side below 32 pixels, and with `filter_empty` those without
        objects.
      filter_empty: see `training`.
      bad_annotations: "skip" leaves out what is wrong and notes it in `problems`; "refuse" raises.

    Attributes:
      category_ids: (classes,) COCO's id of each label; labels number the ids in their order.
      class_names: of the labels.
      image_ids: COCO's ids of the images.
      sizes: (images, 2) height and width.
      object_counts: (images,) numbers of objects.
      problems: everything left out because it is wrong.

    Raises:
      UserError: a file that is missing or of another format, and with "refuse" bad annotations.
    """

    def __init__(
        self,
        images: str | os.PathLike,
        annotations: str | os.PathLike,
        *,
        training: bool = False,
        filter_empty: bool = True,
        bad_annotations: str = "skip",
    ):
        if bad_annotations not in ("skip", "refuse"):
            raise UserError(f'bad_annotations must be "skip" or "refuse": {bad_annotations!r}')
        self.folder, self.annotations = pathlib.Path(images), pathlib.Path(annotations)
        instances = coco_json.read_instances(self.annotations)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder; it should hold the images of COCO")
        self.category_ids = np.array(list(instances.categories), np.int64)
        self.class_names = list(instances.categories.values())
        self.problems = list(instances.problems)
        files = self._find_files(instances.images.values())
        if self.problems and bad_annotations == "refuse":
            raise UserError(
                f"{self.annotations}: {coco_json.describe(self.problems)}. Mend them, or leave "
                'them out: bad_annotations="skip"'
            )
        label = {number: i for i, number in enumerate(instances.categories)}
        objects: dict[coco_json.Id, list] = {number: [] for number in files}
        crowds = 0
        for a in instances.annotations:
            if a.crowd:
                crowds += 1
            elif a.image_id in objects:
                x, y, w, h = a.bbox
                box = (x, y, x + w, y + h)
                objects[a.image_id].append((box, label[a.category_id], a.segmentation))
        left_out = {"crowds, which are no objects to learn from": crowds if training else 0}
        records, names, sizes, counts = [], [], [], []
        self.image_ids: list[coco_json.Id] = []
        small = empty = 0
        for number, found in objects.items():
            size = instances.images[number].size
            if training and min(size) < _SMALLEST_SIDE:
                small += 1
                continue
            if training and filter_empty and not found:
                empty += 1
                continue
            # Bytes, not objects: a worker process gets and holds one array, not a million lists.
            records.append(pickle.dumps(found))
            names.append(os.fsencode(files[number]))
            self.image_ids.append(number)
            sizes.append(size)
            counts.append(len(found))
        left_out[f"images with a side below {_SMALLEST_SIDE} pixels"] = small
        left_out["images without objects (config.filter_empty=False trains on them)"] = empty
        self._left_out = {what: count for what, count in left_out.items() if count}
        if not records:
            what = " with objects" if training and filter_empty else ""
            reasons = self.describe_problems()
            raise UserError(
                f"{self.annotations} has no usable images{what} in {self.folder}"
                + (f"; left out: {reasons}" if reasons else "")
            )
        self._records = np.frombuffer(b"".join(records), np.uint8)
        self._ends = np.cumsum([len(record) for record in records])
        self._files, self.sizes = np.array(names), np.array(sizes, np.int32)
        self.object_counts = np.array(counts, np.int32)

    def describe_problems(self) -> str:
        """What was left out and why: numbers, and the first cases; empty if nothing was."""
        parts = [f"{count} {what}" for what, count in self._left_out.items()]
        if self.problems:
            parts.append(coco_json.describe(self.problems))
        return f"{self.annotations}: {'; '.join(parts)}" if parts else ""

    def ground_truth(self) -> dict[str, Any]:
        """The images of this source with all their good annotations, crowds too, as COCO's JSON."""
        # Read again: kept, it would be copied to every worker.
        instances, wanted = coco_json.read_instances(self.annotations), set(self.image_ids)
        images = [
            {"id": i.id, "file_name": i.file_name, "height": i.size[0], "width": i.size[1]}
            for i in instances.images.values()
            if i.id in wanted
        ]
        annotations = [
            {
                "id": place + 1,  # pycocotools takes an annotation 0 for "no match"
                "image_id": a.image_id,
                "category_id": a.category_id,
                "bbox": list(a.bbox),
                "area": a.area,
                "iscrowd": int(a.crowd),
                "segmentation": a.segmentation,
            }
            for place, a in enumerate(instances.annotations)
            if a.image_id in wanted
        ]
        categories = [{"id": i, "name": name} for i, name in instances.categories.items()]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _find_files(self, images: Iterable[coco_json.Image]) -> dict[coco_json.Id, str]:
        """The file of each image that has one, by id; the others become problems."""
        present = {entry.name for entry in os.scandir(self.folder)}
        files = {}
        for image in images:
            for name in (image.file_name, image.file_name.replace("\\", "/")):
                if name in present or (self.folder / name).is_file():
                    files[image.id] = name
                    break
            else:
                text = f"the file {image.file_name} is missing"
                self.problems.append(Problem(f"image {image.id}", text, "missing files"))
        return files

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        first = self._ends[index - 1] if index else 0
        objects = pickle.loads(self._records[first : self._ends[index]].tobytes())
        path = self.folder / os.fsdecode(bytes(self._files[index]))
        return {
            "image": path.read_bytes(),
            "name": f"image {self.image_ids[index]} ({path})",
            "index": index,
            "image_id": self.image_ids[index],
            "size": tuple(map(int, self.sizes[index])),
            "boxes": np.array([o[0] for o in objects], np.float32).reshape(-1, 4),
            "labels": np.array([o[1] for o in objects], np.int32),
            "segmentations": [o[2] for o in objects],
        }


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
        filter_empty=config.filter_empty,
        bad_annotations=config.bad_annotations,
    )


DATASET = Dataset("coco", "detection", open_split)
