"""COCO's two encodings of a mask: polygons and run lengths."""

from typing import Any

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
