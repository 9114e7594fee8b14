"""ADE20K scene parsing from the folders of ADEChallengeData2016.

    ROOT/images/{training,validation}/*.jpg
    ROOT/annotations/{training,validation}/*.png

A label map is an 8-bit greyscale PNG of its image's size: 0 is "other" and ignored, n is
class n - 1. Labels are (H, W) uint8 with 255 where ignored.
"""

import collections
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from vssd_jax.data.decode import MAX_PIXELS, UnreadableImage, open_image
from vssd_jax.data.endings import describe_endings
from vssd_jax.data.registry import Dataset
from vssd_jax.data.segmentation_transforms import IGNORE
from vssd_jax.errors import UserError

CLASSES = (
    "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass",
    "cabinet", "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain",
    "chair", "car", "water", "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field",
    "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp", "bathtub", "railing",
    "cushion", "base", "box", "column", "signboard", "chest of drawers", "counter", "sand", "sink",
    "skyscraper", "fireplace", "refrigerator", "grandstand", "path", "stairs", "runway", "case",
    "pool table", "pillow", "screen door", "stairway", "river", "bridge", "bookcase", "blind",
    "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove", "palm",
    "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus",
    "towel", "light", "truck", "tower", "chandelier", "awning", "streetlight", "booth",
    "television receiver", "airplane", "dirt track", "apparel", "pole", "land", "bannister",
    "escalator", "ottoman", "bottle", "buffet", "poster", "stage", "van", "ship", "fountain",
    "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool", "barrel", "basket",
    "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank",
    "trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen",
    "blanket", "sculpture", "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan",
    "pier", "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator", "glass",
    "clock", "flag",
)  # fmt: skip


def read_labels(
    path: str | os.PathLike, num_classes: int, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """A label map: 0 becomes 255 (ignored), 1 to `num_classes` become 0 to `num_classes` - 1.

    Raises:
      UnreadableImage: it is damaged, or has more pixels than `max_pixels`.
      UserError: it is not an 8-bit greyscale PNG, or holds other values.
    """
    with _open_labels(path, max_pixels) as png:
        try:
            labels = np.array(png)
        except Exception as error:  # of many kinds, see `decode`
            raise UnreadableImage(f"{path}: {type(error).__name__}: {error}") from error
    if (wrong := (labels > num_classes) & (labels != IGNORE)).any():
        value = labels[wrong].max()
        raise UserError(
            f"{path} holds the label {value}; it must lie in 0 to {num_classes}, with 0 for "
            "ignored pixels"
        )
    return np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1).astype(np.uint8)


def _open_labels(path: str | os.PathLike, max_pixels: int) -> Image.Image:
    try:
        png = open_image(pathlib.Path(path).read_bytes(), max_pixels=max_pixels)
    except UnreadableImage as error:
        raise UnreadableImage(f"{path}: {error}") from error
    if png.mode != "L":
        kind = {"P": "a palette PNG"}.get(png.mode, f"a PNG of mode {png.mode}")
        raise UserError(
            f"{path} is {kind}; label maps are 8-bit greyscale PNGs whose pixels are the class "
            "numbers"
        )
    return png


class ADE20K:
    """Pictures and label maps, a `SegmentationSource` in the order of the files' names.

    Args:
      root: the folder that holds `images` and `annotations`.
      split: "training" or "validation".
      class_names: as many as the greatest number in the label maps.
      max_pixels: of a label map.

    Attributes:
      image_names: the names of the files, without suffix.

    Raises:
      UserError: folders or pairs are missing. Elements raise what `read_labels` does, and OSError.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        class_names: Sequence[str] = CLASSES,
        max_pixels: int = MAX_PIXELS,
    ):
        self._root, self._split = pathlib.Path(root), split
        self.class_names, self._max_pixels = class_names, max_pixels
        self._ignored: dict[str, collections.Counter] = {}
        images = self._names("images", ".jpg")
        labels = self._names("annotations", ".png")
        for folder, other, names in (
            ("images", "annotations", sorted(images - labels)),
            ("annotations", "images", sorted(labels - images)),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(
                    f"{self._path(folder, names[0])}{more} without a file in "
                    f"{self._root / other / split}; complete or remove the pairs"
                )
        self.image_names = sorted(images)

    def _path(self, folder: str, name: str) -> pathlib.Path:
        suffix = {"images": ".jpg", "annotations": ".png"}[folder]
        return self._root / folder / self._split / (name + suffix)

    def _names(self, folder: str, suffix: str) -> set[str]:
        path = self._root / folder / self._split
        try:
            entries = [entry for entry in os.listdir(path) if not entry.startswith(".")]
        except OSError as error:
            raise UserError(
                f"{path} cannot be listed ({error.strerror}); give the folder of "
                "ADEChallengeData2016, with images and annotations"
            ) from error
        names = {entry.removesuffix(suffix) for entry in entries if entry.endswith(suffix)}
        self._ignored[str(path)] = collections.Counter(
            pathlib.Path(entry).suffix for entry in entries if not entry.endswith(suffix)
        )
        if not names:
            raise UserError(f"{path} holds no {suffix} files")
        return names

    def describe_problems(self) -> str:
        """The numbers of files that are not read, by their endings; empty if there are none."""
        return "; ".join(
            f"{path}: {describe_endings(endings)}"
            for path, endings in self._ignored.items()
            if endings
        )

    def __len__(self) -> int:
        return len(self.image_names)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        name = self.image_names[index]
        path, labels = self._path("images", name), self._path("annotations", name)
        label = read_labels(labels, len(self.class_names), max_pixels=self._max_pixels)
        return {
            "image": path.read_bytes(),
            "name": f"{path} (with {labels})",
            "label": label,
            "size": label.shape,
            "index": index,
        }

    def size(self, index: Any) -> tuple[int, int]:
        """(H, W) of a label map, from its header alone."""
        path = self._path("annotations", self.image_names[index])
        with _open_labels(path, self._max_pixels) as png:
            return png.height, png.width


SPLITS = {"train": "training", "val": "validation"}  # ours -> ADE20K's


def open_split(config: ml_collections.ConfigDict, split: str) -> ADE20K:
    """ADE20K's "train" or "val" in `config.data_dir`."""
    return ADE20K(config.data_dir, SPLITS[split], max_pixels=config.max_pixels)


DATASET = Dataset("ade20k", "segmentation", open_split, class_names=CLASSES)
