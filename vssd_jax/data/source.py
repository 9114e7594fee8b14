"""What a dataset's reader offers to the tasks: protocols that it fits without naming them."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """Samples by their number, from 0 to `len(source) - 1`.

    Worker processes get it by pickling, so that large lists are better kept as arrays. `index` may
    be a NumPy integer.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> dict[str, Any]: ...


class LabelledSource(Source, Protocol):
    """A split of a dataset; this is all that classification needs.

    There a sample is a dict with `image`, the bytes of a file of any format that `decode` reads,
    and `label`, an integer. It may have a `name`, for messages, and `oriented`, true where the
    EXIF orientation counts. A source may have a method
    `describe_problems() -> str`, which says what it left out.

    Attributes:
      class_names: of the labels 0, 1, ...
    """

    @property
    def class_names(self) -> Sequence[str]: ...


class DetectionSource(LabelledSource, Protocol):
    """A split for detection.

    A sample is a dict with `image` (encoded bytes), `index` (its number), `image_id`, `size`
    (height, width), `boxes` (N, 4) float32 x1 y1 x2 y2 in pixels, `labels` (N,) int32, and
    `segmentations`, one for each object, which `coco_masks.rasterise` reads, or None where there is
    no mask.

    Attributes:
      category_ids: (classes,) the id of each label in the ground truth.
      image_ids: of the samples.
      sizes: (samples, 2) heights and widths.
      object_counts, mask_counts: (samples,) numbers of objects, and of those with a mask.
      class_counts: (samples, classes) numbers of objects.
    """

    @property
    def category_ids(self) -> np.ndarray: ...

    @property
    def image_ids(self) -> Sequence[int | str]: ...

    @property
    def sizes(self) -> np.ndarray: ...

    @property
    def object_counts(self) -> np.ndarray: ...

    @property
    def mask_counts(self) -> np.ndarray: ...

    @property
    def class_counts(self) -> np.ndarray: ...

    def relabel(self, class_names: Sequence[str]) -> None:
        """Numbers the classes in another order; a UserError if one of them is not in it."""
        ...

    def ground_truth(self) -> dict[str, Any]:
        """The images, annotations and categories in COCO's instances format, for pycocotools.

        Ids of annotations start at 1: pycocotools takes an annotation 0 for "no match".
        """
        ...


class SegmentationSource(LabelledSource, Protocol):
    """A split for semantic segmentation.

    A sample is a dict with `image` (encoded bytes), `label` (H, W) uint8 with 255 where ignored,
    `size` (H, W), and `index`, its number.

    Attributes:
      image_names: of the samples, for the files of predictions.
    """

    @property
    def image_names(self) -> Sequence[str]: ...

    def size(self, index: Any) -> tuple[int, int]:
        """(H, W) of a label map, from its header; `UnreadableImage` if it is damaged."""
        ...
