"""ADE20K scene parsing from the folders of ADEChallengeData2016.

    ROOT/images/{training,validation}/*.jpg
    ROOT/annotations/{training,validation}/*.png

A label map is an 8-bit greyscale PNG of its image's size: 0 is "other" and ignored, n is
class n - 1. Images are (H, W, 3) uint8 RGB, labels (H, W) uint8 with 255 where ignored.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import cv2
import ml_collections
import numpy as np
from PIL import Image

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


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB, in the orientation of its stored pixels.

    Raises:
      UserError: it cannot be read or decoded.
    """
    try:
        encoded = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(encoded, flags) if encoded.size else None
    if image is None:
        raise UserError(f"{path} is not a picture or is damaged; copy it again")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_labels(path: str | os.PathLike, num_classes: int) -> np.ndarray:
    """A label map: 0 becomes 255 (ignored), 1 to `num_classes` become 0 to `num_classes` - 1.

    Raises:
      UserError: it is not an 8-bit greyscale PNG, or holds other values.
    """
    try:
        with Image.open(path) as png:
            _check_mode(path, png)
            labels = np.array(png)
    except (OSError, SyntaxError) as error:  # Pillow raises both for damaged files
        raise UserError(f"{path} cannot be read as a PNG: {error}") from error
    if (wrong := (labels > num_classes) & (labels != IGNORE)).any():
        value = labels[wrong].max()
        raise UserError(
            f"{path} holds the label {value}; it must lie in 0 to {num_classes}, with 0 for "
            "ignored pixels"
        )
    return np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1).astype(np.uint8)


def _check_mode(path: str | os.PathLike, png: Image.Image) -> None:
    if png.mode != "L":
        kind = {"P": "a palette PNG"}.get(png.mode, f"a PNG of mode {png.mode}")
        raise UserError(
            f"{path} is {kind}; label maps are 8-bit greyscale PNGs whose pixels are the class "
            "numbers"
        )


class ADE20K:
    """Pictures and label maps, a `SegmentationSource` in the order of the files' names.

    Args:
      root: the folder that holds `images` and `annotations`.
      split: "training" or "validation".
      class_names: as many as the greatest number in the label maps.

    Attributes:
      image_names: the names of the files, without suffix.

    Raises:
      UserError: folders or pairs are missing. Elements raise it for a label map of another size
        than its image, and as `read_image` and `read_labels` do.
    """

    def __init__(
        self, root: str | os.PathLike, split: str, *, class_names: Sequence[str] = CLASSES
    ):
        self._root, self._split = pathlib.Path(root), split
        self.class_names = class_names
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
            names = {entry[: -len(suffix)] for entry in os.listdir(path) if entry.endswith(suffix)}
        except OSError as error:
            raise UserError(
                f"{path} cannot be listed ({error.strerror}); give the folder of "
                "ADEChallengeData2016, with images and annotations"
            ) from error
        if not names:
            raise UserError(f"{path} holds no {suffix} files")
        return names

    def __len__(self) -> int:
        return len(self.image_names)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        name = self.image_names[index]
        image = read_image(self._path("images", name))
        path = self._path("annotations", name)
        label = read_labels(path, len(self.class_names))
        self._check_size(path, label.shape, image.shape[:2])
        return {"image": image, "label": label, "index": index}

    def size(self, index: Any) -> tuple[int, int]:
        """(H, W) of an element, from the headers of its files alone."""
        name, sizes = self.image_names[index], []
        for folder in ("images", "annotations"):
            path = self._path(folder, name)
            try:
                with Image.open(path) as header:
                    if folder == "annotations":
                        _check_mode(path, header)
                    width, height = header.size
                    sizes.append((height, width))
            except (OSError, SyntaxError) as error:
                raise UserError(f"{path} is not a picture or is damaged; copy it again") from error
        self._check_size(path, sizes[1], sizes[0])
        return sizes[0]

    @staticmethod
    def _check_size(path: pathlib.Path, label: tuple[int, ...], image: tuple[int, ...]) -> None:
        if label != image:
            raise UserError(
                f"{path} has {label[1]}x{label[0]} pixels and its image {image[1]}x{image[0]}; "
                "they must be the same size"
            )


SPLITS = {"train": "training", "val": "validation"}  # ours -> ADE20K's


def open_split(config: ml_collections.ConfigDict, split: str) -> ADE20K:
    """ADE20K's "train" or "val" in `config.data_dir`."""
    return ADE20K(config.data_dir, SPLITS[split])


DATASET = Dataset("ade20k", "segmentation", open_split, class_names=CLASSES)
