"""Predictions drawn so that they can be read on any picture: small or large, long, dark, noisy.

Text and lines grow with the picture. A picture whose shorter side is below `LEAST_SIDE` pixels is
first scaled up by a whole factor, without smoothing, so the result may be larger than the input;
one that is still narrower than that gets grey margins. Names are drawn in fonts that have their
characters; without such a font `readable_name` stands for a name.
"""

import colorsys
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 200  # pixels
_LONGEST = 2000  # pixels; no picture is scaled up beyond
_LEAST_TEXT = 12  # pixels
_OPACITY = 0.55  # of the colours of segmentation
_MASK_OPACITY = 0.4  # of detections' masks, which lie over each other
_MOST_COVERED = 0.3  # of the picture by labels with names
_BLACK, _WHITE, _GREY = (0, 0, 0), (255, 255, 255), (224, 224, 224)
_ELLIPSIS = "…"

Color = tuple[int, int, int]


# --- Colours --------------------------------------------------------------------------------------


def class_colors(num_classes: int) -> np.ndarray:
    """(num_classes, 3) uint8 colours, far apart for neighbouring numbers.

    The colour of a class doesn't depend on `num_classes`.
    """
    return np.array([_color(i) for i in range(num_classes)], np.uint8).reshape(num_classes, 3)


