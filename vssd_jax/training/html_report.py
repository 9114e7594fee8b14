"""The report of a run or of an evaluation: one HTML file that needs no other, and no script."""

import dataclasses
import datetime
import html
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vssd_jax import strict_json
from vssd_jax.config import changed_fields
from vssd_jax.tasks.protocol import Section, Task
from vssd_jax.training import html_parts as parts
from vssd_jax.training import svg_curves
from vssd_jax.training.report import environment

_TILES = 4  # metrics in large type


@dataclasses.dataclass(frozen=True)
class Report:
    """What a report is made of.

    Attributes:
      title: the model and the dataset.
      facts: names and values: what was trained or evaluated, when, how long.
      results: the metrics of the evaluation; may be empty.
      best_metric: the one that comes first.
      sections: of the task.
      lines: of `metrics.jsonl`; none without training.
      config: all fields.
      changed: those that differ from the task's defaults.
      environment: names and values.
      commands: what each does, and the command.
      notes: what a reader should know before all else.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    results: Mapping[str, float]
    best_metric: str
    sections: Sequence[Section]
    config: Mapping[str, Any]
    changed: Mapping[str, Any]
    environment: Sequence[tuple[str, str]]
    commands: Sequence[tuple[str, str]]
    lines: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


def of_task(task: Task, *, title: str = "", **fields: Any) -> Report:
    """A report with what the task and its config say; `title` comes after the model and the data.

    `fields` are the others of `Report`.
    """
    config = task.config
    return Report(
        title=f"{config.model} on {config.dataset}{title}",
        best_metric=task.best_metric,
        sections=task.report(),
        config=config.to_dict(),
        changed=changed_fields(config),
        environment=environment(),
        **fields,
    )


def render(report: Report) -> str:
    """The page."""
    room = parts.Room()
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    notes = "".join(f"<p class=warning>{html.escape(note)}</p>" for note in report.notes)
    blocks = [
        parts.block("Summary", notes + _tiles(report) + parts.facts(report.facts)),
        _curves(report),
        *(parts.section(section, room) for section in report.sections),
        _metrics(report.results),
        _config(report.config, report.changed),
        parts.block("Environment", parts.facts(report.environment)),
        _commands(report.commands),
    ]
    title = html.escape(report.title)
    return (
        "<!doctype html>\n"
        '<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, '
        f'initial-scale=1"><title>{title}</title><style>{_STYLE}</style></head>\n'
        f"<body><header><h1>{title}</h1><p class=note>written {written} by vssd_jax</p></header>\n"
        + "\n".join(filter(None, blocks))
        + "\n</body></html>\n"
    )


def write(path: str | os.PathLike, text: str) -> None:
    """Writes the file beside its place and renames it; an OSError if it cannot."""
    path = pathlib.Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".report", delete=False) as file:
        try:
            # Names of files may have bytes that are no UTF-8.
            file.write(text.encode("utf-8", "replace"))
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def training_seconds(lines: Iterable[Mapping[str, Any]], batch_size: int) -> float:
    """How long the logged steps took, without evaluations, saving and compilation.

    Of all parts of a run that was resumed, whose batches were of this size.
    """
    seconds, last = 0.0, 0
    for line in lines:
        speed = line.get("train/images_per_second")
        if speed is not None:
            seconds += (line["step"] - last) * batch_size / speed if speed > 0 else 0
            last = line["step"]
    return seconds


def duration(seconds: float) -> str:
    """Such as "2 h 5 min"."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {whole} s" if minutes else f"{whole} s"


# --- Sections -------------------------------------------------------------------------------------


def _tiles(report: Report) -> str:
    others = (n for n in report.results if n not in (report.best_metric, "val/unreadable"))
    names = [report.best_metric, *others]
    tiles = "".join(
        f"<div><b>{_number(report.results[name])}</b><span>{html.escape(name)}</span></div>"
        for name in names[:_TILES]
        if name in report.results
    )
    return f"<div class=tiles>{tiles}</div>" if tiles else ""


