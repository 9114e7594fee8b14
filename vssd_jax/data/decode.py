"""Encoded pictures to RGB pixels, as Pillow's `convert("RGB")` gives them."""

import functools
import io
import os
import sys
import warnings
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vssd_jax.data.source import Source
from vssd_jax.errors import UserError
from vssd_jax.host import keep_freed_memory

# The pipeline runs a worker per core, each of which imports this module: OpenCV's own threads would
# only get in their way.
cv2.setNumThreads(0)
keep_freed_memory()

# Pillow's own limit; a small file can claim to be a picture of many gigabytes.
MAX_PIXELS = 89_478_485
# Pillow's names; EPS, PDF and the like would start other programs.
FORMATS = (
    "AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP",
)  # fmt: skip
# Pictures that cannot be read come alone or in small clusters; a longer run of them is no accident.
MAX_CONSECUTIVE_UNREADABLE = 100

_DEPTHS = (8, 10, 12, 14, 16)  # bits of a sensor's values, in files of 16 or 32 bits
_NAMED = 3  # unreadable pictures that a process names; the others are only counted
_named = 0

# The limit here is stricter than the one that Pillow warns at.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(ValueError):
    """Bytes that hold no complete picture: empty, truncated, too large, or of no known format."""


def decode(data: bytes, *, oriented: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes a picture of any of the `FORMATS` to (H, W, 3) uint8, RGB.

    The file's name plays no part and transparency is dropped. OpenCV decodes the common JPEG,
    because it is faster and uses the same library; Pillow decodes everything else.

    Values of more than 8 bits lose their lower bits: of 8, 10, 12, 14 or 16 bits, the fewest that
    hold the greatest value of the picture, the upper 8 stay.

    Args:
      data: the file.
      oriented: whether an EXIF orientation is applied.
      max_pixels: the greatest H * W; the header tells it, before anything is decoded.

    Raises:
      UnreadableImage: the bytes hold no complete picture, or more pixels.
    """
    try:
        size = _common_jpeg_size(data)
        if size is not None:
            _check_pixels(size, max_pixels)
            flags = cv2.IMREAD_COLOR_RGB | (0 if oriented else cv2.IMREAD_IGNORE_ORIENTATION)
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
            if pixels is not None:
                return pixels
        with open_image(data, max_pixels=max_pixels) as image:
            return _to_rgb(image, data, oriented)
    except UnreadableImage:
        raise
    # A damaged file can fail anywhere in a decoder: Pillow raises OSError, SyntaxError, ValueError,
    # struct.error and more, OpenCV cv2.error.
    except Exception as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def open_image(data: bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture of a file by Pillow, of which only the header is read.

    Raises:
      UnreadableImage: it is none of the `FORMATS`, or has more pixels.
    """
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses pictures of twice its limit by itself
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        image = Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        raise UnreadableImage("no known picture format") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more pixels than config.max_pixels={max_pixels}") from None
    _check_pixels(image.size[::-1], max_pixels)
    return image


def upright_size(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) of the picture in a file, its EXIF orientation applied, from the header alone.

    Raises:
      UnreadableImage: it is none of the `FORMATS`, or has more pixels.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            image = open_image(file, max_pixels=max_pixels)
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        except UnreadableImage:
            raise
        except Exception as error:  # of many kinds, see `decode`
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error
        width, height = image.size
    return (width, height) if turned else (height, width)


def decode_annotated(
    data: bytes, size: tuple[int, int], *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """`decode`, upright as annotation tools show a picture.

    Annotations of `size` (H, W) were made on the pixels as they are stored, and these are taken, if
    only they have this size.
    """
    pixels = decode(data, oriented=True, max_pixels=max_pixels)
    if pixels.shape[:2] == tuple(size):
        return pixels
    stored = decode(data, max_pixels=max_pixels)
    return stored if stored.shape[:2] == tuple(size) else pixels


@functools.cache
def _formats() -> tuple[str, ...]:
    """The `FORMATS` that this Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    height, width = size
    if height * width > max_pixels:
        raise UnreadableImage(
            f"{width}x{height} pixels are more than config.max_pixels={max_pixels}"
        )


def _common_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(H, W) of a greyscale or YCbCr JPEG of 8 bits that reaches its end marker, else None."""
    # Whether OpenCV refuses a JPEG without an end depends on its version.
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in data[-64:]:
        return None
    position = 2
    while position + 9 < len(data) and data[position] == 0xFF:
        if data[position + 1] in (0xC0, 0xC1, 0xC2):  # start of a baseline or progressive frame
            if data[position + 4] != 8 or data[position + 9] not in (1, 3):
                return None
            height = int.from_bytes(data[position + 5 : position + 7])
            return height, int.from_bytes(data[position + 7 : position + 9])
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return None


def _to_rgb(image: Image.Image, data: bytes, oriented: bool) -> np.ndarray:
    values = _deep_values(image, data)
    if values is not None:
        turn = image.getexif().get(ExifTags.Base.Orientation)
        image = Image.fromarray(_to_8_bits(values))
        if turn is not None:
            image.getexif()[ExifTags.Base.Orientation] = turn
    if oriented:
        image = ImageOps.exif_transpose(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as straight to RGB, without a warning
    return np.array(image.convert("RGB"))


def _deep_values(image: Image.Image, data: bytes) -> np.ndarray | None:
    """(H, W) or (H, W, 3) values of more than 8 bits; None if the picture has none."""
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    # Pillow has no deep colour: it would keep the upper 8 of 16 bits, whatever is in them.
    if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is not None and values.dtype == np.uint16:
            return values[..., 2::-1] if values.ndim == 3 else values
    return None


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, posinf=0, neginf=0)
        if values.max() <= 1:
            values = values * 255
        values = values.clip(0, 2**31 - 1).astype(np.int32)
    top = int(values.max())
    bits = next((depth for depth in _DEPTHS if top < 2**depth), top.bit_length())
    values = values >> (bits - 8)
    if values.dtype.kind == "i":
        np.maximum(values, 0, out=values)
    return values.astype(np.uint8)


class DecodedSource:
    """A random-access source of decoded pictures, without holes.

    Of a `Source`, whose samples have encoded bytes. An element has `image` (H, W, 3) uint8, `label`
    int32, and `replaced` int32: 1 where picture i could not be read and the next readable one
    stands in its place, with its own label. A sample with a `size` is annotated, see
    `decode_annotated`; its element has all of its fields, and the `index` of picture i.

    Args:
      source: the samples.
      max_pixels: of a picture, see `decode`.
    """

    def __init__(self, source: Source, *, max_pixels: int = MAX_PIXELS):
        self._source, self._max_pixels = source, max_pixels

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """Raises `UserError` where 100 pictures in a row (or all of them) cannot be read."""
        tries = min(len(self), MAX_CONSECUTIVE_UNREADABLE)
        for offset in range(tries):
            number = (int(index) + offset) % len(self)
            name = f"number {number}"
            try:
                record = self._source[number]
                name = record.get("name", name)
                pixels = self._decode(record, name)
            except (UnreadableImage, OSError) as error:
                # The text of an OSError names the file.
                reason = str(error) if isinstance(error, OSError) else f"{name}: {error}"
                _name(reason)
                continue
            element = {"image": pixels, "replaced": np.int32(offset > 0)}
            if "size" in record:
                return {**record, **element, "index": int(index)}
            return {**element, "label": np.int32(record["label"])}
        raise UserError(
            f"{tries} pictures in a row cannot be read, from number {int(index)} of {len(self)} on "
            f"(the last: {reason}). Check the dataset; it seems to be damaged."
        )

    def _decode(self, record: dict[str, Any], name: str) -> np.ndarray:
        if "size" not in record:
            oriented = record.get("oriented", False)
            return decode(record["image"], oriented=oriented, max_pixels=self._max_pixels)
        size = record["size"]
        pixels = decode_annotated(record["image"], size, max_pixels=self._max_pixels)
        if pixels.shape[:2] != tuple(size):
            raise UserError(
                f"{name} is {pixels.shape[1]}x{pixels.shape[0]} pixels, its annotations are for "
                f"{size[1]}x{size[0]}; correct them"
            )
        return pixels


def _name(reason: str) -> None:
    """Says what cannot be read, the first few times."""
    global _named
    if _named < _NAMED:
        _named += 1
        more = "; further ones are only counted" if _named == _NAMED else ""
        print(f"warning: unreadable picture, {reason}{more}", file=sys.stderr, flush=True)