def _color(number: int) -> Color:
    golden = 0.618033988749895  # steps of the golden section spread evenly around the circle
    saturation = 0.9 - 0.4 * (number % 2)
    red, green, blue = colorsys.hsv_to_rgb(number * golden % 1, saturation, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def contrast(first: Sequence[int], second: Sequence[int]) -> float:
    """The contrast ratio of two sRGB colours after WCAG 2, from 1 (the same) to 21."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def ink(color: Sequence[int]) -> Color:
    """Black or white, whichever has more contrast with a colour: a ratio of at least 4.58."""
    return max(_BLACK, _WHITE, key=lambda candidate: contrast(color, candidate))


def _luminance(color: Sequence[int]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
              for c in (value / 255 for value in color)]  # fmt: skip
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# --- Fonts and names ------------------------------------------------------------------------------

_DEFAULT_FONT = ""  # Pillow's own, which has no file
_PREFERRED = ("dejavusans", "notosans-regular", "arial", "segoeui", "helvetica", "liberationsans")
_STYLES = re.compile("bold|italic|oblique|light|thin|black|medium|condensed|mono|serif", re.I)
# Beyond this many fonts the search for a character that is in none of them takes seconds.
_MOST_FONTS = 200
_NO_CHARACTER = "\U0010ffff"  # is in no font, so that it is drawn as .notdef is


@functools.cache
def font_files() -> tuple[str, ...]:
    """The fonts to search for characters, the best first; the last is "", Pillow's own.

    Those of the system, from fontconfig and from the usual folders; where there are none, the one
    that comes with matplotlib.
    """
    found = sorted({*_fontconfig_files(), *_folder_files()}, key=_rank)[:_MOST_FONTS]
    if not found:
        spec = importlib.util.find_spec("matplotlib")
        if spec is not None and spec.origin is not None:
            path = pathlib.Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
            found = [str(file) for file in path.glob("DejaVuSans.ttf")]
    return (*found, _DEFAULT_FONT)


def _rank(file: str) -> tuple[int, bool, str]:
    name = pathlib.PurePath(file).stem.lower()
    place = _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED)
    return place, _STYLES.search(name) is not None, file


def _fontconfig_files() -> list[str]:
    program = shutil.which("fc-list")
    if program is None:
        return []
    try:
        answer = subprocess.run(
            [program, "--format=%{file}\n"], capture_output=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [file for file in os.fsdecode(answer.stdout).splitlines() if _is_font(file)]


def _folder_files() -> list[str]:
    home, environment = os.path.expanduser("~"), os.environ
    folders = [
        "/usr/share/fonts", "/usr/local/share/fonts", f"{home}/.fonts",
        f"{home}/.local/share/fonts",
        "/System/Library/Fonts", "/Library/Fonts", f"{home}/Library/Fonts",
    ]  # fmt: skip
    if windows := environment.get("WINDIR"):
        folders.append(os.path.join(windows, "Fonts"))
    if local := environment.get("LOCALAPPDATA"):
        folders.append(os.path.join(local, "Microsoft", "Windows", "Fonts"))
    return [
        os.path.join(folder, file)
        for start in folders
        for folder, _, files in os.walk(start)
        for file in files
        if _is_font(file)
    ]


def _is_font(file: str) -> bool:
    # "Last resort" fonts have a glyph for every character: a frame that says nothing of it.
    name = os.path.basename(file).lower()
    return name.endswith((".ttf", ".otf", ".ttc")) and not name.startswith("lastresort")


def readable_name(name: str, number: int | None = None) -> str:
    """A name in ASCII: its letters without marks, what has no ASCII form left out, and the number.

    "père" and 3 give "pere 3", a name without any ASCII form "class 3". Without a number they give
    "pere" and "?".
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = " ".join(re.sub(r"[^ -~]", " ", plain).split())
    if not any(c.isalnum() for c in plain):  # all that is left of a name may be its hyphen
        plain = ""
    if number is None:
        return plain or "?"
    return f"{plain or 'class'} {number}"


def shown_name(name: str, number: int | None = None) -> str:
    """A name as it is drawn: itself if fonts have its characters, else its `readable_name`."""
    name = _clean(name)
    if not name:
        return readable_name(name, number)
    files = font_files()
    if all(any(_has(file, character) for file in files) for character in _visible(name)):
        return name
    return readable_name(name, number)


def _name_of(class_names: Sequence[str], label: int) -> str:
    return shown_name(class_names[label] if 0 <= label < len(class_names) else "", label)


def _clean(text: str) -> str:
    """One line, composed, without characters that only steer how others are drawn."""
    kept = (c for c in text if c.isspace() or not _steers(c))
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf") or "\ufe00" <= character <= "\ufe0f"


def _visible(text: str) -> set[str]:
    return {character for character in text if not character.isspace()}


@functools.lru_cache(maxsize=512)
def _font(file: str, size: int, *, shaped: bool = True) -> ImageFont.FreeTypeFont | None:
    """None for a font that cannot be read or doesn't have the size, such as of colour bitmaps."""
    if file == _DEFAULT_FONT:
        return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))
    try:
        return ImageFont.truetype(
            file, size, layout_engine=None if shaped else ImageFont.Layout.BASIC
        )
    except OSError:
        return None


@functools.cache
def _has(file: str, character: str) -> bool:
    """Whether a font has a visible character: its mask isn't empty, and not that of .notdef."""
    # Shaping would add a dotted circle to a lone mark, which then differs from .notdef.
    font = _font(file, 16, shaped=False)
    if font is None:
        return False
    try:
        glyph, missing = font.getmask(character), font.getmask(_NO_CHARACTER)
    except (OSError, ValueError):
        return False
    pixels = bytes(glyph)
    return any(pixels) and (glyph.size != missing.size or pixels != bytes(missing))


# --- Text -----------------------------------------------------------------------------------------


def text_size(width: int, height: int) -> int:
    """The height of text in pixels on a picture of this size (the enlarged one, if it is small).

    1/40 of the shorter side, and at least 12. A panorama is looked at as a whole and gets more,
    1/160 of the longer side, as far as its height and width have room for that.
    """
    whole = min(max(width, height) / 160, height / 5, width / 16)
    return max(_LEAST_TEXT, round(min(width, height) / 40), round(whole))


