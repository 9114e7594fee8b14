"""ADE20K scene parsing from the folders of ADEChallengeData2016.

    ROOT/images/{training,validation}/*.jpg
    ROOT/annotations/{training,validation}/*.png

A label map is an 8-bit greyscale PNG of its image's size: 0 is "other" and ignored, n is
class n - 1. Images are (H, W, 3) uint8 RGB, labels (H, W) uint8 with 255 where ignored.
"""

import os
import pathlib

import cv2
import numpy as np
from PIL import Image

from vssd_jax.errors import UserError

IGNORE = 255
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)

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


# --- Reading ----------------------------------------------------------------------------------


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


def _check_mode(path, png: Image.Image) -> None:
    if png.mode != "L":
        kind = {"P": "a palette PNG"}.get(png.mode, f"a PNG of mode {png.mode}")
        raise UserError(
            f"{path} is {kind}; label maps are 8-bit greyscale PNGs whose pixels are the class "
            "numbers"
        )


class ADE20K:
    """A split as a source of `{"image", "label", "index"}`; `index` is the place in `names`.

    Args:
      root: the folder that holds `images` and `annotations`.
      split: "training" or "validation".
      num_classes: the greatest number in the label maps.

    Raises:
      UserError: folders or pairs are missing. Elements raise it for a label map of another size
        than its image, and as `read_image` and `read_labels` do.
    """

    def __init__(self, root: str | os.PathLike, split: str, *, num_classes: int = 150):
        self._root, self._split = pathlib.Path(root), split
        self.num_classes = num_classes
        images = self._names("images", ".jpg")
        labels = self._names("annotations", ".png")
        for here, there, names in (
            ("images", "annotations", sorted(images - labels)),
            ("annotations", "images", sorted(labels - images)),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(
                    f"{self._path(here, names[0])}{more} without a file in "
                    f"{self._root / there / split}; complete or remove the pairs"
                )
        self.names = sorted(images)

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

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index) -> dict:
        name = self.names[index]
        image = read_image(self._path("images", name))
        path = self._path("annotations", name)
        label = read_labels(path, self.num_classes)
        self._check_size(path, label.shape, image.shape[:2])
        return {"image": image, "label": label, "index": index}

    def size(self, index) -> tuple[int, int]:
        """(H, W) of an element, from the headers of its files alone."""
        name, sizes = self.names[index], []
        for folder in ("images", "annotations"):
            path = self._path(folder, name)
            try:
                with Image.open(path) as header:
                    if folder == "annotations":
                        _check_mode(path, header)
                    sizes.append(header.size[::-1])
            except (OSError, SyntaxError) as error:
                raise UserError(f"{path} is not a picture or is damaged; copy it again") from error
        self._check_size(path, sizes[1], sizes[0])
        return sizes[0]

    @staticmethod
    def _check_size(path, label, image):
        if tuple(label) != tuple(image):
            raise UserError(
                f"{path} has {label[1]}x{label[0]} pixels and its image {image[1]}x{image[0]}; "
                "they must be the same size"
            )


# --- Training ---------------------------------------------------------------------------------


def fitted_size(size: tuple[int, int], short: int, long: int, multiple: int = 1) -> tuple[int, int]:
    """(H, W) scaled so that the short side is `short`, or the long one `long` if that is less.

    Each side is then rounded to the nearest multiple of `multiple`.
    """
    scale = min(long / max(size), short / min(size))
    return tuple(
        max(multiple, multiple * int(int(side * scale + 0.5) / multiple + 0.5)) for side in size
    )


def _resize(array: np.ndarray, size: tuple[int, int], interpolation=cv2.INTER_LINEAR):
    # No antialiasing: the recipe's own resizing has none.
    return cv2.resize(array, size[::-1], interpolation=interpolation)


def normalize(image: np.ndarray) -> np.ndarray:
    """uint8 RGB -> float32 with ImageNet's mean and deviation."""
    return (image.astype(np.float32) - MEAN) / STD


def random_crop_window(label, size, max_ratio: float, rng: np.random.Generator):
    """Two slices of at most `size`, in which no class has more than `max_ratio` of the labels.

    The last of ten tries is taken as it comes.
    """
    for _ in range(10):
        window = []
        for length, crop in zip(label.shape, size, strict=True):
            start = rng.integers(max(length - crop, 0) + 1)
            window.append(slice(start, start + crop))
        window = tuple(window)
        counts = np.bincount(label[window].ravel(), minlength=IGNORE + 1)[:IGNORE]
        if np.count_nonzero(counts) > 1 and counts.max() < max_ratio * counts.sum():
            break
    return window


