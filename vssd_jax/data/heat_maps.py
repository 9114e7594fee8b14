"""Maps of numbers drawn as colours, beside the picture that they belong to or over it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from vssd_jax.data.drawing import contact_sheet

# Viridis, from least to most: equal steps look equal, on a screen and on grey paper.
_ANCHORS = (
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 "
    "84d44b addc30 d8e219 fde725"
)
_OVER = 0.7  # of the colour in a map over a picture
_GREY = 224
_NOT_FINITE = (128, 128, 128)
_MARK = (255, 0, 0)


class Tile(NamedTuple):
    """A map to draw.

    Attributes:
      values: (h, w) numbers, or (h, w, 3) from 0 to 1 that are colours themselves.
      caption: lines below it; how far the colours reach comes after them.
      cell: pixels of the picture on each side of a cell.
      low, high: the numbers of the first and the last colour; None takes those of the map.
      over: whether it lies over the picture, or stands alone.
      decades: draws the logarithm of numbers above 0, down to this many tenths of `high`.
    """

    values: np.ndarray
    caption: Sequence[str] = ()
    cell: int = 1
    low: float | None = None
    high: float | None = None
    over: bool = False
    decades: int | None = None


def viridis(values: np.ndarray) -> np.ndarray:
    """(...) numbers from 0 to 1, which are cut to it, -> (..., 3) uint8 colours."""
    anchors = np.array([list(bytes.fromhex(anchor)) for anchor in _ANCHORS.split()])
    places = np.linspace(0, 1, len(anchors))
    inside = np.nan_to_num(values)
    channels = [np.interp(inside, places, anchors[:, i]) for i in range(3)]
    return np.round(np.stack(channels, -1)).astype(np.uint8)


def draw_heat_maps(
    image: np.ndarray | None,
    tiles: Sequence[Tile],
    *,
    mark: tuple[int, int, int, int] | None = None,
    columns: int = 5,
    tile: int = 240,
) -> Image.Image:
    """The picture and its maps in rows, each with its scale of colours.

    Args:
      image: (H, W, 3) uint8; None draws the maps alone.
      tiles: their maps; what of the last cells is beyond the picture is cut off, and what of the
        picture no cell covers stays grey.
      mark: left, top, right and bottom of a rectangle to mark, in pixels.
      columns, tile: see `vssd_jax.data.drawing.contact_sheet`.
    """
    drawn: list[tuple[np.ndarray, Sequence[str]]] = []
    if image is not None:
        drawn.append((_marked(image, mark), [f"the picture, {image.shape[1]}x{image.shape[0]}"]))
    for one in tiles:
        colors, scale = _colors(one)
        colors = colors.repeat(one.cell, 0).repeat(one.cell, 1)
        if image is not None:
            colors = _laid_over(image, colors, _OVER if one.over else 1.0)
        colors = _marked(colors, mark)
        caption = list(one.caption)
        if scale is not None:
            colors = _with_bar(colors)
            caption.append(scale)
        drawn.append((colors, caption))
    return contact_sheet(drawn, columns=columns, tile=tile)


def _colors(tile: Tile) -> tuple[np.ndarray, str | None]:
    """(h, w, 3) uint8, and what the first and last colour stand for."""
    values = np.asarray(tile.values, np.float64)
    if values.ndim == 3:
        return np.round(255 * values.clip(0, 1)).astype(np.uint8), None
    finite = values[np.isfinite(values)]
    low = tile.low if tile.low is not None else finite.min(initial=np.inf)
    high = tile.high if tile.high is not None else finite.max(initial=-np.inf)
    if not len(finite):
        return viridis(np.zeros_like(values)), "not finite"
    if tile.decades is not None:
        if high <= 0:
            return viridis(np.zeros_like(values)), "0"
        low = high * 10.0**-tile.decades
        values, scale = np.log(np.maximum(values, low) / low), np.log(high / low)
        text = f"{low:.2g} to {high:.2g}, logarithmic"
    else:
        values, scale = values - low, high - low
        text = f"{low:.3g} to {high:.3g}"
    if scale > 0:
        colors = viridis(values / scale)
    else:  # the least colour would say that there is nothing
        colors, text = viridis(np.full_like(values, 0.5)), f"{low:.3g} everywhere"
    if missing := int(values.size - len(finite)):
        colors[~np.isfinite(values)] = _NOT_FINITE
        text += f", {missing} not finite"
    return colors, text


def _laid_over(image: np.ndarray, colors: np.ndarray, opacity: float) -> np.ndarray:
    """(H, W, 3) uint8: colours over the picture in grey; where they are opaque, over plain grey."""
    result = np.full(image.shape, _GREY, np.float64)
    if opacity < 1:
        result[:] = (image @ np.array((0.299, 0.587, 0.114)))[..., None]
    height, width = min(len(image), len(colors)), min(image.shape[1], colors.shape[1])
    covered = result[:height, :width]
    covered[:] = opacity * colors[:height, :width] + (1 - opacity) * covered
    return np.round(result).astype(np.uint8)


def _with_bar(colors: np.ndarray) -> np.ndarray:
    """With the scale of colours below, from left to right."""
    height, width = colors.shape[:2]
    thick = max(1, round(max(height, width) / 24))
    bar = np.broadcast_to(viridis(np.linspace(0, 1, width)), (thick, width, 3))
    gap = np.full((thick, width, 3), _GREY, np.uint8)
    return np.concatenate((colors, gap, bar))


def _marked(pixels: np.ndarray, mark: tuple[int, int, int, int] | None) -> np.ndarray:
    if mark is None:
        return pixels
    picture = Image.fromarray(np.array(pixels, order="C"))
    left, top, right, bottom = mark
    thick = max(1, max(picture.size) // 120)
    frame = left, top, max(left, right - 1), max(top, bottom - 1)
    ImageDraw.Draw(picture).rectangle(frame, outline=_MARK, width=thick)
    return np.asarray(picture)
