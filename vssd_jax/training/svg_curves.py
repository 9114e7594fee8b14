"""Curves by step as SVG, whose text and lines take the colours of the page around it."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 22, 10, 34  # around the axes
_MOST_POINTS = 600  # of a curve

Point = tuple[float, float | None]  # step, and value or None where it is not finite


def read_curves(lines: Iterable[Mapping]) -> dict[str, list[Point]]:
    """The points of every metric, from the lines of `metrics.jsonl`."""
    curves: dict[str, list[Point]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                finite = value is not None and math.isfinite(value)
                curves.setdefault(name, []).append((line["step"], value if finite else None))
    return curves


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most about `most` points: of each stretch its least, its greatest and any gap."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2
    kept: list[Point] = []
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        finite = [(value, step) for step, value in part if value is not None]
        ends = {min(finite), max(finite)} if finite else set()
        kept += sorted(((step, value) for value, step in ends), key=lambda point: point[0])
        if len(finite) < len(part):
            kept.append((part[-1][0], None))
    return kept


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, some `about` of them."""
    if not low < high:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next((m for m in (1, 2, 5) if step * m * about >= high - low), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def draw(title: str, curves: Mapping[str, Sequence[Point]]) -> str:
    """A figure of curves with a common axis; lines stop and go on where values are not finite."""
    shown = {name: thinned(points) for name, points in curves.items()}
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points if y is not None]
    lost = sum(y is None for points in curves.values() for _, y in points)
    note = f"<p class=note>{lost:,} values are not finite: gaps</p>" if lost else ""
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    if not ys:
        return f"<figure class=curve>{caption}<p class=note>no finite value</p>{note}</figure>"
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    marks = ticks(left, right) if left < right else [left]
    if left == right:
        left, right = left - 1, right + 1
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    parts = []
    for tick in ticks(low, high):
        _, at = place(left, tick)
        parts.append(f'<path class=grid d="M{_LEFT} {at}H{_WIDTH - _RIGHT}"/>')
        parts.append(f"<text x={_LEFT - 6} y={at + 4} text-anchor=end>{tick:.4g}</text>")
    for x in marks:
        at, _ = place(x, low)
        parts.append(f'<path class=grid d="M{at} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        parts.append(
            f"<text x={at} y={_HEIGHT - _BOTTOM + 15} text-anchor=middle>{_short(x)}</text>"
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f"<text x={middle} y={_HEIGHT - 4} text-anchor=middle>step</text>")
    legend = []
    for number, (name, points) in enumerate(shown.items()):
        runs: list[list[tuple[float, float]]] = [[]]
        for x, y in points:
            if y is None:
                runs.append([])
            else:
                runs[-1].append(place(x, y))
        line = "".join("M" + "L".join(f"{x} {y}" for x, y in run) for run in runs if len(run) > 1)
        if line:
            parts.append(f'<path class="line line{number % 3}" d="{line}"/>')
        # A few points, and those between two gaps, would not be seen as lines.
        dots = [p for run in runs for p in run if len(points) < 30 or len(run) == 1]
        parts += [f'<circle class="dot dot{number % 3}" cx={x} cy={y} r=2.5 />' for x, y in dots]
        legend.append(f"<span class=key{number % 3}>{html.escape(name)}</span>")
    keys = f"<p class=keys>{' '.join(legend)}</p>" if len(legend) > 1 else ""
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{html.escape(title)} by step">'
        f"{''.join(parts)}</svg>"
    )
    return f"<figure class=curve>{caption}{svg}{keys}{note}</figure>"


def _short(x: float) -> str:
    """A step, in thousands or millions if it is large."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if abs(x) >= 10 * unit:
            return f"{x / unit:.4g}{name}"
    return f"{x:.6g}"