def _clip(image) -> np.ndarray:
    return np.clip(image, 0, 255).astype(np.uint8)


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random brightness, contrast, saturation and hue, each with probability one half.

    Brightness moves by up to 32, hue by up to 18 of 180 steps; contrast and saturation scale
    by 0.5 to 1.5. Contrast comes before or after the colours, with equal probability.
    """

    def contrast(image):
        return _clip(image * np.float32(rng.uniform(0.5, 1.5))) if rng.integers(2) else image

    if rng.integers(2):
        image = _clip(image + np.float32(rng.uniform(-32, 32)))
    contrast_first = rng.integers(2)
    if contrast_first:
        image = contrast(image)
    saturate, turn = rng.integers(2, size=2)
    if saturate or turn:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        if saturate:
            hsv[..., 1] = _clip(hsv[..., 1] * np.float32(rng.uniform(0.5, 1.5)))
        if turn:
            hsv[..., 0] = (hsv[..., 0].astype(np.int32) + rng.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if contrast_first else contrast(image)


def train_transform(
    element: dict,
    rng: np.random.Generator,
    *,
    crop: int = 512,
    short: int = 512,
    long: int = 2048,
    scales: tuple[float, float] = (0.5, 2.0),
    max_ratio: float = 0.75,
    flip: float = 0.5,
) -> dict:
    """The recipe: random resize, crop, flip and colours; normalised and padded.

    Args:
      element: of an `ADE20K` source.
      rng: the source of everything random.
      crop: side of the result.
      short, long: the image fits into them, times a factor drawn from `scales`.
      max_ratio: greatest share of a class in a crop.
      flip: probability of a horizontal flip.

    Returns:
      `image` (crop, crop, 3) float32, 0 where padded; `label` (crop, crop) uint8, 255 where
      ignored or padded.
    """
    image, label = element["image"], element["label"]
    factor = rng.uniform(*scales)
    size = fitted_size(label.shape, int(short * factor), int(long * factor))
    label = _resize(label, size, cv2.INTER_NEAREST)
    # Only the crop is worth the work of the rest.
    window = random_crop_window(label, (crop, crop), max_ratio, rng)
    image, label = _resize(image, size)[window], label[window]
    if rng.random() < flip:
        image, label = image[:, ::-1], label[:, ::-1]
    image = normalize(photometric_distortion(np.ascontiguousarray(image), rng))
    below, right = crop - label.shape[0], crop - label.shape[1]
    return {
        "image": np.pad(image, ((0, below), (0, right), (0, 0))),
        "label": np.pad(label, ((0, below), (0, right)), constant_values=IGNORE),
    }


# --- Evaluation -------------------------------------------------------------------------------

LABEL_MULTIPLE = 128


def _ceil(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def eval_transform(
    element: dict,
    *,
    short: int = 512,
    long: int = 2048,
    ratios: tuple[float, ...] = (1.0,),
    multiple: int = 1,
    label_multiple: int = LABEL_MULTIPLE,
) -> dict:
    """The whole image once for each of `ratios`, and its labels at their original size.

    An image is never padded: the padding would take part in pyramid pooling, attention and the
    NC-SSD state, which see every token, and change the prediction. To bound the number of
    compiled shapes, `multiple` rounds the sides of the resized image instead. Label maps are
    padded with ignored pixels, which changes nothing.

    Args:
      element: of an `ADE20K` source.
      short, long: the image fits into them, times each of `ratios`.
      multiple: the resized sides are multiples of it. 1 is the paper's protocol; 32 changes the
        aspect ratio by at most 16/`short` for each side and leaves `long`/32 shapes a ratio.
      label_multiple: the same for the sides of the padded labels.

    Returns:
      `images`: a dict `{"0": (h, w, 3) float32, "1": ...}` in the order of `ratios`; `label`
      (H, W) uint8; `size` (2,) int32, the label's height and width before padding; `index`, int32.
    """
    image, label = element["image"], element["label"]
    views = {}
    for index, ratio in enumerate(ratios):
        size = fitted_size(label.shape, int(short * ratio), int(long * ratio), multiple)
        views[str(index)] = normalize(_resize(image, size))
    below, right = (_ceil(side, label_multiple) - side for side in label.shape)
    return {
        "images": views,
        "label": np.pad(label, ((0, below), (0, right)), constant_values=IGNORE),
        "size": np.array(label.shape, np.int32),
        "index": np.int32(element["index"]),
    }


class SizeGrouped:
    """A source in whose order every batch holds elements that `eval_transform` makes equal.

    Incomplete batches are filled with copies, whose `valid` is False.

    Args:
      source: an `ADE20K` source.
      batch_size: the global one.
      short, long, ratios, multiple, label_multiple: as for `eval_transform`.
    """

    def __init__(
        self,
        source: ADE20K,
        batch_size: int,
        *,
        short: int = 512,
        long: int = 2048,
        ratios: tuple[float, ...] = (1.0,),
        multiple: int = 1,
        label_multiple: int = LABEL_MULTIPLE,
    ):
        groups: dict[tuple, list[int]] = {}
        for index in range(len(source)):
            size = source.size(index)
            shapes = [fitted_size(size, int(short * r), int(long * r), multiple) for r in ratios]
            labels = tuple(_ceil(side, label_multiple) for side in size)
            groups.setdefault((*shapes, labels), []).append(index)
        self._source = source
        self._order = []  # (index, whether it is none of the copies)
        for _, indices in sorted(groups.items()):
            copies = -len(indices) % batch_size
            self._order += [(index, True) for index in indices]
            self._order += [(indices[0], False)] * copies

    def __len__(self):
        return len(self._order)

    def __getitem__(self, index) -> dict:
        index, valid = self._order[index]
        return {**self._source[index], "valid": np.bool_(valid)}
