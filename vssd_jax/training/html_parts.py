"""Parts of a report as HTML: every text is escaped, pictures are inside, and there is no script."""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from vssd_jax.tasks.protocol import Confusion, Gallery, Section, Table

_MOST_ROWS = 1000  # of a table
_MOST_NAMED = 25  # classes of a confusion matrix with names and counts; larger ones are a picture
_MOST_CELLS = 500  # of a side of that picture; more could not be seen one by one
_MOST_CONFUSIONS = 20
_SMALL, _ENLARGED = 100, 200  # pixels: a picture smaller than the one is scaled up to the other
_MOST_BYTES = 3_000_000  # of all pictures of a report
_RIGHT, _WRONG = (37, 99, 235), (217, 70, 12)  # colours of a confusion matrix's counts


class Room:
    """How many bytes of pictures a report may still get."""

    def __init__(self, left: int = _MOST_BYTES) -> None:
        self.left = left

    def take(self, size: int) -> bool:
        """Whether so many fit; then they are taken."""
        if size > self.left:
            return False
        self.left -= size
        return True


def section(part: Section, room: Room) -> str:
    """A part of a task's report."""
    if isinstance(part, Table):
        body = table(part.columns, part.rows)
    elif isinstance(part, Confusion):
        body = _confusion(part, room)
    else:
        body = _gallery(part, room)
    return block(part.title, body, note=part.note)


def block(title: str, body: str, *, note: str = "") -> str:
    """A section with a heading; `body` is HTML, the others are text."""
    note = f"<p class=note>{html.escape(note)}</p>" if note else ""
    name = "-".join(title.lower().split())
    return f'<section id="{html.escape(name)}"><h2>{html.escape(title)}</h2>{note}{body}</section>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, a line each."""
    return table(("", ""), list(rows))


def table(columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    """See `vssd_jax.tasks.protocol.Table`; it scrolls inside its box."""
    head, kind = "", " class=facts"
    if any(columns):
        kind = ""
        cells = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in columns)
        head = f"<thead><tr>{cells}</tr></thead>"
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:_MOST_ROWS])
    more = len(rows) - _MOST_ROWS
    rest = f"<p class=note>… and {more:,} more</p>" if more > 0 else ""
    return (
        f"<div class=scroll tabindex=0><table{kind}>{head}<tbody>{body}</tbody></table></div>{rest}"
    )


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return f"<td>{html.escape(value)}</td>"
    if isinstance(value, int):
        return f"<td class=number>{value:,}</td>"
    return f"<td class=number>{f'{100 * value:.1f}%' if math.isfinite(value) else '-'}</td>"


# --- Confusion matrices ---------------------------------------------------------------------------


def _confusion(part: Confusion, room: Room) -> str:
    totals = np.zeros(len(part.rows), np.int64)
    np.add.at(totals, part.cells[:, 0], part.cells[:, 2])
    shares = part.cells[:, 2] / np.maximum(totals, 1)[part.cells[:, 0]]
    if max(len(part.rows), len(part.columns)) <= _MOST_NAMED:
        body = _matrix_table(part, shares)
    else:
        body = _matrix_picture(part, shares, room)
    # What is no class has no share, and would fill the table.
    classes = sum(1 for row, column in zip(part.rows, part.columns, strict=False) if row == column)
    wrong = part.cells[(part.cells[:, 0] != part.cells[:, 1]) & (part.cells[:, 0] < classes)]
    if not len(wrong):
        return f"{body}<p>Nothing was confused.</p>"
    order = np.argsort(-wrong[:, 2], kind="stable")[:_MOST_CONFUSIONS]
    rows = [
        (part.rows[row], part.columns[column], count, float(count / totals[row]))
        for row, column, count in wrong[order].tolist()
    ]
    columns = ("is", "taken for", "count", "share of the class")
    return f"{body}<h3>Most frequent confusions</h3>{table(columns, rows)}"


