"""Predicted label maps as files: label PNGs, and overlays with a legend."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vssd_jax.data.drawing import draw_segmentation
from vssd_jax.errors import UserError


def save_prediction(
    folder: str | os.PathLike,
    name: str,
    image: np.ndarray | None,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    reduce_zero_label: bool = True,
) -> None:
    """Writes `labels/NAME.png` and `overlays/NAME.png` (see `draw_segmentation`).

    The numbers are those of the annotations: class n is n + 1 and 0 no class with
    `reduce_zero_label`, otherwise class n is n and 255 no class.

    Args:
      folder: made if need be.
      name: of the picture, without suffix.
      image: (H, W, 3) uint8 RGB; None leaves the overlay out.
      labels: (H, W) uint8, the predicted classes; 255 for none.
      classes: their names.
      reduce_zero_label: see above.

    Raises:
      UserError: the folder cannot be written.
    """
    pictures = {"labels": Image.fromarray((labels + reduce_zero_label).astype(np.uint8))}
    if image is not None:
        pictures["overlays"] = draw_segmentation(image, labels, classes)
    try:
        for kind, picture in pictures.items():
            path = pathlib.Path(folder) / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            picture.save(part, "png")
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
