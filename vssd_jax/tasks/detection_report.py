"""What a report says of detections: AP of the classes, confusions, the worst pictures."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vssd_jax.data.coco_masks import rasterise
from vssd_jax.data.drawing import draw_detections
from vssd_jax.data.source import DetectionSource, Source
from vssd_jax.tasks import report_parts as parts
from vssd_jax.tasks.protocol import Confusion, Gallery, Picture, Section, Table

MIN_SCORE = 0.3  # of the detections that are matched and drawn
MIN_IOU = 0.5  # of a match


class Matched(NamedTuple):
    """A picture's objects and detections.

    Attributes:
      pairs: (M, 2) classes of an object and of the detection on it.
      missed: (.,) classes of objects on which there is none.
      false: (.,) classes of detections on no object.
    """

    pairs: np.ndarray
    missed: np.ndarray
    false: np.ndarray

    @property
    def mistakes(self) -> int:
        """Objects and detections that are not right."""
        wrong = np.count_nonzero(self.pairs[:, 0] != self.pairs[:, 1])
        return int(wrong) + len(self.missed) + len(self.false)


def match(
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    true_boxes: np.ndarray,
    true_labels: np.ndarray,
    crowd: np.ndarray,
) -> Matched:
    """Gives each detection, the best first, the free object that it overlaps most.

    Classes play no part. A detection that lies in a crowd and on no free object counts for nothing.

    Args:
      boxes: (N, 4) x y width height of the detections.
      labels, scores: (N,) of them.
      true_boxes: (T, 4) of the objects.
      true_labels: (T,) of them.
      crowd: (T,) whether it is a group of objects, which is neither found nor missed.
    """
    from pycocotools import mask as coco_mask

    pairs, false = [], []
    free = ~np.asarray(crowd, bool)
    overlaps = np.zeros((len(boxes), len(true_boxes)))
    if overlaps.size:
        overlaps = coco_mask.iou(
            np.asarray(boxes, np.float64), np.asarray(true_boxes, np.float64), list(map(int, crowd))
        )
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        candidates = np.where(free, overlaps[i], -1.0)
        best = int(np.argmax(candidates)) if len(candidates) else -1
        if best >= 0 and candidates[best] >= MIN_IOU:
            free[best] = False
            pairs.append((true_labels[best], labels[i]))
        elif not (overlaps[i] >= MIN_IOU)[np.asarray(crowd, bool)].any():
            false.append(labels[i])
    missed = np.asarray(true_labels, np.int64)[free]
    return Matched(np.array(pairs, np.int64).reshape(-1, 2), missed, np.array(false, np.int64))


def sections(
    source: DetectionSource,
    decoded: Source,
    results: Sequence[dict[str, Any]],
    by_class: Mapping[str, np.ndarray],
    *,
    without: Container[int | str] = (),
) -> list[Section]:
    """The report's sections of an evaluation.

    Args:
      source: has the ground truth.
      decoded: its samples with pixels.
      results: of `coco_metrics.to_results`.
      by_class: see `coco_metrics.evaluate`.
      without: ids of images that are left out.
    """
    truth, names = source.ground_truth(), list(source.class_names)
    label_of = {category: i for i, category in enumerate(source.category_ids.tolist())}
    found = _by_image(r for r in results if r["score"] >= MIN_SCORE)
    objects = _by_image(truth["annotations"])
    matched: dict[int, Matched] = {}
    for index, image in enumerate(source.image_ids):
        if image in without:
            continue
        theirs, ours = objects.get(image, []), found.get(image, [])
        matched[index] = match(
            np.array([r["bbox"] for r in ours]).reshape(-1, 4),
            np.array([label_of[r["category_id"]] for r in ours], np.int64),
            np.array([r["score"] for r in ours]),
            np.array([a["bbox"] for a in theirs]).reshape(-1, 4),
            np.array([label_of[a["category_id"]] for a in theirs], np.int64),
            np.array([bool(a["iscrowd"]) for a in theirs], bool),
        )
    confusion = _confusion(list(matched.values()), len(names))

    def pictures(chosen: Iterable[int]) -> list[Picture]:
        shown = []
        for index in chosen:
            element = decoded[index]
            if element["replaced"]:  # it could be read a moment ago
                continue
            image = source.image_ids[index]
            true = [a for a in objects.get(image, []) if not a["iscrowd"]]
            views = [
                ("found", _draw(element["image"], found.get(image, []), label_of, names, True)),
                ("objects", _draw(element["image"], true, label_of, names, False)),
            ]
            pairs, missed, false = matched[index]
            wrong = np.count_nonzero(pairs[:, 0] != pairs[:, 1])
            counts = f"{len(missed)} missed, {len(false)} false, {wrong} of a wrong class"
            shown.append(Picture(views, [counts, f"image {image}"]))
        return shown

    order = sorted(matched, key=lambda index: -matched[index].mistakes)
    worst = [index for index in order if matched[index].mistakes][: parts.WORST]
    several = list(matched)
    few = [several[i] for i in parts.spread(len(several))]
    rule = f"Detections with a score of at least {MIN_SCORE}, on objects at an IoU of {MIN_IOU}"
    mistaken = sum(1 for each in matched.values() if each.mistakes)
    return [
        _class_table(source, by_class, confusion, names),
        Confusion(
            "Confusion matrix",
            [*names, "(no object)"],
            [*names, "(missed)"],
            confusion,
            f"Objects by class (rows) and the class of the detection on them (columns). {rule}.",
        ),
        Gallery(
            "Worst mistakes",
            pictures(worst),
            f"{mistaken:,} of {len(matched):,} pictures have mistakes; these the most. {rule}."
            if mistaken
            else f"None in {len(matched):,} pictures. {rule}.",
        ),
        Gallery(
            "A few predictions",
            pictures(few),
            "At equal distances through the pictures for evaluation.",
        ),
    ]


def _by_image(entries: Iterable[dict[str, Any]]) -> dict[int | str, list[dict[str, Any]]]:
    by_image: dict[int | str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_image.setdefault(entry["image_id"], []).append(entry)
    return by_image


def _confusion(matched: Sequence[Matched], none: int) -> np.ndarray:
    """(N, 3) row, column and count; row `none` is no object, column `none` no detection."""
    rows, columns = [], []
    for each in matched:
        rows += [each.pairs[:, 0], each.missed, np.full(len(each.false), none)]
        columns += [each.pairs[:, 1], np.full(len(each.missed), none), each.false]
    empty = np.zeros(0, np.int64)
    return parts.pairs(np.concatenate([empty, *rows]), np.concatenate([empty, *columns]))


def _class_table(
    source: DetectionSource,
    by_class: Mapping[str, np.ndarray],
    confusion: np.ndarray,
    names: Sequence[str],
) -> Table:
    counts = np.zeros(len(names) + 1, np.int64)  # crowds are no objects
    np.add.at(counts, confusion[:, 0], confusion[:, 2])
    counts = counts[: len(names)]
    kinds = list(by_class) or ["box"]
    # pycocotools numbers the categories in the order of their ids.
    place = np.argsort(np.argsort(source.category_ids))
    none = np.where(counts > 0, 0.0, np.nan)[:, None].repeat(2, 1)  # nothing was found
    scores = np.hstack([by_class[kind][place] if by_class else none for kind in kinds])
    false = np.zeros(len(names) + 1, np.int64)
    alone = confusion[confusion[:, 0] == len(names)]
    false[alone[:, 1]] = alone[:, 2]
    others = parts.taken_for(confusion, [*names, "(missed)"], len(names))
    order = np.lexsort((-counts, scores[:, 0]))
    return Table(
        "Classes",
        ("class", "objects", *(f"{kind} {n}" for kind in kinds for n in ("AP", "AP50")),
         "false", "most often taken for"),
        [
            (names[i], int(counts[i]), *map(float, scores[i]), int(false[i]), others[i])
            for i in order
        ],
        "The lowest AP first. False: detections on no object.",
    )  # fmt: skip


def _draw(
    image: np.ndarray,
    entries: Sequence[dict[str, Any]],
    label_of: Mapping[int, int],
    names: Sequence[str],
    scored: bool,
) -> np.ndarray:
    """The picture, reduced, with boxes and masks in COCO's format."""
    size = image.shape[:2]
    small = parts.reduced(image)
    scale = np.array(small.shape[1::-1]) / size[::-1]
    boxes = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
    boxes = np.hstack((boxes[:, :2], boxes[:, :2] + boxes[:, 2:])) * np.tile(scale, 2)
    rows, columns = (
        (np.arange(new) * old // new) for new, old in zip(small.shape[:2], size, strict=True)
    )
    masks = [
        np.zeros(small.shape[:2], bool)
        if entry["segmentation"] is None
        else rasterise(entry["segmentation"], size)[np.ix_(rows, columns)] > 0
        for entry in entries
    ]
    drawn = draw_detections(
        small,
        boxes=boxes,
        labels=[label_of[entry["category_id"]] for entry in entries],
        scores=[entry["score"] for entry in entries] if scored else None,
        masks=masks,
        class_names=names,
    )
    return np.asarray(drawn)
