"""COCO's "instances" JSON as other tools write it: every field is read and checked in one place.

What is unambiguous is converted: numbers in strings, whole numbers with a point, booleans for
`iscrowd`, null for a missing field, ids that are strings. The rest is a `Problem`: it leaves out
one polygon, annotation or image. Only categories must be in order, since labels number them.
"""

import collections
import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

from vssd_jax.data.coco_masks import decode_counts
from vssd_jax.data.json_lists import JsonLists
from vssd_jax.errors import UserError

Id = int | str

_SHOWN = 20  # problems in a message
_LARGEST_ID = 2**63 - 1
_LARGEST_SIDE = 1_000_000


class BadField(ValueError):
    """A field that cannot be used: what kind of fault it is, and the value.

    Attributes:
      kind: the fault, without the values, so that equal faults can be counted.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that was left out.

    Attributes:
      where: the image and annotation.
      text: what is wrong.
      kind: see `BadField`.
    """

    where: str
    text: str
    kind: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """An entry of `images`; `size` is height and width."""

    id: Id
    file_name: str
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Annotation:
    """An entry of `annotations`.

    Attributes:
      image_id: of its image, as written there.
      category_id: of its category.
      bbox: x, y, width and height in pixels.
      area: in pixels.
      crowd: whether it marks a group of objects.
      segmentation: polygons or run lengths, see `coco_masks`; None where there is but a box.
    """

    image_id: Id
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float
    crowd: bool
    segmentation: Any


class Instances:
    """What can be used of a JSON file in COCO's instances format.

    Args:
      path: the file.

    Attributes:
      images: by id, in the file's order.
      categories: name by id, in the order of the ids; when the annotations have been read, without
        those that only group others.
      problems: everything that was left out; of the annotations, when they have been read.
      stat: of the file.

    Raises:
      UserError: it cannot be read, is of another format, or its categories are not in order.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        try:
            self._lists = JsonLists(path)
        except OSError as error:
            raise UserError(f"cannot read the annotations {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise self._no_json(error) from error
        for key in ("images", "annotations", "categories"):
            if key not in self._lists:
                raise UserError(f"{path} has no list {key!r}; it should be COCO's instances format")
        self.stat = self._lists.stat
        self.problems: list[Problem] = []
        categories = [entry for entry, _, _ in self._entries("categories")]
        self.categories, self._groups = _categories(path, categories)
        images = (entry for entry, _, _ in self._entries("images"))
        self.images, self._left_out = _images(images, self.problems)

    def annotations(self) -> Iterator[tuple[Annotation, int, int]]:
        """The annotations of these images, in the file's order, one by one: all take gigabytes.

        To be read once, since it adds to `problems`.

        Yields:
          An annotation, and the places in the file of its first byte and behind its last.

        Raises:
          UserError: the file is no JSON.
        """
        by_text = {str(number): image for number, image in self.images.items()}
        used: set[int] = set()
        for place, (entry, begin, end) in enumerate(self._entries("annotations")):
            where = f"annotation {place + 1} of the list"
            try:
                fields = _entry(entry)
                number = fields.get("id", place + 1)
                where = f"image {_shown(fields.get('image_id'))}, annotation {_shown(number)}"
                key = str(read_id(fields.get("image_id"), "image_id"))
                if key in self._left_out:
                    continue  # with its image
                if key not in by_text:
                    raise BadField("the image is not in the list of images")
                annotation, faults = read_annotation(fields, by_text[key], self.categories)
            except BadField as error:
                self.problems.append(Problem(where, str(error), error.kind))
                continue
            self.problems += [Problem(where, str(fault), fault.kind) for fault in faults]
            used.add(annotation.category_id)
            yield annotation, begin, end
        # Roboflow lists the name of the whole data as the first category.
        for number in self._groups - used:
            if len(self.categories) > 1:
                self.categories.pop(number, None)

    def _entries(self, key: str) -> Iterator[tuple[Any, int, int]]:
        try:
            yield from self._lists.entries(key)
        except (ValueError, RecursionError) as error:
            raise self._no_json(error) from error

    def _no_json(self, error: Exception) -> UserError:
        return UserError(f"{self._path} is no JSON: {error}")


def describe(problems: Iterable[Problem]) -> str:
    """The first problems, and for more of them how many there are of each kind."""
    problems = list(problems)
    text = "; ".join(map(str, problems[:_SHOWN]))
    if len(problems) <= _SHOWN:
        return text
    kinds = collections.Counter(problem.kind for problem in problems)
    counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    return f"{text}; and {len(problems) - _SHOWN} more. In all: {counts}"


# --- Fields --------------------------------------------------------------------------------------


def read_number(value: Any, name: str) -> float:
    """A finite number; raises `BadField`."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadField(f"{name} is no number", _shown(value))
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise BadField(f"{name} is not finite")
    return value