@functools.lru_cache(maxsize=8192)
def _layout(
    text: str, size: int, files: tuple[str, ...]
) -> tuple[tuple[str, ImageFont.FreeTypeFont], ...]:
    """A line's parts and their fonts: one font if any has all of it.

    Two spaces end a part: what follows would else be taken into a name that runs to the left.
    Scripts that need more height than a line has are drawn smaller.
    """
    characters = _visible(text)
    whole = [file for file in files if all(_has(file, c) for c in characters)][:1]
    parts: list[tuple[str, str]] = []
    for piece in re.split("(?=  )", text):
        last = None
        for c in piece:
            if whole:
                file = whole[0]
            elif last is not None and (c.isspace() or _has(last, c)):
                file = last
            else:
                file = next((f for f in files if _has(f, c)), _DEFAULT_FONT)
            if file == last:
                parts[-1] = parts[-1][0] + c, file
            else:
                parts.append((c, file))
            last = file
    scale = 1.0
    for part, file in parts:
        _, top, _, bottom = _drawn_font(file, size).getbbox(part, anchor="ls")
        scale = min(scale, size / max(-top, size), 0.3 * size / max(bottom, 0.3 * size))
    size = max(1, int(size * scale))
    return tuple((part, _drawn_font(file, size)) for part, file in parts)


def _drawn_font(file: str, size: int) -> ImageFont.FreeTypeFont:
    # A font may have some sizes only.
    return _font(file, size) or cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


