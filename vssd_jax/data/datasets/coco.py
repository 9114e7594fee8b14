"""COCO's instances, and data of one's own in its format, in any of the usual layouts.

    DATA_DIR/{train2017,val2017}/*.jpg with annotations/instances_{train2017,val2017}.json
    DATA_DIR/{train,valid}/*.jpg with _annotations.coco.json beside them (Roboflow)
    DATA_DIR/images/{train,val}/*.jpg with annotations/instances_{train,val}.json (CVAT)
    DATA_DIR/images/*.jpg with annotations/instances_default.json: a share is set aside

Other files are named by `config.train_images`, `train_annotations`, `val_images` and
`val_annotations`. All of the JSON is checked first. A picture, and what the JSON says of its
objects, are read when they are asked for: worker processes hold only where an annotation stands.
"""

import array
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from vssd_jax import known_classes
from vssd_jax.data import coco_json
from vssd_jax.data.coco_json import Instances, Problem
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
      annotations: the JSON file, in COCO's "instances" format. It must stay as it is.
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
      UserError: a file that is missing or of another format, and with "refuse" bad annotations; of
        an element, that the JSON has been changed.
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
        instances = Instances(self.annotations)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder; it should hold the images of COCO")
        found = _read_annotations(instances)
        ids = {name: number for number, name in instances.categories.items()}
        for name in class_names:
            if name not in ids:
                near = did_you_mean(name, ids)
                raise UserError(f"config.class_names: {annotations} has no category {name!r}{near}")
        self.class_names = list(class_names or ids)
        self.category_ids = np.array([ids[name] for name in self.class_names], np.int64)
        self.problems = instances.problems
        files = self._find_files(instances.images.values())
        if self.problems and bad_annotations == "refuse":
            raise UserError(
                f"{self.annotations}: {coco_json.describe(self.problems)}. Mend them, or leave "
                'them out: bad_annotations="skip"'
            )
        if choose is not None and files:
            chosen = choose(list(files.values()))
            files = {key: files[key] for key, take in zip(files, chosen, strict=True) if take}
        # Of all images and annotations in the file:
        ids_of_all = list(instances.images)
        sizes = np.array([image.size for image in instances.images.values()], np.int32)
        sizes = sizes.reshape(-1, 2)
        take = np.array([number in files for number in ids_of_all], np.bool_)
        label = {int(number): i for i, number in enumerate(self.category_ids)}
        labels = np.array([label.get(number, -1) for number in found.category.tolist()], np.int32)
        there, other = take[found.image], labels < 0
        objects = there & ~other & ~found.crowd
        counts, masks = (
            np.bincount(found.image[which], minlength=len(take)).astype(np.int32)
            for which in (objects, objects & found.mask)
        )
        left_out = {"objects of other categories than config.class_names": there & other}
        if training:
            small = take & (sizes < _SMALLEST_SIDE).any(1)
            empty = take & ~small & (counts == 0)
            if not filter_empty:
                empty[:] = False
            left_out = {
                "crowds, which are no objects to learn from": there & ~other & found.crowd,
                **left_out,
                f"images with a side below {_SMALLEST_SIDE} pixels": small,
                "images without objects (config.filter_empty=False trains on them)": empty,
            }
            take = take & ~small & ~empty
        self._left_out = {what: int(which.sum()) for what, which in left_out.items() if which.any()}
        if not take.any():
            what = " with objects" if training and filter_empty else ""
            reasons = self.describe_problems()
            raise UserError(
                f"{self.annotations} has no usable images{what} in {self.folder}"
                + (f"; left out: {reasons}" if reasons else "")
            )
        self.image_ids = [number for number, kept in zip(ids_of_all, take, strict=True) if kept]
        self._files = np.array([os.fsencode(files[number]) for number in self.image_ids])
        self.sizes, self.object_counts, self.mask_counts = sizes[take], counts[take], masks[take]
        # Of the objects, image by image:
        order = np.flatnonzero(objects & take[found.image])
        order = order[np.argsort(found.image[order], kind="stable")]
        self._labels, self._begins, self._ends = labels[order], found.begin[order], found.end[order]
        self._last = np.cumsum(self.object_counts)  # of each image, the place behind it
        self._stat = _version(instances.stat)

    @property
    def class_counts(self) -> np.ndarray:
        """(images, classes) uint16 numbers of objects."""
        counts = np.zeros((len(self), len(self.class_names)), np.uint16)
        np.add.at(counts, (np.repeat(np.arange(len(self)), self.object_counts), self._labels), 1)
        return counts

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
        self.class_names, self.category_ids = list(class_names), ids
        self._labels = new[self._labels]

    def describe_problems(self) -> str:
        """What was left out and why: numbers, and the first cases; empty if nothing was."""
        parts = [f"{count} {what}" for what, count in self._left_out.items()]
        if self.problems:
            parts.append(coco_json.describe(self.problems))
        return f"{self.annotations}: {'; '.join(parts)}" if parts else ""

    def ground_truth(self) -> dict[str, Any]:
        """The images of this source with all their good annotations, crowds too, as COCO's JSON."""
        instances, wanted = Instances(self.annotations), set(self.image_ids)
        self._check_version(instances.stat)
        name = dict(zip(self.category_ids.tolist(), self.class_names, strict=True))
        images = [
            {"id": i.id, "file_name": i.file_name, "height": i.size[0], "width": i.size[1]}
            for i in instances.images.values()
            if i.id in wanted
        ]
        annotations = [
            {
                "id": place,  # from 1 on: pycocotools takes an annotation 0 for "no match"
                "image_id": a.image_id,
                "category_id": a.category_id,
                "bbox": list(a.bbox),
                "area": a.area,
                "iscrowd": int(a.crowd),
                "segmentation": a.segmentation,
            }
            for place, (a, _, _) in enumerate(instances.annotations(), 1)
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
        return len(self.image_ids)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        path = self.folder / os.fsdecode(bytes(self._files[index]))
        height, width = map(int, self.sizes[index])
        last = int(self._last[index])
        objects = slice(last - int(self.object_counts[index]), last)
        boxes, segmentations = [], []
        for fields in self._read(self._begins[objects], self._ends[objects]):
            x, y, w, h = map(float, coco_json.read_box(fields))
            boxes.append((x, y, x + w, y + h))
            mask, _ = coco_json.read_segmentation(fields.get("segmentation"), (height, width))
            segmentations.append(mask)
        return {
            "image": path.read_bytes(),
            "name": f"image {self.image_ids[index]} ({path})",
            "index": index,
            "image_id": self.image_ids[index],
            "size": (height, width),
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "labels": self._labels[objects],
            "segmentations": segmentations,
        }

    def _check_version(self, stat: os.stat_result) -> None:
        if _version(stat) != self._stat:
            raise UserError(f"{self.annotations} was changed after it was opened; start again")

    def _read(self, begins: np.ndarray, ends: np.ndarray) -> list[dict[str, Any]]:
        """The annotations at these places of the file."""
        if not len(begins):
            return []
        try:
            with open(self.annotations, "rb") as file:
                self._check_version(os.fstat(file.fileno()))
                pieces = []
                for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                    file.seek(begin)
                    pieces.append(file.read(end - begin))
        except OSError as error:
            raise UserError(
                f"cannot read the annotations {self.annotations}: {error.strerror}"
            ) from error
        return [json.loads(piece) for piece in pieces]


class _Annotations(NamedTuple):
    """The good annotations of a file in its order, an array for each field.

    Attributes:
      image: place of its image.
      category: id.
      crowd, mask: whether it is a crowd, and has a mask.
      begin, end: its places in the file, see `Instances.annotations`.
    """

    image: np.ndarray
    category: np.ndarray
    crowd: np.ndarray
    mask: np.ndarray
    begin: np.ndarray
    end: np.ndarray


def _read_annotations(instances: Instances) -> _Annotations:
    place = {number: i for i, number in enumerate(instances.images)}
    numbers = array.array("q")
    for a, begin, end in instances.annotations():
        mask = a.segmentation is not None
        numbers.extend((place[a.image_id], a.category_id, a.crowd, mask, begin, end))
    fields = _Annotations(*np.array(numbers, np.int64).reshape(-1, 6).T)
    return fields._replace(crowd=fields.crowd.astype(bool), mask=fields.mask.astype(bool))


def _version(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


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