def read_whole(value: Any, name: str) -> int:
    """A whole number; raises `BadField`."""
    if type(value) is int:
        return value
    number = read_number(value, name)
    if not number.is_integer():
        raise BadField(f"{name} is no whole number", _shown(value))
    return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(number)


def read_id(value: Any, name: str) -> Id:
    """An id: a whole number or a string that is not empty; raises `BadField`."""
    if isinstance(value, str) and value.strip():
        return _text(value, name)
    if value is None or isinstance(value, bool | str):
        raise BadField(f"{name} is missing" if value is None else f"{name} is no id", _shown(value))
    number = read_whole(value, name)
    if abs(number) > _LARGEST_ID:
        raise BadField(f"{name} is too large")
    return number


def read_flag(value: Any, name: str) -> bool:
    """0 or 1, false or true; null is 0. Raises `BadField`."""
    if value is None or isinstance(value, bool):
        return bool(value)
    number = read_number(value, name)
    if number not in (0, 1):
        raise BadField(f"{name} is neither 0 nor 1", _shown(value))
    return bool(number)


def read_numbers(values: Any, name: str) -> list[float]:
    """A list of finite numbers; raises `BadField`."""
    if not isinstance(values, list):
        raise BadField(f"{name} is no list of numbers", _shown(values))
    # Masks have millions of them, and hardly ever another type.
    types = set(map(type, values))
    if types <= {float, int}:
        with contextlib.suppress(OverflowError):
            # A sum of floats is finite only if all of them are; integers may cancel out.
            if types == {float} and math.isfinite(sum(values)):
                return values
            if all(map(math.isfinite, values)):
                return values
    return [read_number(value, name) for value in values]


def read_box(entry: dict[str, Any]) -> list[float]:
    """The x, y, width and height of an annotation; raises `BadField`."""
    box = read_numbers(entry.get("bbox"), "the box")
    if len(box) != 4:
        raise BadField("the box is not four numbers", _shown(box))
    return box


def read_annotation(
    entry: dict[str, Any], image: Image, categories: Iterable[int]
) -> tuple[Annotation, list[BadField]]:
    """An annotation without what is wrong in its mask, and what that is.

    Args:
      entry: of the JSON.
      image: the one it is for.
      categories: the ids that there are.

    Raises:
      BadField: it has no such category, no area, lies outside, or no part of its mask is good.
    """
    category = read_whole(entry.get("category_id"), "category_id")
    if category not in categories:
        raise BadField("unknown category", str(category))
    box = read_box(entry)
    x, y, w, h = map(float, box)
    area = entry.get("area")
    area = w * h if area is None else read_number(area, "the area")
    if w < 1 or h < 1 or area <= 0:
        raise BadField("zero area", f"box {_shown(box)}, area {area:g}")
    height, width = image.size
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        raise BadField("the box is outside the image", f"{_shown(box)} in {width}x{height}")
    crowd = read_flag(entry.get("iscrowd"), "iscrowd")
    segmentation, faults = read_segmentation(entry.get("segmentation"), image.size)
    return Annotation(image.id, category, (x, y, w, h), area, crowd, segmentation), faults


