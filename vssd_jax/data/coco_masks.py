"""COCO's two encodings of a mask, polygons and run lengths; and masks on their way to a device."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np


def rasterise(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Polygons or run lengths, as in COCO's JSON, as an (H, W) uint8 mask of 0 and 1."""
    height, width = size
    if isinstance(segmentation, list):
        from pycocotools import mask

        segmentation = mask.merge(mask.frPyObjects(segmentation, height, width))
    runs = segmentation["counts"]
    if not isinstance(runs, list):
        runs = decode_counts(runs)
    # Runs of 0 and 1 in turn, down the columns. (pycocotools' own decoder warns under NumPy 2.)
    return np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs).reshape(width, height).T


def decode_counts(text: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed string; [-1] if it is broken.

    Five bits a character, from the lowest on; bit 5 says that more follow. From the third run on,
    differences to the run before last.
    """
    data = text.encode() if isinstance(text, str) else bytes(text)
    runs: list[int] = []
    value, shift = 0, 0
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


Part = tuple[np.ndarray, int, int]


def pack(parts: Sequence[Part | None], size: int, objects: int) -> dict[str, np.ndarray]:
    """The masks of an image's objects in a buffer, as many as fit into it.

    Args:
      parts: of each object the (h, w) part of its mask outside of which it is 0, and x and y of
        that in the image, x a multiple of 8; or None. At most `objects`.
      size: S, in bytes.
      objects: M.

    Returns:
      masks: (S,) uint8, a bit a pixel: the parts one after another, in rows of whole bytes.
      mask_starts: (M,) int32, the first byte of each.
      mask_boxes: (M, 4) int32, its x1 y1 x2 y2 in the image.
      has_mask: (M,) bool, False where there is no mask or it did not fit.
      masks_left_out: int32, how many did not fit.
    """
    bits = np.zeros(size, np.uint8)
    starts, boxes = np.zeros(objects, np.int32), np.zeros((objects, 4), np.int32)
    there = np.zeros(objects, bool)
    end = left_out = 0
    for i, part in enumerate(parts):
        if part is None:
            continue
        mask, x, y = part
        packed = np.packbits(mask, axis=1)
        if end + packed.size > size:
            left_out += 1
            continue
        bits[end : end + packed.size] = packed.ravel()
        starts[i], boxes[i], there[i] = end, (x, y, x + mask.shape[1], y + mask.shape[0]), True
        end += packed.size
    return {
        "masks": bits,
        "mask_starts": starts,
        "mask_boxes": boxes,
        "has_mask": there,
        "masks_left_out": np.array(left_out, np.int32),
    }


def part_of(mask: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Part:
    """A part for `pack` of a mask after its pixels went to other places.

    Args:
      mask: (h, w) uint8, before.
      rows, columns: (H,) and (W,), for each pixel afterwards its row and its column before.
    """
    across = np.ascontiguousarray(mask.T)  # free: masks are decoded column by column
    y, x, height, width = cv2.boundingRect(across)
    inside = [
        np.flatnonzero((cells >= start) & (cells < start + length))
        for cells, start, length in ((rows, y, height), (columns, x, width))
    ]
    if not all(map(len, inside)):
        return np.zeros((0, 0), np.uint8), 0, 0
    top, left = int(inside[0][0]), int(inside[1][0]) // 8 * 8
    part = across[columns[left : inside[1][-1] + 1]].T
    return np.ascontiguousarray(part)[rows[top : inside[0][-1] + 1]], left, top
