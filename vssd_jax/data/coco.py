"""COCO's instances: its folders and JSON as a random-access source, and the transforms.

The JSON is read once and checked; an element is decoded, resized and padded when it is asked for.
Boxes are x1 y1 x2 y2 in pixels. Semantics of resizing, cropping and masks are mmdet's.
"""

import collections
import json
import math
import os
import pathlib
import pickle

import cv2
import numpy as np

from vssd_jax.data.constants import IMAGENET_MEAN, IMAGENET_STD
from vssd_jax.data.decode import UnreadableImage, decode
from vssd_jax.errors import UserError

LANDSCAPE, PORTRAIT = (800, 1344), (1344, 800)
_SHOWN = 20


class BadAnnotation(ValueError):
    """What is wrong with one annotation."""


class CocoSource:
    """Images and their objects.

    `source[i]` is a dict with `image` (encoded bytes), `index` (i), `image_id`, `size` (height,
    width), `boxes` (N, 4) float32, `labels` (N,) int32 and `segmentations` (polygons or RLE, as in
    the JSON).
    Crowds are no objects to learn from and are left out; the evaluation reads them by itself.

    Args:
      images: folder of the pictures.
      annotations: the JSON file, in COCO's "instances" format.
      training: leave out images without objects or with a side below 32 pixels.
      bad_annotations: "skip" leaves out what is wrong and notes it in `problems`; "refuse" raises.

    Attributes:
      category_ids: (classes,) COCO's id of each label; labels number the ids in their order.
      names: of the classes.
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
        self.names = [str(c.get("name", c["id"])) for c in categories]
        present = {entry.name for entry in os.scandir(self.folder)}
        objects, self.problems, self.bad_annotations = self._check(dataset, present)
        if self.problems and bad_annotations == "refuse":
            raise UserError(
                f'{self.describe_problems()}. Mend them, or leave them out: bad_annotations="skip"'
            )
        records, files, self.image_ids, sizes = [], [], [], []
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
        """The first `problems`, and how many more there are."""
        rest = len(self.problems) - _SHOWN
        shown = self.problems[:_SHOWN] + ([f"and {rest} more"] if rest > 0 else [])
        return f"{self.annotations}: {'; '.join(shown)}"

    def _check(self, dataset, present):
        """Good objects by image id (no entry: image left out), problems, places of bad ones."""
        label = {int(category): i for i, category in enumerate(self.category_ids)}
        images, objects, problems, bad = {}, {}, [], set()
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

    def __getitem__(self, index: int) -> dict:
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


def read_annotations(path: str | os.PathLike) -> dict:
    """The JSON of an annotation file, with its outer form checked."""
    try:
        with open(path, encoding="utf-8") as file:
            dataset = json.load(file)
    except OSError as error:
        raise UserError(f"cannot read the annotations {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    needed = {
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


def _size(image) -> tuple[int, int]:
    return int(image["height"]), int(image["width"])


def check_annotation(annotation: dict, size: tuple[int, int], label: dict[int, int]):
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


def check_segmentation(segmentation, size: tuple[int, int]) -> None:
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
        runs = _decode_counts(counts)
    if min(runs, default=-1) < 0 or sum(runs) != size[0] * size[1]:
        raise BadAnnotation(f"broken RLE: its runs do not add up to {size[0]}x{size[1]} pixels")


def _numbers(values) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int | float) and math.isfinite(v) for v in values
    )


def _decode_counts(text) -> list[int]:
    """The run lengths in COCO's compressed string; [-1] if it is broken.

    Five bits a character, from the lowest on; bit 5 says that more follow. From the third run on,
    differences to the run before last.
    """
    data = text.encode() if isinstance(text, str) else bytes(text)
    runs, value, shift = [], 0, 0
    for byte in data:
        byte -= 48
        if not 0 <= byte < 64:
            return [-1]
        value |= (byte & 31) << shift
        shift += 5
        if byte & 32:
            continue
        if byte & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return [-1] if shift else runs


def rasterise(segmentation, size: tuple[int, int]) -> np.ndarray:
    """Polygons or RLE as an (H, W) uint8 mask of 0 and 1."""
    height, width = size
    if isinstance(segmentation, list):
        from pycocotools import mask

        segmentation = mask.merge(mask.frPyObjects(segmentation, height, width))
    runs = segmentation["counts"]
    if not isinstance(runs, list):
        runs = _decode_counts(runs)
    # Runs of 0 and 1 in turn, down the columns. (pycocotools' own decoder warns under NumPy 2.)
    return np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs).reshape(width, height).T


# --- Transforms -------------------------------------------------------------------------------


def rescaled_size(size, short: int, long: int, limit=None) -> tuple[int, int]:
    """(H, W) scaled so that the shorter side is `short`, or the longer one `long` if that is less.

    `limit` is a further (H, W) that must not be exceeded.
    """
    factor = min(short / min(size), long / max(size))
    if limit is not None:
        factor = min(factor, limit[0] / size[0], limit[1] / size[1])
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def padded_shape(size, shapes) -> tuple[int, int]:
    """The shape, of a few, for images of this orientation: the landscape one, or the portrait."""
    height, width = size
    return max(shapes, key=lambda shape: (height > width) == (shape[0] > shape[1]))


def train_transform(
    element: dict,
    rng: np.random.Generator,
    *,
    short_sides: tuple[int, ...] = (800,),
    long_side: int = 1333,
    crop: bool = False,
    shapes: tuple[tuple[int, int], ...] = (LANDSCAPE, PORTRAIT),
    max_objects: int = 100,
    flip: float = 0.5,
) -> dict:
    """An element of `CocoSource` as arrays of fixed shape.

    The paper's 1x schedule takes the defaults, 3x `short_sides=range(480, 801, 32), crop=True`.

    Args:
      element: of `CocoSource`.
      rng: the source of everything random.
      short_sides, long_side: one of the short sides is taken at random; the long side is bounded.
      crop: half of the time first resize to a short side of 400, 500 or 600 and cut out a random
        rectangle with sides of 384 to 600.
      shapes: the padded sizes (H, W), one or a landscape and a portrait one. The image's
        orientation decides; a crop of the other orientation is resized to fit.
      max_objects: M; of more objects the first count. The masks take M * H * W / 8 bytes.
      flip: probability of a horizontal flip.

    Returns:
      image: (H, W, 3) float32, normalised, padded with zeros at the bottom and the right.
      image_shape: (2,) int32 height and width without the padding.
      boxes: (M, 4) float32, labels (M,) int32, valid (M,) bool.
      masks: (M, H, W / 8) uint8, a bit a pixel along the width.
    """
    image = _decode(element)
    shape = padded_shape(element["size"], shapes)
    boxes, labels = element["boxes"].copy(), element["labels"]
    masks = [rasterise(s, element["size"]) for s in element["segmentations"][:max_objects]]
    boxes, labels = boxes[:max_objects], labels[:max_objects]
    if rng.random() < flip:
        image, masks = image[:, ::-1], [mask[:, ::-1] for mask in masks]
        boxes[:, [0, 2]] = image.shape[1] - boxes[:, [2, 0]]
    if crop and rng.random() < 0.5:
        size = rescaled_size(image.shape[:2], int(rng.choice((400, 500, 600))), 4200)
        image, boxes, masks = _resize(image, boxes, masks, size)
        image, boxes, masks = _crop(image, boxes, masks, rng)
    size = rescaled_size(image.shape[:2], int(rng.choice(short_sides)), long_side, shape)
    image, boxes, masks = _resize(image, boxes, masks, size)
    left = (boxes[:, 2:] > boxes[:, :2]).all(1)
    count = int(left.sum())
    result = {
        "image": _normalise_and_pad(image, shape),
        "image_shape": np.array(size, np.int32),
        "boxes": np.zeros((max_objects, 4), np.float32),
        "labels": np.zeros((max_objects,), np.int32),
        "valid": np.arange(max_objects) < count,
        "masks": np.zeros((max_objects, shape[0], -(-shape[1] // 8)), np.uint8),
    }
    result["boxes"][:count], result["labels"][:count] = boxes[left], labels[left]
    for packed, i in zip(result["masks"], np.flatnonzero(left), strict=False):
        bits = np.packbits(masks[i], axis=-1)
        packed[: bits.shape[0], : bits.shape[1]] = bits
    return result


def eval_transform(
    element: dict,
    *,
    short_side: int = 800,
    long_side: int = 1333,
    shapes: tuple[tuple[int, int], ...] | None = (LANDSCAPE, PORTRAIT),
) -> dict:
    """An element of `CocoSource` for inference.

    `shapes` is as in `train_transform`; None pads to multiples of 32 only, as the authors'
    evaluation does (batch size 1, a compilation for each shape): VSSD's global mixers see the
    padding, so that its amount changes the scores a little.

    Returns:
      image, image_shape as in `train_transform`, and original_shape (2,) and index (int32), the
      element's place in the source.
    """
    image = _decode(element)
    if shapes is None:
        size = rescaled_size(element["size"], short_side, long_side)
        shape = tuple(-(-side // 32) * 32 for side in size)
    else:
        shape = padded_shape(element["size"], shapes)
        size = rescaled_size(element["size"], short_side, long_side, shape)
    image, _, _ = _resize(image, np.zeros((0, 4), np.float32), [], size)
    return {
        "image": _normalise_and_pad(image, shape),
        "image_shape": np.array(size, np.int32),
        "index": np.int32(element["index"]),
        "original_shape": np.array(element["size"], np.int32),
    }


def _decode(element) -> np.ndarray:
    try:
        image = decode(element["image"])
    except UnreadableImage as error:
        raise UserError(f"image {element['image_id']} cannot be decoded: {error}") from error
    if image.shape[:2] != element["size"]:
        raise UserError(
            f"image {element['image_id']} is {image.shape[1]}x{image.shape[0]} pixels, its entry "
            f"in the annotations says {element['size'][1]}x{element['size'][0]}; correct the entry"
        )
    return image


def _resize(image, boxes, masks, size):
    """Everything to `size` (H, W); boxes are clipped to it."""
    if size != image.shape[:2]:
        scale = np.array([size[1] / image.shape[1], size[0] / image.shape[0]] * 2, np.float32)
        boxes = boxes * scale
        cv_size = (size[1], size[0])
        image = cv2.resize(np.ascontiguousarray(image), cv_size, interpolation=cv2.INTER_LINEAR)
        masks = [
            cv2.resize(np.ascontiguousarray(mask), cv_size, interpolation=cv2.INTER_NEAREST)
            for mask in masks
        ]
    limit = np.array([size[1], size[0]] * 2, np.float32)
    return image, np.clip(boxes, 0, limit), masks


def _crop(image, boxes, masks, rng):
    """A random rectangle with sides of 384 to 600 pixels, or the image's if that is smaller."""
    sides = [int(rng.integers(min(side, 384), min(side, 600) + 1)) for side in image.shape[:2]]
    y, x = (int(rng.integers(0, f - s + 1)) for f, s in zip(image.shape[:2], sides, strict=True))
    window = (slice(y, y + sides[0]), slice(x, x + sides[1]))
    limit = np.array([sides[1], sides[0]] * 2, np.float32)
    boxes = np.clip(boxes - np.array([x, y, x, y], np.float32), 0, limit)
    return image[window], boxes, [mask[window] for mask in masks]


