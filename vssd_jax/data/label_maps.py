"""Pictures with label maps: which file belongs to which, and what the numbers mean.

A label map is a greyscale or palette PNG of its picture's size, whose pixels (of a palette PNG: the
numbers, not the colours) are the labels.
"""

import collections
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vssd_jax.data.decode import MAX_PIXELS, UnreadableImage, open_image
from vssd_jax.data.endings import ENDINGS, describe_endings
from vssd_jax.data.segmentation_transforms import IGNORE
from vssd_jax.errors import UserError

_MODES = ("1", "L", "P", "I;16", "I")  # of Pillow: a number a pixel
# What the names end with where one picture has several label maps (Cityscapes).
IMAGE_SUFFIXES = ("_leftImg8bit",)
LABEL_SUFFIXES = ("_gtFine_labelTrainIds", "_gtCoarse_labelTrainIds", "_labelTrainIds")


class LabelMaps:
    """Pictures and label maps, a `SegmentationSource` in the order of the files' names.

    Labels become 0 to classes - 1, and 255 where they are ignored.

    Args:
      images, labels: the files, a label map for each picture.
      names: of the pairs, for the files of predictions.
      class_names: of the labels.
      reduce_zero_label: whether 0 in a file is no class and ignored, and 1 the first class.
      ignore_label: of the files; ignored.
      max_pixels: of a label map.
      problems: what was left out, in words.

    Raises:
      UserError: of elements: a file that is no label map, or holds labels of no class. `OSError`
        and `UnreadableImage` where it is missing or damaged.
    """

    def __init__(
        self,
        images: Sequence[str | os.PathLike],
        labels: Sequence[str | os.PathLike],
        names: Sequence[str],
        *,
        class_names: Sequence[str],
        reduce_zero_label: bool,
        ignore_label: int = IGNORE,
        max_pixels: int = MAX_PIXELS,
        problems: str = "",
    ):
        if len(class_names) > IGNORE:
            raise UserError(f"{len(class_names)} classes are more than label maps have: {IGNORE}")
        # Arrays of bytes: a worker process gets and holds them as one piece.
        self._images, self._labels, self._names = (
            np.array([os.fsencode(path) for path in paths]) for paths in (images, labels, names)
        )
        self.class_names, self.reduce_zero_label = tuple(class_names), reduce_zero_label
        self._ignore, self._max_pixels, self._problems = ignore_label, max_pixels, problems

    @property
    def image_names(self) -> list[str]:
        """The names of the pairs."""
        return [os.fsdecode(name) for name in self._names]

    def keep(self, chosen: np.ndarray) -> None:
        """Leaves out all pairs but the chosen ones, (samples,) bool."""
        self._images, self._labels, self._names = (
            paths[chosen] for paths in (self._images, self._labels, self._names)
        )

    def describe_problems(self) -> str:
        """What was left out; empty if nothing was."""
        return self._problems

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        path, labels = (os.fsdecode(paths[index]) for paths in (self._images, self._labels))
        label = self._read(labels)
        return {
            "image": pathlib.Path(path).read_bytes(),
            "name": f"{path} (with {labels})",
            "label": label,
            "size": label.shape,
            "index": index,
        }

    def size(self, index: Any) -> tuple[int, int]:
        """(H, W) of a label map, from its header alone."""
        with open_labels(os.fsdecode(self._labels[index]), self._max_pixels) as picture:
            return picture.height, picture.width

    def _read(self, path: str) -> np.ndarray:
        values = read_labels(path, max_pixels=self._max_pixels)
        first = 1 if self.reduce_zero_label else 0
        ignored = (values < first) | (values == self._ignore) | (values == IGNORE)
        greatest = len(self.class_names) - 1 + first
        if (wrong := (values > greatest) & ~ignored).any():
            zero = ", with 0 for ignored pixels" if first else f", or {self._ignore} where ignored"
            raise UserError(
                f"{path} holds the label {values[wrong].max()}; it must lie in 0 to {greatest}"
                f"{zero}"
            )
        return np.where(ignored, IGNORE, values - first).astype(np.uint8)