def _text_width(text: str, size: int) -> int:
    return int(-(-sum(f.getlength(part) for part, f in _layout(text, size, font_files())) // 1))


def _line_height(size: int) -> int:
    return int(-(-1.3 * size // 1))


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, color: Color
) -> None:
    """A line of text whose upper left corner is at `place`."""
    x, y = float(place[0]), place[1] + size  # the base line
    for part, font in _layout(text, size, font_files()):
        pen.text((x, y), part, fill=color, font=font, anchor="ls")
        x += font.getlength(part)


def _fitting(text: str, width: int, size: int, end: str = "") -> int:
    """How many of the text's characters, with `end` after them, are no wider than `width`."""
    least, most = 0, len(text) + 1
    while most - least > 1:
        middle = (least + most) // 2
        fits = _text_width(text[:middle].rstrip() + end, size) <= width
        least, most = (middle, most) if fits else (least, middle)
    return least


def _cut(text: str, width: int, size: int, end: str = "") -> str:
    """The text and its end, the text cut with an ellipsis if both are wider than `width` pixels."""
    if _text_width(text + end, size) <= width:
        return text + end
    kept = _fitting(text, width, size, _ELLIPSIS + end)
    if kept == 0 and end:  # not even a letter has a place beside the end
        return _cut(end.strip(), width, size)
    return text[:kept].rstrip() + _ELLIPSIS + end


def _wrapped(text: str, width: int, size: int, most: int = 2) -> list[str]:
    """The text in at most `most` lines no wider than `width` pixels; the last is cut if need be."""
    lines: list[str] = []
    while len(lines) < most - 1 and _text_width(text, size) > width:
        fits = max(_fitting(text, width, size), 1)
        space = text.rfind(" ", 0, fits + 1)
        # A word of more than half a line is broken, as are scripts without spaces.
        cut = space if space > fits // 2 else fits
        lines.append(text[:cut].rstrip())
        text = text[cut:].lstrip()
    return [*lines, _cut(text, width, size)]


# --- Places of labels -----------------------------------------------------------------------------


class Rectangle(NamedTuple):
    """Of whole pixels; right and bottom are the first ones outside."""

    left: int
    top: int
    right: int
    bottom: int


class Placement(NamedTuple):
    """Which of a label's sizes was free, and where."""

    choice: int
    rectangle: Rectangle


def place_labels(
    boxes: Sequence[Rectangle],
    sizes: Sequence[Sequence[tuple[int, int]]],
    bounds: tuple[int, int],
    *,
    most_covered: float = 1.0,
) -> list[Placement | None]:
    """Places for the labels of boxes, inside the picture and free of one another.

    The labels choose in turn, so the most important ones come first: above the box, inside at its
    top, below, beside, further down inside. A place that hides most of another box is taken only
    if there is no better.

    Args:
      boxes: inside the picture.
      sizes: of each label, (width, height) in pixels, with smaller ones to fall back to.
      bounds: (width, height) of the picture.
      most_covered: the share of the picture that labels may cover before the smallest size of each
        is all that is tried.

    Returns:
      For each box the first of its label's sizes that has a place, or None if none has.
    """
    corners = np.array(boxes, np.int64).reshape(-1, 4)
    placed = np.zeros((0, 4), np.int64)
    room = most_covered * bounds[0] * bounds[1]
    result: list[Placement | None] = []
    for index, (box, options) in enumerate(zip(boxes, sizes, strict=True)):
        others = np.delete(corners, index, 0)
        found = None
        for choice, size in enumerate(options):
            if size[0] * size[1] > room and choice < len(options) - 1:
                continue
            free = [r for r in _candidates(box, size, bounds) if not _overlaps(placed, r).any()]
            if free:
                found = Placement(choice, next((r for r in free if not _hides(others, r)), free[0]))
                placed = np.vstack((placed, found.rectangle))
                room -= size[0] * size[1]
                break
        result.append(found)
    return result


def _candidates(
    box: Rectangle, size: tuple[int, int], bounds: tuple[int, int]
) -> Iterator[Rectangle]:
    width, height = size
    if width > bounds[0] or height > bounds[1]:
        return
    left, right = box.left, box.right - width
    columns = (left, right, (left + right) // 2)
    places = [(x, box.top - height) for x in columns]
    places += [(x, box.top) for x in columns]
    places += [(x, y) for y in (box.bottom, box.bottom - height) for x in columns]
    places += [
        (x, y)
        for y in (box.top, box.bottom - height, (box.top + box.bottom - height) // 2)
        for x in (box.right, box.left - width)
    ]
    rows = range(box.top + height, box.bottom - 2 * height, height)
    places += [(x, y) for y in list(rows)[:12] for x in columns]
    for x, y in places:
        x = min(max(x, 0), bounds[0] - width)
        y = min(max(y, 0), bounds[1] - height)
        yield Rectangle(x, y, x + width, y + height)


def _overlaps(rectangles: np.ndarray, one: Rectangle) -> np.ndarray:
    """(N,) the pixels that each of (N, 4) rectangles shares with one."""
    size = np.minimum(rectangles[:, 2:], one[2:]) - np.maximum(rectangles[:, :2], one[:2])
    return np.maximum(size, 0).prod(1)


def _hides(rectangles: np.ndarray, one: Rectangle) -> bool:
    areas = (rectangles[:, 2:] - rectangles[:, :2]).prod(1)
    return bool((_overlaps(rectangles, one) > 0.5 * areas).any())


# --- Pictures -------------------------------------------------------------------------------------


def draw_detections(
    image: np.ndarray,
    *,
    boxes: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray | None,
    masks: Sequence[np.ndarray] | None = None,
    class_names: Sequence[str],
    max_entries: int = 48,
) -> Image.Image:
    """The picture with boxes, masks, names and scores in percent, the best on top.

    A label is replaced by a number, whose name is in a legend below the picture, if it has no
    place, or if it would be wide and the picture narrow, or if labels cover 0.3 of the picture. A
    box with no place even for a number is in the legend without one.

    Args:
      image: (H, W, 3) uint8 RGB.
      boxes: (N, 4) x1 y1 x2 y2 in pixels of the image; they are cut to it.
      labels: (N,) classes.
      scores: (N,) from 0 to 1; None draws no numbers.
      masks: (H, W) bool, one for each box, or None.
      class_names: of all classes.
      max_entries: of the legend; the others are counted in its last line.

    Returns:
      An RGB picture, which may be larger than the input.

    Raises:
      ValueError: the numbers of boxes, labels, scores and masks differ, or a mask's shape is not
        the image's.
    """
    values = [""] * len(labels)
    if scores is None:
        scores = np.ones(len(labels))
    else:
        values = [f"  {100 * score:.0f}%" for score in scores]
    if len({len(a) for a in (boxes, labels, scores, boxes if masks is None else masks)}) > 1:
        raise ValueError("there must be as many boxes as labels, scores and masks")
    picture, factor = _enlarged(image)
    size = text_size(*picture.size)
    line = max(1, round(size / 8))
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    numbers = [int(label) for label in labels]
    colors = [_color(number) for number in numbers]
    if masks is not None:
        for i in order[::-1]:
            if masks[i].shape != image.shape[:2]:
                raise ValueError(f"a mask is {masks[i].shape}, its image {image.shape[:2]}")
            _draw_mask(picture, np.asarray(masks[i], bool), factor, colors[i], line)
    frames = [_frame(box, factor, picture.size) for box in np.asarray(boxes).reshape(-1, 4)]
    for i in order[::-1]:
        _draw_frame(picture, frames[i], colors[i], line)
    names = [_name_of(class_names, number) for number in numbers]
    pad = max(2, size // 4)
    height = _line_height(size) + pad
    tag_width = _text_width("0" * len(str(len(frames))), size) + 2 * pad
    widths = [_text_width(n + v, size) + 2 * pad for n, v in zip(names, values, strict=True)]
    sizes = [
        # A longer label would hide too much; in the legend a name has all the width.
        [(width, height), (tag_width, height)]
        if width <= 0.6 * picture.width
        else [(tag_width, height)]
        for width in widths
    ]
    placements = place_labels(
        [frames[i] for i in order],
        [sizes[i] for i in order],
        picture.size,
        most_covered=_MOST_COVERED,
    )
    entries: list[_Entry] = []
    tags = 0
    for i, placement in zip(order, placements, strict=True):
        text = ""
        if placement is not None:
            if whole := placement.choice == len(sizes[i]) - 2:
                text = names[i] + values[i]
            else:
                tags += 1
                text = str(tags)
            _draw_plate(picture, placement.rectangle, text, size, colors[i])
            if whole:
                continue
        entries.append(_Entry(colors[i], names[i], values[i], text))
    rest = len(entries) - max_entries
    more = f"{_ELLIPSIS} and {rest} more" if rest > 0 else ""
    return _with_strip(picture, functools.partial(_legend, entries[:max_entries], more, size=size))


def draw_segmentation(
    image: np.ndarray,
    label_map: np.ndarray,
    class_names: Sequence[str],
    *,
    max_entries: int = 48,
) -> Image.Image:
    """The picture with the classes' colours over it, and below it a legend with their shares.

    Args:
      image: (H, W, 3) uint8 RGB.
      label_map: (H, W) integers, the classes; 255 and all that has no name is no class, and shows
        the picture as it is.
      class_names: of all classes.
      max_entries: of the legend, the largest shares first; the others are added up in its last
        line.

    Returns:
      An RGB picture, which may be larger than the input.
    """
    picture, factor = _enlarged(image)
    size = text_size(*picture.size)
    none = len(class_names)
    known = (label_map >= 0) & (label_map < none) & (label_map != 255)
    index = np.where(known, label_map, 0).astype(np.min_scalar_type(none), copy=False)
    np.copyto(index, none, where=~known)
    colors = np.vstack((class_colors(none), np.zeros((1, 3), np.uint8)))
    if none < 256:  # a palette is several times as fast as an index
        cover = Image.fromarray(index)
        cover.putpalette(colors.tobytes())
        cover = cover.convert("RGB")
    else:
        cover = Image.fromarray(colors[index])
    opacity = Image.fromarray(known * np.uint8(round(255 * _OPACITY)))
    picture.paste(_times(cover, factor), mask=_times(opacity, factor))
    # By parts: bincount makes a copy with eight bytes a pixel.
    parts = np.array_split(index, -(-len(index) // 128))
    counts = np.sum([np.bincount(p.ravel(), minlength=none + 1) for p in parts], axis=0)
    shares = 100 * counts / index.size
    entries = [
        _Entry(_color(i), _name_of(class_names, i), f"  {shares[i]:.1f}%")
        for i in map(int, np.argsort(-shares[:none], kind="stable"))
        if shares[i]
    ]
    left_out = np.sort(shares[:none])[: max(none - max_entries, 0)].sum()
    rest = len(entries) - max_entries
    more = f"{_ELLIPSIS} and {rest} more ({left_out:.1f}%)" if rest > 0 else ""
    entries = entries[:max_entries]
    if shares[none]:
        entries.append(_Entry(None, "no class", f"  {shares[none]:.1f}%"))
    return _with_strip(picture, functools.partial(_legend, entries, more, size=size))


def draw_classification(
    image: np.ndarray,
    names: Sequence[str],
    scores: Sequence[float] | np.ndarray,
    *,
    numbers: Sequence[int] | None = None,
) -> Image.Image:
    """The picture, and below it a plate with a line "name  87.2%" for each class.

    Args:
      image: (H, W, 3) uint8 RGB.
      names: of the classes, in the order to draw them. Long ones take two lines, then are cut.
      scores: from 0 to 1.
      numbers: of the classes, for names that no font has.

    Returns:
      An RGB picture, which may be larger than the input.
    """
    picture, _ = _enlarged(image)
    size = text_size(*picture.size)
    given = [None] * len(names) if numbers is None else list(numbers)
    shown = [shown_name(name, number) for name, number in zip(names, given, strict=True)]
    values = [f"{100 * score:.1f}%" for score in scores]

    def plate(width: int) -> Image.Image | None:
        pad = size // 2
        room = max((_text_width(value, size) for value in values), default=0) + size
        # Two columns: the scores stand right of the longest name, or at the right edge.
        blocks = [_wrapped(name, max(1, width - 2 * pad - room), size) for name in shown]
        lines = [line for block in blocks for line in block]
        column = max((_text_width(line, size) for line in lines), default=0)
        if not lines:
            return None
        height = _line_height(size)
        strip = Image.new("RGB", (width, len(lines) * height + 2 * pad), _BLACK)
        pen = ImageDraw.Draw(strip)
        y = pad
        for block, value in zip(blocks, values, strict=True):
            x = pad + column + room - _text_width(value, size)
            _write(pen, (x, y), value, size, _WHITE)
            for text in block:
                _write(pen, (pad, y), text, size, _WHITE)
                y += height
        return strip

    return _with_strip(picture, plate)


def contact_sheet(
    pictures: Sequence[tuple[np.ndarray | Image.Image, Sequence[str]]],
    *,
    columns: int = 5,
    tile: int = 240,
) -> Image.Image:
    """Thumbnails in rows, with captions below them, on grey.

    Args:
      pictures: each with the lines of its caption; arrays are (H, W, 3) or (H, W) uint8. A line
        that is too long takes two, then is cut.
      columns: at most; fewer pictures give fewer.
      tile: the longer side of a thumbnail in pixels. Pictures keep their proportions; smaller ones
        are scaled up by a whole factor.

    Raises:
      ValueError: there is no picture.
    """
    if not pictures:
        raise ValueError("a contact sheet needs a picture")
    size = max(_LEAST_TEXT, tile // 16)
    gap, height = size, _line_height(size)
    columns = min(columns, len(pictures))
    captions = [
        [line for text in texts for line in _wrapped(shown_name(text), tile, size)] if texts else []
        for _, texts in pictures
    ]
    thumbnails = [_thumbnail(picture, tile) for picture, _ in pictures]
    starts = range(0, len(pictures), columns)
    lines = [max(map(len, captions[i : i + columns])) for i in starts]
    tops = [max(t.height for t in thumbnails[i : i + columns]) for i in starts]
    heights = [top + size // 3 + count * height + gap
               for top, count in zip(tops, lines, strict=True)]  # fmt: skip
    sheet = Image.new("RGB", (columns * (tile + gap) + gap, gap + sum(heights)), _GREY)
    pen = ImageDraw.Draw(sheet)
    for i, (thumbnail, caption) in enumerate(zip(thumbnails, captions, strict=True)):
        row, column = divmod(i, columns)
        x, y = gap + column * (tile + gap), gap + sum(heights[:row])
        # Pictures stand on a common line, right above their captions.
        sheet.paste(thumbnail, (x, y + tops[row] - thumbnail.height))
        for k, text in enumerate(caption):
            _write(pen, (x, y + tops[row] + size // 3 + k * height), text, size, _BLACK)
    return sheet


# --- Parts of pictures ----------------------------------------------------------------------------


class _Entry(NamedTuple):
    """Of a legend: a colour (None for no class), a name that may be cut, and what follows it."""

    color: Color | None
    name: str
    value: str
    tag: str = ""  # drawn on the colour


def _enlarged(image: np.ndarray) -> tuple[Image.Image, int]:
    """A copy as a picture, scaled up by a whole factor if it is small, and the factor."""
    picture = Image.fromarray(np.array(image, order="C"))
    short, long = sorted(picture.size)
    factor = max(1, min(-(-LEAST_SIDE // short), _LONGEST // long))
    return _times(picture, factor), factor


def _times(picture: Image.Image, factor: int) -> Image.Image:
    """The picture scaled up without smoothing; itself for a factor of 1."""
    size = (picture.width * factor, picture.height * factor)
    return picture if factor == 1 else picture.resize(size, Image.Resampling.NEAREST)


def _thumbnail(picture: np.ndarray | Image.Image, tile: int) -> Image.Image:
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(np.array(picture, order="C"))
    picture = picture.convert("RGB")
    long = max(picture.size)
    if long <= tile:
        return _times(picture, tile // long)
    width, height = (max(1, round(side * tile / long)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)


def _frame(box: np.ndarray, factor: int, bounds: tuple[int, int]) -> Rectangle:
    """The pixels of a box, cut to the picture; at least one pixel."""
    width, height = bounds
    x1, y1, x2, y2 = np.nan_to_num(np.asarray(box, np.float64)) * factor
    left, top = int(np.clip(x1, 0, width - 1)), int(np.clip(y1, 0, height - 1))
    right = int(np.clip(np.ceil(x2), left + 1, width))
    return Rectangle(left, top, right, int(np.clip(np.ceil(y2), top + 1, height)))


def _draw_frame(picture: Image.Image, frame: Rectangle, color: Color, line: int) -> None:
    """A box with an outline of black or white on both sides, which shows on any background."""
    # Small boxes get finer lines, or nothing would be seen of what is in them.
    line = max(1, min(line, min(frame.right - frame.left, frame.bottom - frame.top) // 8))
    outline = -(-line // 3)
    pen = ImageDraw.Draw(picture)
    left, top, right, bottom = frame
    pen.rectangle((left, top, right - 1, bottom - 1), outline=ink(color), width=line + 2 * outline)
    if min(right - left, bottom - top) > 2 * outline:
        inner = (left + outline, top + outline, right - 1 - outline, bottom - 1 - outline)
        pen.rectangle(inner, outline=color, width=line)


def _draw_mask(
    picture: Image.Image, mask: np.ndarray, factor: int, color: Color, line: int
) -> None:
    """A translucent mask (H, W) of the picture before it was scaled up, with an edge."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    top, left = rows[0], columns[0]
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1].repeat(factor, 0).repeat(factor, 1)
    outline = -(-line // 3)
    inside = _eroded(part, outline)
    core = _eroded(inside, line)
    place = int(left) * factor, int(top) * factor
    for shape, shade, opacity in (
        (core, color, _MASK_OPACITY),
        (part & ~inside, ink(color), 1),
        (inside & ~core, color, 1),
    ):
        cover = Image.fromarray(shape * np.uint8(round(255 * opacity)))
        picture.paste(shade, (*place, place[0] + part.shape[1], place[1] + part.shape[0]), cover)


def _eroded(mask: np.ndarray, by: int) -> np.ndarray:
    """The pixels of a mask (H, W) all of whose neighbours up to `by` away are in it."""
    result = np.pad(mask, by)
    for axis in (0, 1):
        length = 1  # of the window whose minimum was taken
        while length < 2 * by + 1:
            step = min(length, 2 * by + 1 - length)
            size = result.shape[axis] - step
            head, tail = np.arange(2) * step
            first = result[head : head + size] if axis == 0 else result[:, head : head + size]
            second = result[tail : tail + size] if axis == 0 else result[:, tail : tail + size]
            result = first & second
            length += step
    return result


def _draw_plate(picture: Image.Image, place: Rectangle, text: str, size: int, color: Color) -> None:
    """Text on a plate of a colour that fills a rectangle."""
    pen = ImageDraw.Draw(picture)
    left, top, right, bottom = place
    pen.rectangle((left, top, right - 1, bottom - 1), fill=color, outline=ink(color))
    x = left + (right - left - _text_width(text, size)) // 2
    y = top + (bottom - top - _line_height(size)) // 2
    _write(pen, (x, y), text, size, ink(color))


def _legend(entries: Sequence[_Entry], more: str, width: int, *, size: int) -> Image.Image | None:
    """A strip of a width with the entries in columns and a last line, or None without entries."""
    if not entries:
        return None
    pad = max(2, size // 4)
    row = _line_height(size) + 2 * pad
    tag = max(_line_height(size), *(_text_width(entry.tag, size) + 2 * pad for entry in entries))
    frame, gap = tag + 3 * pad, size
    longest = max(_text_width(entry.name + entry.value, size) for entry in entries)
    # One long name shall not force a single column on many entries.
    widest = min(longest, 20 * size) if len(entries) > 4 else longest
    room = width - 2 * pad
    columns = max(1, min((room + gap) // (frame + widest + gap), len(entries)))
    available = (room + gap) // columns - frame - gap
    widest = min(available, longest)
    column = frame + widest + gap
    rows = -(-len(entries) // columns)
    strip = Image.new("RGB", (width, (rows + bool(more)) * row + 2 * pad), _WHITE)
    pen = ImageDraw.Draw(strip)
    for index, (color, name, value, text) in enumerate(entries):
        x, y = pad + index // rows * column, pad + index % rows * row
        swatch = Rectangle(x, y + pad, x + tag, y + row - pad)
        if color is None:
            pen.rectangle((*swatch[:2], swatch.right - 1, swatch.bottom - 1), outline=_BLACK)
        else:
            _draw_plate(strip, swatch, text, size, color)
        shown = _cut(name, widest, size, value)
        _write(pen, (x + tag + 2 * pad, y + pad), shown, size, _BLACK)
    if more:
        _write(pen, (pad, pad + rows * row + pad), _cut(more, room, size), size, _BLACK)
    return strip


def _with_strip(picture: Image.Image, strip_of: Callable[[int], Image.Image | None]) -> Image.Image:
    """The picture with a strip of its width below; what is narrow gets margins first."""
    width = max(picture.width, LEAST_SIDE)
    strip = strip_of(width)
    if strip is None and width == picture.width:
        return picture
    result = Image.new("RGB", (width, picture.height + (strip.height if strip else 0)), _GREY)
    result.paste(picture, ((width - picture.width) // 2, 0))
    if strip:
        result.paste(strip, (0, picture.height))
    return result
