"""COCO's average precision and recall by pycocotools, category by category.

Only the last means go over all categories, so that processes can share them: the numbers are those
of one evaluation, bit for bit. Imports no jax, since the processes load this.
"""

import contextlib
import io
import multiprocessing
import sys
from collections.abc import Container, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from vssd_jax.host import cores

KINDS = {"box": "bbox", "mask": "segm"}  # our names and pycocotools'
# COCO's twelve numbers, in its order; the sizes are of objects in pixels of area.
NUMBERS = (
    "map", "ap50", "ap75", "map_small", "map_medium", "map_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
_FEW = 30_000  # detections that are evaluated before a process would have started
_MOST_PROCESSES = 16  # more would wait for the most frequent category


class Category(NamedTuple):
    """What there is of a category.

    Attributes:
      number: its id.
      images: those with an object or a detection of it, as of COCO's JSON.
      annotations, results: objects and detections, as of COCO's JSON.
    """

    number: int
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    results: list[dict[str, Any]]


class Scores(NamedTuple):
    """Of a kind.

    Attributes:
      numbers: the twelve, by name; -1 where there are no such objects.
      precision: pycocotools' (thresholds, recalls, categories, sizes, limits); the categories are
        in the order of their ids, and -1 stands where there are no objects.
    """

    numbers: dict[str, float]
    precision: np.ndarray


# By kind, pycocotools' precision (thresholds, recalls, sizes, limits) and recall (thresholds,
# sizes, limits).
Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def evaluate(
    dataset: dict[str, Any],
    results: list[dict[str, Any]],
    *,
    without: Container[int | str] = (),
    masks: bool = True,
    processes: int | None = None,
    progress: bool = False,
) -> dict[str, Scores]:
    """Mean average precision.

    Args:
      dataset: images, annotations and categories in COCO's instances format. An object without a
        mask is a region, that of its box, where masks neither count as right nor as wrong.
      results: detections in COCO's result format.
      without: ids of images that are left out.
      masks: whether masks are judged too.
      processes: that share the work; None takes one for few detections, and else one a core.
      progress: whether a bar is drawn.

    Returns:
      The scores of "box" and "mask".
    """
    from pycocotools.cocoeval import COCOeval

    kinds = tuple(kind for kind in KINDS if masks or kind == "box")
    categories = _categories(dataset, results, without)
    if processes is None:
        processes = 1 if len(results) < _FEW else min(cores(), _MOST_PROCESSES)
    places = {number: k for k, number in enumerate(sorted(c["id"] for c in dataset["categories"]))}
    evaluations = {kind: COCOeval(iouType=KINDS[kind]) for kind in kinds}
    for evaluation in evaluations.values():
        p, count = evaluation.params, len(places)
        sizes = len(p.areaRng), len(p.maxDets)
        evaluation.eval = {
            "precision": -np.ones((len(p.iouThrs), len(p.recThrs), count, *sizes)),
            "recall": -np.ones((len(p.iouThrs), count, *sizes)),
        }
    for number, curves in _shared(categories, kinds, processes, progress):
        for kind, (precision, recall) in curves.items():
            evaluations[kind].eval["precision"][:, :, places[number]] = precision
            evaluations[kind].eval["recall"][:, places[number]] = recall
    scores = {}
    for kind, evaluation in evaluations.items():
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.summarize()
        numbers = dict(zip(NUMBERS, map(float, evaluation.stats), strict=True))
        scores[kind] = Scores(numbers, evaluation.eval["precision"])
    return scores


def results_of(kind: str, results: list[dict]) -> list[dict]:
    """The results with nothing but their "bbox", or nothing but their "segm" (masks).

    pycocotools measures the size of a detection by its box where there is one, also for masks.
    """
    other = {"bbox": "segmentation", "segm": "bbox"}[kind]
    return [{key: value for key, value in r.items() if key != other} for r in results]


def _categories(
    dataset: dict[str, Any], results: list[dict[str, Any]], without: Container[int | str]
) -> list[Category]:
    """Those with objects, the largest first; the others have no precision."""
    images = {image["id"]: image for image in dataset["images"]}
    objects: dict[int, list] = {category["id"]: [] for category in dataset["categories"]}
    detections: dict[int, list] = {number: [] for number in objects}
    for entries, lists in ((dataset["annotations"], objects), (results, detections)):
        for entry in entries:
            if entry["image_id"] not in without:
                lists[entry["category_id"]].append(entry)
    categories = []
    for number, found in objects.items():
        used = dict.fromkeys(entry["image_id"] for entry in (*found, *detections[number]))
        if found:
            there = [images[image] for image in used]
            categories.append(Category(number, there, found, detections[number]))
    return sorted(categories, key=_size, reverse=True)


def _size(category: Category) -> int:
    return len(category.annotations) + len(category.results)


def _shared(
    categories: list[Category], kinds: tuple[str, ...], processes: int, progress: bool
) -> Iterator[tuple[int, Curves]]:
    """The curves of each category, in any order."""
    left = {category.number: category for category in categories}
    total = sum(map(_size, categories))
    bar = tqdm(total=total, desc="COCO's metrics", unit="box", delay=2, disable=not progress)
    with bar:
        if min(processes, len(left)) > 1:
            # A process that JAX's threads run in must not be forked.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(min(processes, len(left)), context)
            try:
                with _main_left_out():
                    waiting = {pool.submit(curves_of, c, kinds): c for c in categories}
                for future in as_completed(waiting):
                    category = waiting.pop(future)
                    yield category.number, future.result()
                    del left[category.number]
                    bar.update(_size(category))
            except BrokenProcessPool:
                text = "warning: a process of COCO's evaluation has ended; going on in this one"
                print(text, file=sys.stderr, flush=True)
            finally:
                pool.shutdown(cancel_futures=True)
        for category in left.values():
            yield category.number, curves_of(category, kinds)
            bar.update(_size(category))


@contextlib.contextmanager
def _main_left_out() -> Iterator[None]:
    """Processes that start within do not import the script that runs.

    They need nothing of it, and a script without `if __name__ == "__main__"` would run again.
    """
    main = sys.modules["__main__"]
    names = vars(main)
    kept: dict[str, Any] = {n: names[n] for n in ("__spec__", "__file__") if n in names}
    try:
        main.__spec__ = None
        names.pop("__file__", None)
        yield
    finally:
        names.update(kept)


def curves_of(category: Category, kinds: tuple[str, ...]) -> Curves:
    """Precision and recall of a category."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    number, images, annotations, results = category
    about = {"images": images, "categories": [{"id": number}]}
    curves: Curves = {}
    for kind in kinds:
        truth = COCO()
        # Copies: an evaluation leaves its notes in them.
        objects = [dict(a) if kind == "box" else _ignored_without_mask(a) for a in annotations]
        truth.dataset = about | {"annotations": objects}
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            if results:
                found = truth.loadRes(results_of(KINDS[kind], results))
            else:
                found = COCO()
                found.dataset = about | {"annotations": []}
                found.createIndex()
            evaluation = COCOeval(truth, found, KINDS[kind])
            evaluation.evaluate()
            evaluation.accumulate()
        precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
        curves[kind] = precision[:, :, 0], recall[:, 0]
    return curves


def _ignored_without_mask(annotation: dict) -> dict:
    """A crowd of the box's shape in place of an object that has no mask."""
    if annotation["segmentation"] is not None:
        return dict(annotation)
    x, y, w, h = annotation["bbox"]
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {**annotation, "iscrowd": 1, "segmentation": polygon}
