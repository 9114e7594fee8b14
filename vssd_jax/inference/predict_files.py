"""Predictions for the pictures of a folder, written as files."""

import collections
import csv
import functools
import glob
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vssd_jax import strict_json
from vssd_jax.data.decode import decode
from vssd_jax.data.drawing import contact_sheet
from vssd_jax.data.endings import ENDINGS, describe_endings
from vssd_jax.data.segmentation_pictures import save_prediction
from vssd_jax.distributed import say
from vssd_jax.errors import UserError
from vssd_jax.host import cores
from vssd_jax.inference.predictor import (
    Detection,
    Predictor,
    Result,
    Segmentation,
    load_predictor,
    reason,
)

JOURNAL = "predictions.jsonl"
ON_SHEET = 20  # pictures of a contact sheet
_NAMED = 20  # unreadable pictures that are named in the end; all are in the journal


def predict_files(
    weights: str | os.PathLike,
    source: str,
    output: str | os.PathLike,
    *,
    skip_existing: bool = False,
    pictures: bool = True,
    draw_score: float = 0.3,
    **options: Any,
) -> dict[str, Any]:
    """Predicts for every picture of `source` and writes the results below `output`.

    `predictions.jsonl` has a line for each picture, in the order in which they were done. Besides:
    of a classifier `predictions.csv` and `contact_sheet.png`, of a detector `coco_results.json`
    with `coco_images.json` (COCO's format) and `pictures/`, of a segmentor `labels/` and
    `overlays/`. Files are named after the pictures, their folders are kept.

    Args:
      weights: anything that `vssd_jax.weights.load.load` reads.
      source: a picture, a folder (with its sub-folders), or a pattern such as `photos/**/*.jpg`.
      output: the folder.
      skip_existing: go on where an earlier call for this folder was ended.
      pictures: whether pictures are drawn.
      draw_score: least score of the objects that are drawn.
      **options: of `load_predictor`.

    Returns:
      Numbers: `pictures`, `unreadable`, `skipped`, and `images_per_second`.

    Raises:
      UserError: no pictures, none that can be read, or an output that is there or not writable.
    """
    folder = pathlib.Path(output)
    base, names = find_pictures(source, folder)
    journal = folder / JOURNAL
    done = _read_journal(journal) if skip_existing else {}
    if journal.exists() and not skip_existing:
        raise UserError(
            f"{journal} exists; --skip-existing goes on with it, or choose another --output"
        )
    left = [name for name in names if name not in done]
    predictor = load_predictor(weights, **options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writer = _Writer(predictor, base, folder, names, pictures, draw_score)
        failed, rate = _predict(predictor, base, left, journal, done, writer)
        if left and len(failed) == len(left) == len(names):
            first = next(iter(failed.values()))
            raise UserError(f"none of the {len(names)} pictures can be read; the first: {first}")
        writer.finish(_read_journal(journal))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    for text in list(failed.values())[:_NAMED]:
        say(f"warning: {text}")
    if failed:
        say(f"warning: {len(failed)} of {len(left)} pictures cannot be read, see {journal}")
    skipped = f", {len(done)} were there" if done else ""
    count = len(left) - len(failed)
    say(f"{count} pictures predicted, {rate:.1f} pictures/s{skipped} -> {folder}")
    return {
        "pictures": count,
        "unreadable": len(failed),
        "skipped": len(done),
        "images_per_second": rate,
    }


def find_pictures(source: str, output: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """The folder of a file, folder or pattern, and the pictures' paths inside it, sorted.

    Hidden files and what is below `output` are left out; files of other endings are counted.

    Raises:
      UserError: there are none.
    """
    path, others = pathlib.Path(source), collections.Counter[str]()
    if path.is_file():
        return path.parent, [path.name]
    if path.is_dir():
        base, found = path, _walk(path, output)
    elif glob.has_magic(source):
        parts = pathlib.PurePath(source).parts
        plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        base = pathlib.Path(*parts[:plain])
        below = output.resolve()
        matches = map(pathlib.Path, glob.iglob(source, recursive=True))
        found = (file for file in matches if below not in file.resolve().parents)
    else:
        raise UserError(f"there is no file or folder {source}")
    names = []
    for file in found:
        if not file.is_file():
            continue
        if file.name.lower().endswith(ENDINGS):
            names.append(file.relative_to(base).as_posix())
        else:
            others[file.suffix.lower()] += 1
    if others:
        say(f"{source}: {describe_endings(others)}")
    if not names:
        raise UserError(f"{source} has no pictures: files that end in {', '.join(ENDINGS)}")
    return base, sorted(names)


def output_stems(names: list[str]) -> dict[str, str]:
    """How the results of each picture are named: without its ending, if no other has that name."""
    stems = collections.Counter(os.path.splitext(name)[0] for name in names)
    return {
        name: stem if stems[stem := os.path.splitext(name)[0]] == 1 else name for name in names
    }


def _walk(folder: pathlib.Path, output: pathlib.Path) -> Iterator[pathlib.Path]:
    for where, folders, files in os.walk(folder, followlinks=True):
        inside = pathlib.Path(where)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (inside / name).resolve() != output.resolve()
        ]
        yield from (inside / file for file in files if not file.startswith("."))


def _read_journal(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The lines by file; not those of unreadable pictures, nor one that was not finished."""
    lines: dict[str, dict[str, Any]] = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
                name, failed = line["file"], "error" in line
            except (ValueError, KeyError, TypeError):
                continue
            if not failed:
                lines[name] = line
    return lines


def _predict(
    predictor: Predictor,
    base: pathlib.Path,
    names: list[str],
    journal: pathlib.Path,
    done: dict[str, dict[str, Any]],
    writer: "_Writer",
) -> tuple[dict[str, str], float]:
    """Writes a line for each picture; gives the reasons by file, and the pictures a second."""
    part = journal.with_suffix(".part")
    part.write_text("".join(f"{strict_json.dumps(line)}\n" for line in done.values()))
    os.replace(part, journal)
    failed: dict[str, str] = {}
    waiting: collections.deque[tuple[str, Future]] = collections.deque()
    with (
        journal.open("a", encoding="utf-8") as file,
        ThreadPoolExecutor(cores()) as pool,
        tqdm(
            total=len(names),
            unit=" pictures",
            mininterval=1 if sys.stderr.isatty() else 20,
        ) as progress,
    ):

        def note(name: str, future: Future) -> None:
            # The line comes last: a picture that has one is complete.
            line = {"file": name, **future.result()}
            file.write(f"{strict_json.dumps(line)}\n")
            file.flush()
            progress.update()

        for index, result in predictor.stream([base / name for name in names]):
            name = names[index]
            if isinstance(result, Exception):
                failed[name] = reason(base / name, result)
                file.write(f"{strict_json.dumps({'file': name, 'error': failed[name]})}\n")
                progress.update()
                continue
            waiting.append((name, pool.submit(writer.write, name, result)))
            while len(waiting) > 4 * cores():
                note(*waiting.popleft())
        for item in waiting:
            note(*item)
        rate = progress.format_dict["n"] / max(progress.format_dict["elapsed"], 1e-9)
    return failed, rate


def _write_text(path: pathlib.Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _cells(predictions: list[dict[str, Any]]) -> Iterator[str]:
    for found in predictions:
        yield from (found["name"], f"{found['score']:.6f}")


class _Writer:
    """Writes what a task has besides the journal."""

    def __init__(
        self,
        predictor: Predictor,
        base: pathlib.Path,
        folder: pathlib.Path,
        names: list[str],
        pictures: bool,
        draw_score: float,
    ):
        self._predictor, self._base, self._folder = predictor, base, folder
        self._names, self._pictures, self._draw_score = names, pictures, draw_score
        self._stem = output_stems(names)

    def write(self, name: str, result: Result) -> dict[str, Any]:
        """Writes the pictures of a result, and gives its line for the journal."""
        line = result.as_dict()
        if isinstance(result, Detection):
            height, width = result.size
            line = {"height": height, "width": width, **line}
            if self._pictures:
                drawn = result.draw(
                    self._decode(name),
                    class_names=self._predictor.class_names,
                    min_score=self._draw_score,
                )
                self._save(drawn, self._folder / "pictures" / f"{self._stem[name]}.jpg")
        elif isinstance(result, Segmentation):
            stem = self._stem[name]
            save_prediction(
                self._folder,
                stem,
                self._decode(name) if self._pictures else None,
                result.label_map,
                result.class_names,
                reduce_zero_label=self._predictor.preprocessing["reduce_zero_label"],
            )
            line = {"label_map": f"labels/{stem}.png", **line}
        return line

    def finish(self, lines: dict[str, dict[str, Any]]) -> None:
        """Writes what has the results of all pictures."""
        rows = [lines[name] for name in self._names if name in lines]
        if self._predictor.task == "classification":
            self._write_csv(rows)
            if self._pictures:
                self._write_sheet(rows)
        elif self._predictor.task == "detection":
            self._write_coco(rows)

    def _write_csv(self, rows: list[dict[str, Any]]) -> None:
        def write(path: pathlib.Path) -> None:
            with path.open("w", encoding="utf-8", newline="") as file:
                table = csv.writer(file)
                count = max((len(row["predictions"]) for row in rows), default=0)
                heads = [f"{what}{n + 1}" for n in range(count) for what in ("name", "score")]
                table.writerow(["file", *heads])
                for row in rows:
                    table.writerow([row["file"], *_cells(row["predictions"])])

        self._replace(self._folder / "predictions.csv", write)

    def _write_sheet(self, rows: list[dict[str, Any]]) -> None:
        tiles: list[tuple[np.ndarray, list[str]]] = []
        for row in rows[:ON_SHEET]:
            best = row["predictions"][:2]
            captions = [f"{p['name']} {100 * p['score']:.0f} %" for p in best]
            tiles.append((self._decode(row["file"]), captions))
        if tiles:
            self._save(contact_sheet(tiles), self._folder / "contact_sheet.png")

    def _write_coco(self, rows: list[dict[str, Any]]) -> None:
        images, results = [], []
        for number, row in enumerate(rows, 1):
            size = {"height": row["height"], "width": row["width"]}
            images.append({"id": number, "file_name": row["file"], **size})
            for found in row["predictions"]:
                keys = ("score", "bbox", "segmentation")
                fields = {key: found[key] for key in keys if key in found}
                results.append({"image_id": number, "category_id": found["label"] + 1, **fields})
        names = enumerate(self._predictor.class_names, 1)
        categories = [{"id": number, "name": name} for number, name in names]
        listed = {"images": images, "annotations": [], "categories": categories}
        for name, data in (("coco_results.json", results), ("coco_images.json", listed)):
            text = strict_json.dumps(data)
            self._replace(self._folder / name, functools.partial(_write_text, text=text))

    def _decode(self, name: str) -> np.ndarray:
        data = (self._base / name).read_bytes()
        return decode(data, oriented=True, max_pixels=self._predictor.max_pixels)

    def _save(self, picture: Image.Image, path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._replace(path, lambda part: picture.save(part, path.suffix[1:].replace("jpg", "jpeg")))

    @staticmethod
    def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
        """Writes beside the place, then renames: a file is there whole or not at all."""
        part = path.with_name(f".{path.name}.part")
        write(part)
        os.replace(part, path)
