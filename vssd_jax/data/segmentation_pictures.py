"""Predicted label maps as pictures: label PNGs, and overlays with a legend."""

import colorsys
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vssd_jax.errors import UserError

_OPACITY = 0.55
_ROW = 18  # height of a line of the legend in pixels


def class_colors(num_classes: int) -> np.ndarray:
    """(num_classes, 3) uint8 colours, far apart for neighbouring numbers."""
    golden = 0.618033988749895  # steps of the golden section spread evenly around the circle
    return np.array(
        [
            [round(255 * x) for x in colorsys.hsv_to_rgb(i * golden % 1, 0.9 - 0.4 * (i % 2), 0.95)]
            for i in range(num_classes)
        ],
        np.uint8,
    )


def overlay(image: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """The picture with the classes' colours over it, and below it a legend of those present.

    Args:
      image: (H, W, 3) uint8 RGB.
      labels: (H, W) uint8, the predicted classes; 255 for none.
      classes: their names.
    """
    colors = class_colors(len(classes))
    shown = np.pad(colors, ((0, 256 - len(colors)), (0, 0)))  # no class: black
    blend = (1 - _OPACITY) * image + _OPACITY * shown[labels]
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    entries = [
        (f"{classes[i]} {100 * counts[i] / labels.size:.1f}%", tuple(colors[i].tolist()))
        for i in np.argsort(-counts[: len(classes)], kind="stable")
        if counts[i]
    ]
    if undecided := np.count_nonzero(labels >= len(classes)):
        entries.append((f"no class {100 * undecided / labels.size:.1f}%", (0, 0, 0)))
    font = ImageFont.load_default(12)
    widest = max(int(font.getlength(text)) for text, _ in entries) + _ROW + 12
    width = max(labels.shape[1], widest)
    columns = width // widest
    rows = -(-len(entries) // columns)
    canvas = Image.new("RGB", (width, labels.shape[0] + rows * _ROW + 6), "white")
    canvas.paste(Image.fromarray(np.rint(blend).astype(np.uint8)))
    draw = ImageDraw.Draw(canvas)
    for index, (text, color) in enumerate(entries):
        x = 4 + index % columns * widest
        y = labels.shape[0] + 4 + index // columns * _ROW
        draw.rectangle((x, y, x + _ROW - 6, y + _ROW - 6), fill=color, outline="black")
        draw.text((x + _ROW, y - 1), text, fill="black", font=font)
    return canvas


def save_prediction(
    folder: str | os.PathLike,
    name: str,
    image: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Writes `labels/NAME.png` (class n as n + 1, as in the annotations,
    and 0 for no class) and `overlays/NAME.png`.

    Args:
      folder: made if need be.
      name: of the picture, without suffix.
      image: (H, W, 3) uint8 RGB.
      labels: (H, W) uint8, the predicted classes; 255 for none.
      classes: their names.

    Raises:
      UserError: the folder cannot be written.
    """
    pictures = {
        "labels": Image.fromarray((labels + 1).astype(np.uint8)),
        "overlays": overlay(image, labels, classes),
    }
    try:
        for kind, picture in pictures.items():
            path = pathlib.Path(folder) / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            picture.save(part, "png")
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
