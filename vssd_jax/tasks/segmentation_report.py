"""What a report says of label maps: IoU of the classes, confusions, the worst pictures."""

import heapq
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from vssd_jax.data.drawing import draw_segmentation
from vssd_jax.data.source import SegmentationSource, Source
from vssd_jax.tasks import report_parts as parts
from vssd_jax.tasks import segmentation_metrics as metrics
from vssd_jax.tasks.protocol import Confusion, Gallery, Picture, Section, Table


def stride(shape: tuple[int, int]) -> int:
    """Every how manyth pixel of label maps (H, W) is kept for the report."""
    return -(-max(shape) // parts.SIDE)


class Prediction(NamedTuple):
    """A picture's number, its mean IoU, and every `stride`-th pixel of the predicted label map."""

    number: int
    iou: float
    labels: np.ndarray  # (h, w) uint8
    stride: int


class Kept:
    """The predictions with the lowest IoU and a few others, of `count` pictures.

    Attributes:
      counted: number of pictures so far in which something is labelled.
    """

    def __init__(self, count: int) -> None:
        self._few = set(parts.spread(count))
        self._others: list[Prediction] = []
        self._worst: list[tuple[float, int, Prediction]] = []  # a heap, the best first
        self.counted = 0

    def add(self, output: dict[str, Any]) -> None:
        """Takes `index`, `size`, `valid`, `picture_iou`, `small` labels and `step` of a batch."""
        for i in np.flatnonzero(output["valid"] & np.isfinite(output["picture_iou"])):
            index, iou = int(output["index"][i]), float(output["picture_iou"][i])
            self.counted += 1
            full = len(self._worst) == parts.WORST
            worse = not full or -iou > self._worst[0][0]
            if not worse and index not in self._few:
                continue
            step = int(output["step"])
            height, width = (-(-int(side) // step) for side in output["size"][i])
            # A copy: a view would keep the whole batch.
            one = Prediction(index, iou, output["small"][i, :height, :width].copy(), step)
            if index in self._few:
                self._others.append(one)
            if worse:
                (heapq.heappushpop if full else heapq.heappush)(self._worst, (-iou, -index, one))

    @property
    def worst(self) -> list[Prediction]:
        """The lowest IoU first."""
        return [entry[2] for entry in sorted(self._worst, key=lambda e: (-e[0], -e[1]))]

    @property
    def few(self) -> list[Prediction]:
        """In the order of the pictures."""
        return sorted(self._others, key=lambda one: one.number)


def sections(
    source: SegmentationSource,
    decoded: Source,
    confusion: np.ndarray,
    kept: Kept,
    names: Sequence[str],
) -> list[Section]:
    """The report's sections of an evaluation.

    Args:
      source: of the pictures.
      decoded: its samples with pixels.
      confusion: (K, K + 1) pixels by label and prediction, see `confusion_matrix`.
      kept: of the same evaluation.
      names: of the K classes.
    """
    classes, cells = metrics.per_class(confusion), parts.cells(confusion)
    columns = [*names, "no class"]
    others = parts.taken_for(cells, columns, len(names))
    iou, accuracy, share = (classes[name] for name in ("iou", "accuracy", "pixels"))
    order = np.lexsort((-share, iou))

    def pictures(chosen: Iterable[Prediction]) -> list[Picture]:
        shown = []
        for one in chosen:
            element = decoded[one.number]
            if element["replaced"]:  # it could be read a moment ago
                continue
            height, width = one.labels.shape
            image = element["image"]
            if image.shape[:2] != (height, width):
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            true = element["label"][:: one.stride, :: one.stride]
            views = [
                ("predicted", np.asarray(draw_segmentation(image, one.labels, names))),
                ("labels", np.asarray(draw_segmentation(image, true, names))),
            ]
            caption = [f"IoU {one.iou:.1%}", source.image_names[one.number]]
            shown.append(Picture(views, caption))
        return shown

    return [
        Table(
            "Classes",
            ("class", "IoU", "accuracy", "share of the pixels", "most often taken for (pixels)"),
            [
                (names[i], float(iou[i]), float(accuracy[i]), float(share[i]), others[i])
                for i in order
            ],
            "The lowest IoU first. Accuracy is the share of a class's pixels that are right.",
        ),
        Confusion(
            "Confusion matrix",
            names,
            columns if confusion[:, -1].any() else names,
            cells,
            "Pixels by class (rows) and predicted class (columns).",
        ),
        Gallery(
            "Worst mistakes",
            pictures(kept.worst),
            f"The lowest mean IoU of {kept.counted:,} pictures, over the classes that are labelled "
            "or predicted in each.",
        ),
        Gallery(
            "A few predictions",
            pictures(kept.few),
            "At equal distances through the pictures for evaluation.",
        ),
    ]