def read_segmentation(value: Any, size: tuple[int, int]) -> tuple[Any, list[BadField]]:
    """Polygons without the bad ones among them, or a run-length code of the size (H, W).

    Returns:
      The mask, None where there is none, and the faults of the polygons that were left out.

    Raises:
      BadField: nothing is left, or the run lengths are broken.
    """
    if value is None or value == []:
        return None, []
    if isinstance(value, list):
        if isinstance(value[0], int | float):  # one polygon, without the list around it
            value = [value]
        good, faults = [], []
        for polygon in value:
            try:
                numbers = read_numbers(polygon, "a polygon")
                if len(numbers) < 6 or len(numbers) % 2:
                    raise BadField("a polygon is not three or more pairs of numbers")
                good.append(numbers)
            except BadField as fault:
                faults.append(fault)
        if not good:
            raise faults[0]
        return good, faults
    if not isinstance(value, dict) or not {"size", "counts"} <= value.keys():
        raise BadField("the mask is neither polygons nor a run-length code")
    shape, counts = read_numbers(value["size"], "broken RLE: its size"), value["counts"]
    if list(shape) != list(size):
        raise BadField("broken RLE: its size is not the image's", f"{_shown(shape)}, {list(size)}")
    if isinstance(counts, str):
        runs = decode_counts(counts)
    else:
        name = "broken RLE: one of its runs"
        counts = runs = [read_whole(run, name) for run in read_numbers(counts, name)]
    if min(runs, default=-1) < 0 or sum(runs) != size[0] * size[1]:
        raise BadField("broken RLE: its runs do not add up to the image's pixels")
    return {"size": list(size), "counts": counts}, []


# --- The file ------------------------------------------------------------------------------------


def _entry(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadField("an entry that is no object", _shown(value))
    return value


def _categories(path: str | os.PathLike, entries: list) -> tuple[dict[int, str], set[int]]:
    """The names by id, and the ids of those that are the supercategory of others and have none."""
    names: dict[int, str] = {}
    above = {str(e.get("supercategory")) for e in entries if isinstance(e, dict)}
    groups: set[int] = set()
    for place, entry in enumerate(entries):
        try:
            fields = _entry(entry)
            number = read_id(fields.get("id"), "id")
            number = read_whole(number, "id")
            name = fields.get("name")
            name = str(number) if name is None else _text(str(name), "name")
        except BadField as error:
            raise UserError(f"{path}: categories[{place}]: {error}") from error
        if number in names:
            raise UserError(f"{path}: the category id {number} occurs twice; labels are ambiguous")
        if name in names.values():
            raise UserError(f"{path}: the category {name!r} occurs twice; rename or merge them")
        names[number] = name
        if name in above - {"none"} and str(fields.get("supercategory")) == "none":
            groups.add(number)
    if not names:
        raise UserError(f"{path} has no categories")
    return dict(sorted(names.items())), groups


def _images(entries: Iterable, problems: list[Problem]) -> tuple[dict[Id, Image], set[str]]:
    """The images by id, and the ids (as text) of those that are left out."""
    images: dict[Id, Image] = {}
    seen: set[str] = set()
    left_out: set[str] = set()
    for place, entry in enumerate(entries):
        where, key = f"images[{place}]", None
        try:
            fields = _entry(entry)
            number = read_id(fields.get("id"), "id")
            where, key = f"image {_shown(number)}", str(number)
            if key in seen:
                key = None
                raise BadField("the id occurs twice, the second is left out")
            seen.add(key)
            height = read_whole(fields.get("height"), "height")
            width = read_whole(fields.get("width"), "width")
            if min(height, width) < 1 or max(height, width) > _LARGEST_SIDE:
                raise BadField("height or width is no picture's", f"{height}x{width}")
            name = _file_name(fields.get("file_name"))
            images[number] = Image(number, name, (height, width))
        except BadField as error:
            problems.append(Problem(where, str(error), error.kind))
            if key is not None:
                left_out.add(key)
    if len({type(number) for number in images}) > 1:  # pycocotools sorts them
        images = {str(n): dataclasses.replace(image, id=str(n)) for n, image in images.items()}
    return images, left_out


def _file_name(value: Any) -> str:
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str) or not value:
        raise BadField("file_name is no name", _shown(value))
    if "\0" in value:
        raise BadField("file_name is no name", _shown(value))
    return _text(value, "file_name")


def _text(value: str, name: str) -> str:
    """The string, if it can be written; JSON may hold halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadField(f"{name} is no text", _shown(value)) from None
    return value


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