def read_labels(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The numbers of a label map, (H, W) integers.

    Raises:
      UnreadableImage: it is damaged, or has more pixels than `max_pixels`.
      UserError: its pixels are colours.
    """
    with open_labels(path, max_pixels) as picture:
        try:
            values = np.array(picture)
        except Exception as error:  # of many kinds, see `decode`
            raise UnreadableImage(f"{path}: {type(error).__name__}: {error}") from error
    return values.astype(np.uint8) if values.dtype == bool else values


def open_labels(path: str | os.PathLike, max_pixels: int) -> Image.Image:
    """A label map of which only the header is read; raises what `read_labels` does."""
    try:
        picture = open_image(pathlib.Path(path).read_bytes(), max_pixels=max_pixels)
    except UnreadableImage as error:
        raise UnreadableImage(f"{path}: {error}") from error
    if picture.format != "PNG" and picture.format not in ("TIFF", "BMP", "GIF"):
        raise UserError(f"{path} is a {picture.format}, which changes numbers; save it as a PNG")
    if picture.mode not in _MODES:
        raise UserError(
            f"{path} is a {picture.format} of mode {picture.mode}; the pixels of label maps are "
            "the numbers of the classes: greyscale or palette PNGs"
        )
    return picture


# --- Pairs ---------------------------------------------------------------------------------------


def open_folders(
    images: str | os.PathLike,
    labels: str | os.PathLike,
    *,
    image_suffix: str | None = None,
    label_suffix: str | None = None,
    only: Iterable[str] | None = None,
    **options: Any,
) -> LabelMaps:
    """The pairs in a folder of pictures and one of label maps, sub-folders included.

    A pair has the same path but for the ending and the suffix before it.

    Args:
      images, labels: the folders.
      image_suffix, label_suffix: what the names end with, before the ending; files of other names
        are left out and counted. None recognises those of Cityscapes, and otherwise takes all.
      only: the names of the pairs to take; None takes all.
      **options: of `LabelMaps`.

    Raises:
      UserError: a folder that is missing or has no such files, and a file without its partner.
    """
    pictures, other_images = _files(images, image_suffix, IMAGE_SUFFIXES, ENDINGS)
    maps, other_labels = _files(labels, label_suffix, LABEL_SUFFIXES, (".png", *ENDINGS))
    if only is not None:
        wanted = list(only)
        for name in wanted:
            for found, folder in ((pictures, images), (maps, labels)):
                if name not in found:
                    raise UserError(f"{folder} has no file for {name!r} of the list of pictures")
        pictures, maps = ({name: found[name] for name in wanted} for found in (pictures, maps))
    for found, other, folder in ((pictures, maps, labels), (maps, pictures, images)):
        alone = sorted(found.keys() - other.keys())
        if alone:
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            raise UserError(
                f"{found[alone[0]]}{more} without a file in {folder}; complete or remove the pairs"
            )
    names = sorted(pictures)
    problems = "; ".join(
        f"{folder}: {describe_endings(other)}"
        for folder, other in ((images, other_images), (labels, other_labels))
        if other
    )
    return LabelMaps(
        [pictures[name] for name in names],
        [maps[name] for name in names],
        names,
        problems=problems,
        **options,
    )


def _files(
    folder: str | os.PathLike,
    suffix: str | None,
    known_suffixes: Sequence[str],
    endings: Sequence[str],
) -> tuple[dict[str, str], collections.Counter]:
    """The files by the path without suffix and ending; and the endings of the others."""
    folder = pathlib.Path(folder)
    try:
        os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror})") from error
    stems: list[tuple[str, str]] = []
    others: collections.Counter[str] = collections.Counter()
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(where, folder)
        for file in files:
            stem, ending = os.path.splitext(file)
            if file.startswith("."):
                continue
            if ending.lower() in endings:
                path = stem if inside == "." else f"{inside}/{stem}"
                stems.append((path, os.path.join(where, file)))
            else:
                others[ending.lower()] += 1
    if suffix is None:
        matches = (s for s in known_suffixes if any(stem.endswith(s) for stem, _ in stems))
        suffix = next(matches, "")
    found: dict[str, str] = {}
    for stem, path in stems:
        if not stem.endswith(suffix):
            others[f"name without {suffix}"] += 1
            continue
        name = stem.removesuffix(suffix)
        if name in found:
            raise UserError(f"{found[name]} and {path} have the same name; rename one of them")
        found[name] = path
    if not found:
        what = f"files whose names end with {suffix!r}" if suffix else "pictures"
        raise UserError(f"{folder} holds no {what}")
    return found, others


def greatest_label(source: LabelMaps, *, ignore_label: int, maps: int = 200) -> int:
    """The greatest label in the first label maps; -1 if they have none."""
    greatest = -1
    for path in source._labels[:maps]:
        try:
            values = read_labels(os.fsdecode(path)).astype(np.int64)
        except (UnreadableImage, OSError):
            continue
        counted = values[(values != ignore_label) & (values != IGNORE)]
        greatest = max(greatest, int(counted.max(initial=-1)))
    return greatest