def _number(value: float | None) -> str:
    """None stands for what is not finite in JSON, where a checkpoint keeps its metrics."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _curves(report: Report) -> str:
    curves = svg_curves.read_curves(report.lines)
    if not curves:
        return ""
    first: list[tuple[str, list[str]]] = [
        ("loss", ["train/loss", "val/loss"]), (report.best_metric, [report.best_metric]),
        ("learning rate", ["train/learning_rate"]),
    ]  # fmt: skip
    figures, seen = [], set()
    for title, names in first:
        there = {name: curves[name] for name in names if name in curves}
        seen |= set(there)
        if there:
            figures.append(svg_curves.draw(title, there))
    others = [svg_curves.draw(n, {n: curves[n]}) for n in sorted(curves) if n not in seen]
    body = f"<div class=curves>{''.join(figures)}</div>"
    if others:
        body += (
            f"<details><summary>{len(others)} other curves</summary><div class=curves>"
            f"{''.join(others)}</div></details>"
        )
    return parts.block("Curves", body)


def _metrics(results: Mapping[str, float]) -> str:
    if not results:
        return ""
    return parts.block("Metrics", parts.facts([(n, _number(v)) for n, v in results.items()]))


def _config(config: Mapping[str, Any], changed: Mapping[str, Any]) -> str:
    def rows(fields: Mapping[str, Any]) -> str:
        return parts.facts([(name, _shown(value)) for name, value in fields.items()])

    differences = rows(changed) if changed else "<p>None: all fields have their defaults.</p>"
    return parts.block(
        "Config",
        f"<h3>Differences from the defaults</h3>{differences}"
        f"<details><summary>All {len(config)} fields</summary>{rows(config)}</details>",
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else strict_json.dumps(value)
    return text if len(text) <= 2000 else f"{text[:2000]} … ({len(text):,} characters)"


def _commands(commands: Sequence[tuple[str, str]]) -> str:
    body = "".join(
        f"<h3>{html.escape(what)}</h3><pre>{html.escape(command)}</pre>"
        for what, command in commands
    )
    return parts.block("How to repeat", body)


_STYLE = """
:root{color-scheme:light dark;--ink:#1c1f24;--soft:#5d6672;--line:#d9dde3;--paper:#fff;
--box:#f4f6f8;--accent:#2563eb;--second:#d9460c;--third:#0f8a5f;--warn:#fff3d6}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa4b1;--line:#343a43;
--paper:#15181c;--box:#1e2228;--accent:#6ea0ff;--second:#ff8a54;--third:#4cc795;--warn:#4a3a10}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem;padding-bottom:.2rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
.note{color:var(--soft);font-size:.9rem;margin:.3rem 0 .6rem}
.warning{background:var(--warn);padding:.5rem .8rem;border-radius:6px}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem;margin:.6rem 0 1rem}
.tiles div{background:var(--box);border-radius:8px;padding:.6rem 1rem;min-width:8rem}
.tiles div:first-child{outline:2px solid var(--accent)}
.tiles b{display:block;font-size:1.6rem;line-height:1.2}
.tiles span{color:var(--soft);font-size:.85rem}
.scroll{overflow:auto;max-height:32rem;max-width:100%;width:fit-content;
border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;font-size:.9rem;width:max-content}
.facts{width:auto}
td,th{padding:.3rem .7rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);
unicode-bidi:isolate}
td{min-width:3rem;max-width:min(22rem,42vw)}
.facts td{max-width:none}
tr:last-child td,tr:last-child th{border-bottom:0}
td:first-child{min-width:6rem}
.facts td:first-child{overflow-wrap:normal;color:var(--soft)}
.facts .number{text-align:left}
thead th{position:sticky;top:0;background:var(--box);font-weight:600;overflow-wrap:normal}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.scroll:has(.matrix){max-height:none}
.matrix td{min-width:2.6rem;text-align:center;padding:.25rem;font-variant-numeric:tabular-nums;
border-left:1px solid var(--line);overflow-wrap:normal}
.matrix thead td:first-child{min-width:0;vertical-align:bottom;color:var(--soft);font-size:.8rem}
.matrix thead th{vertical-align:bottom;padding:.4rem .25rem}
.matrix span{display:inline-block;overflow:hidden;white-space:nowrap;text-overflow:ellipsis}
.matrix thead span{writing-mode:vertical-rl;transform:rotate(180deg);max-height:9rem}
.matrix tbody span{max-width:9rem;vertical-align:bottom}
.matrix tbody th{position:sticky;left:0;background:var(--box);font-weight:600}
.heat{display:block;width:min(100%,45rem);height:auto;image-rendering:pixelated;
border:1px solid var(--line)}
.gallery,.curves{display:grid;gap:1rem;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(min(100%,10rem),1fr))}
.curves{grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
.gallery:has(.wide){grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr))}
figure{margin:0;break-inside:avoid}
figcaption{font-size:.85rem;margin-top:.3rem}
figcaption span{display:block;color:var(--soft)}
figcaption span:first-child{color:var(--ink);font-weight:600}
.views{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(0,1fr);gap:.4rem}
.views img{display:block;width:100%;height:auto;border-radius:4px}
@media (max-width:30rem){.views{grid-auto-flow:row}}
.views small{color:var(--soft)}
.curve svg{width:100%;height:auto;display:block}
.curve text{font:11px system-ui,sans-serif;fill:var(--soft)}
.curve figcaption{font-weight:600;margin:0 0 .2rem}
.grid{stroke:var(--line);fill:none}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.line0{stroke:var(--accent)}.line1{stroke:var(--second)}.line2{stroke:var(--third)}
.dot0{fill:var(--accent)}.dot1{fill:var(--second)}.dot2{fill:var(--third)}
.keys{font-size:.85rem;margin:.2rem 0}
.keys span{margin-right:1rem;font-weight:600}
.key0{color:var(--accent)}.key1{color:var(--second)}.key2{color:var(--third)}
details{margin:.8rem 0}
summary{cursor:pointer;font-weight:600;margin-bottom:.5rem}
pre{background:var(--box);padding:.7rem;border-radius:6px;white-space:pre-wrap;margin:.3rem 0;
font-size:.85rem}
@media print{:root{--paper:#fff;--ink:#000;--box:#f4f6f8;--line:#ccc;--soft:#444}
body{max-width:none;font-size:11pt}.scroll{max-height:none;overflow:visible}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