def _normalise_and_pad(image, shape):
    padded = np.zeros((*shape, 3), np.float32)
    mean, std = (np.float32(255) * np.array(v, np.float32) for v in (IMAGENET_MEAN, IMAGENET_STD))
    padded[: image.shape[0], : image.shape[1]] = (image - mean) / std
    return padded


# --- Order ------------------------------------------------------------------------------------


class GroupedByOrientation:
    """A source in an order that makes every batch all landscape or all portrait.

    Elements i * batch_size to (i + 1) * batch_size are a batch; batches of both kinds are mixed.

    Args:
      source: with `sizes`, as `CocoSource`.
      batch_size: global.
      seed: with it, the elements are shuffled anew for each epoch, and the few that fill no
        batch are left out of the epoch. Without, each element comes once; batches are filled up
        with copies, whose `valid` is False.
      steps: number of batches, with a seed.

    Raises:
      UserError: with a seed, images of neither orientation fill a batch.
    """

    def __init__(self, source, batch_size: int, *, seed: int | None = None, steps: int = 0):
        self.source, self.batch_size, self.seed = source, batch_size, seed
        portrait = source.sizes[:, 0] > source.sizes[:, 1]
        self._groups = [np.flatnonzero(portrait == kind) for kind in (False, True)]
        if seed is None:
            self._per_epoch = sum(-(-len(g) // batch_size) for g in self._groups) * batch_size
            self._length = self._per_epoch
        else:
            self._per_epoch = sum(len(g) // batch_size for g in self._groups) * batch_size
            self._length = steps * batch_size
        if not self._per_epoch:
            counts = " landscape and ".join(str(len(group)) for group in self._groups)
            raise UserError(
                f"a batch of {batch_size} has images of one orientation, and there are {counts} "
                "portrait images; use a smaller config.batch_size"
            )
        self._orders = collections.OrderedDict()

    def __len__(self):
        return self._length

    def _order(self, epoch):
        order = self._orders.get(epoch)
        if order is None:
            order = self._orders[epoch] = self._make_order(epoch)
            while len(self._orders) > 2:  # other threads may be in other epochs
                self._orders.popitem(last=False)
        return order

    def _make_order(self, epoch):
        rng = np.random.default_rng([self.seed or 0, epoch])
        batches = []
        for group in self._groups:
            if self.seed is not None:
                group = rng.permutation(group)
                group = group[: len(group) // self.batch_size * self.batch_size]
            missing = -len(group) % self.batch_size
            # Copies are marked by the complement of their index.
            group = np.concatenate([group, ~group[:1].repeat(missing)])
            batches.extend(group.reshape(-1, self.batch_size))
        if self.seed is not None:
            rng.shuffle(batches)
        return np.concatenate(batches)

    def __getitem__(self, index):
        epoch, place = divmod(index, self._per_epoch)
        number = int(self._order(epoch)[place])
        element = self.source[number if number >= 0 else ~number]
        return element if self.seed is not None else {**element, "valid": np.bool_(number >= 0)}
