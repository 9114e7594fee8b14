"""COCO's instances, and data of one's own in its format, in any of the usual layouts.

    DATA_DIR/{train2017,val2017}/*.jpg with annotations/instances_{train2017,val2017}.json
    DATA_DIR/{train,valid}/*.jpg with _annotations.coco.json beside them (Roboflow)
    DATA_DIR/images/{train,val}/*.jpg with annotations/instances_{train,val}.json (CVAT)
    DATA_DIR/images/*.jpg with annotations/instances_default.json: a share is set aside

Other files are named by `config.train_images`, `train_annotations`, `val_images` and
`val_annotations`. The JSON is read once and checked; a picture is read when it is asked for.
"""

import os
import pathlib
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_collections
import numpy as np

from vssd_jax import known_classes
from vssd_jax.data import coco_json
from vssd_jax.data.coco_json import Problem
from vssd_jax.data.registry import Dataset
from vssd_jax.data.splits import say_set_aside, set_aside
from vssd_jax.errors import UserError, did_you_mean

_SMALLEST_SIDE = 32  # of an image to train on, in pixels


class CocoSource:
    """Images and their objects, a `DetectionSource`.

    The `segmentations` of an element are polygons or run lengths, as in the JSON, or None for an
    object that has a box alone. Crowds are no objects to learn from and are left out of the
    elements; `ground_truth` has them.

    Args:
      images: folder of the pictures.
      annotations: the JSON file, in COCO's "instances" format.
      training: leave out images with a side below 32 pixels, and with `filter_empty` those without
        objects.
      filter_empty: see `training`.
      bad_annotations: "skip" leaves out what is wrong and notes it in `problems`; "refuse" raises.
      class_names: the categories whose objects count, in the order of their labels; empty takes
        all, in the order of their ids.
      choose: which of the images to take, by their files' names; None takes all.

    Attributes:
      category_ids: (classes,) COCO's id of each label.
      class_names: of the labels.
      image_ids: COCO's ids of the images.
      sizes: (images, 2) height and width.
      object_counts, mask_counts: (images,) numbers of objects, and of those with a mask.
      class_counts: (images, classes) numbers of objects.
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
        class_names: Sequence[str] = (),
        choose: Callable[[list[str]], np.ndarray] | None = None,
    ):
        if bad_annotations not in ("skip", "refuse"):
            raise UserError(f'bad_annotations must be "skip" or "refuse": {bad_annotations!r}')
        self.folder, self.annotations = pathlib.Path(images), pathlib.Path(annotations)
        instances = coco_json.read_instances(self.annotations)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder; it should hold the images of COCO")
        ids = {name: number for number, name in instances.categories.items()}
        for name in class_names:
            if name not in ids:
                near = did_you_mean(name, ids)
                raise UserError(f"config.class_names: {annotations} has no category {name!r}{near}")
        self.class_names = list(class_names or ids)
        self.category_ids = np.array([ids[name] for name in self.class_names], np.int64)
        self.problems = list(instances.problems)
        files = self._find_files(instances.images.values())
        if self.problems and bad_annotations == "refuse":
            raise UserError(
                f"{self.annotations}: {coco_json.describe(self.problems)}. Mend them, or leave "
                'them out: bad_annotations="skip"'
            )
        if choose is not None and files:
            chosen = choose(list(files.values()))
            files = {key: files[key] for key, take in zip(files, chosen, strict=True) if take}
        label = {int(number): i for i, number in enumerate(self.category_ids)}
        objects: dict[coco_json.Id, list] = {number: [] for number in files}
        crowds = other = 0
        for a in instances.annotations:
            if a.image_id not in objects:
                continue
            if a.category_id not in label:
                other += 1
            elif a.crowd:
                crowds += 1
            else:
                x, y, w, h = a.bbox
                box = (x, y, x + w, y + h)
                objects[a.image_id].append((box, label[a.category_id], a.segmentation))
        left_out = {"crowds, which are no objects to learn from": crowds if training else 0}
        left_out["objects of other categories than config.class_names"] = other
        records, names, sizes, counts, masks, classes = [], [], [], [], [], []
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
            masks.append(sum(segmentation is not None for _, _, segmentation in found))
            classes.append(np.bincount([o[1] for o in found], minlength=len(label)))
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
        self.object_counts, self.mask_counts = np.array(counts, np.int32), np.array(masks, np.int32)
        self.class_counts = np.array(classes, np.uint16)
        self._labels = np.arange(len(label), dtype=np.int32)  # of the order of the ids

    def relabel(self, class_names: Sequence[str]) -> None:
        """Numbers the classes in another order, which may have classes that occur here nowhere.

        Raises:
          UserError: a class of these is not in it.
        """
        place = {name: label for label, name in enumerate(class_names)}
        if missing := [name for name in self.class_names if name not in place]:
            raise UserError(
                f"{self.annotations} has the category {missing[0]!r}, which is not among those for "
                f"training{did_you_mean(missing[0], place)}"
            )
        new = np.array([place[name] for name in self.class_names], np.int32)
        ids = self.category_ids.max() + 1 + np.arange(len(place))  # free ones
        ids[new] = self.category_ids
        classes = np.zeros((len(self), len(place)), np.uint16)
        classes[:, new] = self.class_counts
        self.class_names, self.category_ids, self.class_counts = list(class_names), ids, classes
        self._labels = new[self._labels]

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
        name = dict(zip(self.category_ids.tolist(), self.class_names, strict=True))
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
            if a.image_id in wanted and a.category_id in name
        ]
        categories = [{"id": number, "name": name[number]} for number in sorted(name)]
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
            "labels": self._labels[np.array([o[1] for o in objects], np.int32)],
            "segmentations": [o[2] for o in objects],
        }


# --- Layouts -------------------------------------------------------------------------------------

FIELDS = ("class_names", "train_images", "train_annotations", "val_images", "val_annotations")
ROBOFLOW = "_annotations.coco.json"
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
Pair = tuple[pathlib.Path, pathlib.Path]  # the folder of the pictures and the JSON
Pairs = tuple[Pair | None, Pair | None]  # for training and for evaluation


def open_split(config: ml_collections.ConfigDict, split: str) -> CocoSource:
    """The images of "train" or "val" in `config.data_dir`.

    Raises:
      UserError: no known layout, or what `CocoSource` raises.
    """
    root = pathlib.Path(config.data_dir)
    train, val = _given(config, root) if _has_fields(config) else _recognised(root)
    pair = train if split == "train" or val is None else val
    if pair is None:
        raise UserError(f"{root} has images for evaluation, and none for training")
    images, annotations = pair

    def choose(names: list[str]) -> np.ndarray:
        aside = set_aside(names, config.validation_share, config.seed)
        if split == "val":
            say_set_aside(annotations, aside, config.validation_share)
        return aside if split == "val" else ~aside

    return CocoSource(
        images,
        annotations,
        training=split == "train",
        filter_empty=config.filter_empty,
        bad_annotations=config.bad_annotations,
        class_names=known_classes.parse(config.class_names),
        choose=choose if val is None else None,
    )


def _has_fields(config: ml_collections.ConfigDict) -> bool:
    return any(config[field] is not None for field in FIELDS[1:])


def _given(config: ml_collections.ConfigDict, root: pathlib.Path) -> Pairs:
    pairs: list[Pair | None] = []
    for split in ("train", "val"):
        images, annotations = config[f"{split}_images"], config[f"{split}_annotations"]
        if (images is None) != (annotations is None):
            raise UserError(f"config.{split}_images and config.{split}_annotations belong together")
        pairs.append(None if images is None else (root / images, root / annotations))
    return pairs[0], pairs[1]


def _recognised(root: pathlib.Path) -> Pairs:
    """The pictures and JSON for training and for evaluation, if they are there."""
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; config.data_dir holds train2017/, val2017/ and "
            "annotations/ of COCO, or data of your own in its format"
        )
    train, val = (
        next(filter(None, (_part(root, name) for name in SPLITS[split])), None)
        for split in ("train", "val")
    )
    if train is None and val is None:
        train = _whole(root)
    return train, val


def _part(root: pathlib.Path, name: str) -> Pair | None:
    """Of a part such as "train", in any of the layouts."""
    annotations = root / "annotations"
    if (root / name / ROBOFLOW).is_file():
        return root / name, root / name / ROBOFLOW
    files = {path.name.lower(): path for path in annotations.glob("*.json")}
    for part in (f"{name}2017", name):
        for file in (f"instances_{part}.json", f"{part}.json"):
            if file in files:
                written = files[file].stem.removeprefix("instances_")
                folders = (
                    root / written, root / part, root / "images" / written, root / "images" / part,
                    root / "images",
                )  # fmt: skip
                return next((f for f in folders if f.is_dir()), root / part), files[file]
    return None


def _whole(root: pathlib.Path) -> Pair:
    """Of data without parts."""
    files = sorted((*root.glob("annotations/*.json"), *root.glob("*.json")))
    if len(files) == 1:
        return (root / "images" if (root / "images").is_dir() else root), files[0]
    there = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise UserError(
        f"no known layout of COCO's format in {root} (there: {there}; {len(files)} JSON files): "
        "expected annotations/instances_train2017.json with train2017/, train/"
        f"{ROBOFLOW}, or annotations/ with one JSON and images/; or give config.train_images, "
        "train_annotations, val_images and val_annotations"
    )


DATASET = Dataset("coco", "detection", open_split, fields=FIELDS)