def _matrix_table(part: Confusion, shares: np.ndarray) -> str:
    filled = {
        (row, column): (count, share)
        for (row, column, count), share in zip(part.cells.tolist(), shares, strict=True)
    }
    names = "".join(f"<th scope=col>{_clipped(name)}</th>" for name in part.columns)
    lines = []
    for i, name in enumerate(part.rows):
        cells = []
        for j in range(len(part.columns)):
            count, share = filled.get((i, j), (0, 0.0))
            red, green, blue = _RIGHT if i == j else _WRONG
            # Never so strong that the number could not be read on it.
            colour = f"background:rgba({red},{green},{blue},{0.06 + 0.5 * share:.2f})"
            cells.append(f'<td style="{colour}">{_count(count)}</td>' if count else "<td></td>")
        lines.append(f"<tr><th scope=row>{_clipped(name)}</th>{''.join(cells)}</tr>")
    return (
        "<div class=scroll tabindex=0><table class=matrix>"
        f"<thead><tr><td>is \\ predicted</td>{names}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _clipped(name: str) -> str:
    """A name of which the page may show the beginning only."""
    return f'<span title="{html.escape(name)}">{html.escape(name)}</span>'


def _count(count: int) -> str:
    """Four characters or so."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= 10 * unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def _matrix_picture(part: Confusion, shares: np.ndarray, room: Room) -> str:
    """Counts as shares of their row: blue where they are right, orange elsewhere."""
    size = max(len(part.rows), len(part.columns))
    side = min(size, _MOST_CELLS)
    rows, columns = part.cells[:, 0], part.cells[:, 1]
    # Few of many are to be seen too.
    strength = 1 + (np.sqrt(shares) * 126).astype(np.uint8)
    most = np.zeros((2, side, side), np.uint8)  # wrong and right, of the cells that a pixel shows
    place = rows * side // size, columns * side // size
    np.maximum.at(most, ((rows == columns).astype(int), *place), strength)
    wrong, right = most
    pixels = np.where(wrong > right, wrong + np.uint8(128), right)
    # The page shines through, be it light or dark.
    picture = Image.fromarray(pixels)
    picture.putpalette([*_RIGHT] * 128 + [*_WRONG] * 128)
    alpha = bytes([0, *(110 + 145 * i // 127 for i in range(1, 128))] * 2)
    data = io.BytesIO()
    picture.save(data, "png", optimize=True, transparency=alpha)
    if not room.take(len(data.getvalue())):
        return "<p class=note>The picture of the matrix is left out: too many pictures.</p>"
    text = html.escape(f"{part.title}: {len(part.rows)} rows, {len(part.columns)} columns")
    return (
        f'<img class=heat src="{_uri("png", data.getvalue())}" width={side} height={side} '
        f'alt="{text}"><p class=note>{text}, in the order of the labels; blue is right, orange '
        "is not, and the stronger the larger the share of its row.</p>"
    )


# --- Pictures -------------------------------------------------------------------------------------


def _gallery(part: Gallery, room: Room) -> str:
    figures, left_out = [], 0
    for picture in part.pictures:
        encoded = [(name, _encode(pixels)) for name, pixels in picture.views]
        if not room.take(sum(len(data) for _, (_, data, _) in encoded)):
            left_out += 1
            continue
        views = []
        for name, (kind, data, (width, height)) in encoded:
            text = html.escape(": ".join(filter(None, (name, picture.caption[0]))))
            label = f"<small>{html.escape(name)}</small>" if name else ""
            views.append(
                f'<div>{label}<img src="{_uri(kind, data)}" width={width} height={height} '
                f'alt="{text}"></div>'
            )
        lines = "".join(f"<span>{html.escape(line)}</span>" for line in picture.caption)
        wide = " class=wide" if len(views) > 1 else ""
        figures.append(
            f"<figure{wide}><div class=views>{''.join(views)}</div>"
            f"<figcaption>{lines}</figcaption></figure>"
        )
    body = f"<div class=gallery>{''.join(figures)}</div>" if figures else ""
    if left_out:
        body += f"<p class=note>{left_out} more pictures are left out: the file would be large.</p>"
    return body


def _encode(pixels: np.ndarray) -> tuple[str, bytes, tuple[int, int]]:
    """(H, W, 3) uint8 as the kind of a file, its bytes, width and height."""
    picture, data = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    if max(picture.size) < _SMALL:
        times = _ENLARGED // max(picture.size)
        size = picture.width * times, picture.height * times
        picture = picture.resize(size, Image.Resampling.NEAREST)
        picture.save(data, "png", optimize=True)
        return "png", data.getvalue(), picture.size
    picture.save(data, "jpeg", quality=82)
    return "jpeg", data.getvalue(), picture.size


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
