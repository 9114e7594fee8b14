"""What the reports of several tasks have in common."""

from collections.abc import Sequence

import cv2
import numpy as np

WORST = 16  # pictures of the worst mistakes
FEW = 8  # other predictions
SIDE = 400  # pixels; no picture of a report is longer


def spread(count: int, few: int = FEW) -> list[int]:
    """At most `few` of the numbers from 0 to count - 1, at equal distances, the same every time."""
    few = min(few, count)
    return [i * count // few for i in range(few)]


def cells(matrix: np.ndarray) -> np.ndarray:
    """(R, C) counts -> (N, 3) row, column and count of those above 0."""
    rows, columns = np.nonzero(matrix)
    return np.stack((rows, columns, matrix[rows, columns]), axis=1).astype(np.int64)


def pairs(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(M,) numbers each -> (N, 3) row, column and how often this pair occurs."""
    found = np.stack((rows, columns), axis=1).astype(np.int64)
    unique, counts = np.unique(found, axis=0, return_counts=True)
    return np.concatenate((unique, counts[:, None]), axis=1)


def taken_for(confusion: np.ndarray, columns: Sequence[str], num_classes: int) -> list[str]:
    """For each class the name of what it was most often taken for, and how often.

    Args:
      confusion: (N, 3) row, column and count.
      columns: their names.
      num_classes: number of rows to describe; empty for a class without mistakes.
    """
    best: dict[int, tuple[int, int]] = {}
    for row, column, count in confusion.tolist():
        if row != column and count > best.get(row, (0, 0))[0]:
            best[row] = (count, column)
    return [
        f"{columns[best[row][1]]} ({best[row][0]:,})" if row in best else ""
        for row in range(num_classes)
    ]


def reduced(image: np.ndarray, longest: int = SIDE) -> np.ndarray:
    """(H, W, 3) uint8, scaled down to this longer side if it is more."""
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
