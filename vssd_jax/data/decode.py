"""Encoded pictures to RGB pixels, as Pillow's `convert("RGB")` gives them."""

import io
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from vssd_jax.data.source import Source
from vssd_jax.errors import UserError

# Pictures that cannot be read come alone or in small clusters; a longer run of them is no accident.
MAX_CONSECUTIVE_UNREADABLE = 100

_OPENCV_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


class UnreadableImage(ValueError):
    """Bytes that hold no complete picture: empty, truncated, or of no known format."""


def decode(data: bytes) -> np.ndarray:
    """Decodes a picture of any format that Pillow knows to (H, W, 3) uint8, RGB.

    The file's name plays no part, transparency is dropped, and an EXIF orientation is ignored (as
    timm's and torchvision's loaders do). OpenCV decodes the common JPEG, because it is faster and
    uses the same library; Pillow decodes everything else.

    Raises:
      UnreadableImage: the bytes hold no complete picture.
    """
    try:
        if _is_common_jpeg(data):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _OPENCV_FLAGS)
            if pixels is not None:
                return pixels
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(image)
    except UnidentifiedImageError:
        raise UnreadableImage("no known picture format") from None
    # A damaged file can fail anywhere in a decoder: Pillow raises OSError, SyntaxError, ValueError,
    # struct.error and more, OpenCV cv2.error.
    except Exception as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _is_common_jpeg(data: bytes) -> bool:
    """Whether these are the bytes of a greyscale or YCbCr JPEG of 8 bits, up to its end marker."""
    # Whether OpenCV refuses a JPEG without an end depends on its version.
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in data[-64:]:
        return False
    position = 2
    while position + 9 < len(data) and data[position] == 0xFF:
        if data[position + 1] in (0xC0, 0xC1, 0xC2):  # start of a baseline or progressive frame
            return data[position + 4] == 8 and data[position + 9] in (1, 3)
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return False


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        # 16-bit greyscale: keep the high byte, as Pillow does for 16-bit colour. Its own
        # conversion clips at 255 and leaves an almost white picture.
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as straight to RGB, without a warning
    return np.array(image.convert("RGB"))


class DecodedSource:
    """A random-access source of decoded pictures, without holes.

    Of a `Source`, whose samples have encoded bytes. An element is `image` (H, W, 3) uint8, `label`
    int32, and `replaced` int32: 1 where picture i could not be read and the next readable one
    stands in its place, with its own label.
    """

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """Raises `UserError` where 100 pictures in a row (or all of them) cannot be read."""
        tries = min(len(self), MAX_CONSECUTIVE_UNREADABLE)
        for offset in range(tries):
            try:
                record = self._source[(int(index) + offset) % len(self)]
                image = decode(record["image"])
            except (UnreadableImage, OSError) as error:
                reason = error
                continue
            return {
                "image": image,
                "label": np.int32(record["label"]),
                "replaced": np.int32(offset > 0),
            }
        raise UserError(
            f"{tries} pictures in a row cannot be read, from number {int(index)} of {len(self)} on "
            f"(the last: {reason}). Check the dataset; it seems to be damaged."
        )
