"""Detections in COCO's result format, their mean average precision, and pictures of them."""

import io
import json
import os
import pathlib
import tempfile
import urllib.parse
from collections.abc import Container
from typing import Any

import jax
import numpy as np

from vssd_jax.data.coco_masks import rasterise
from vssd_jax.data.drawing import draw_detections
from vssd_jax.data.source import DetectionSource, Source
from vssd_jax.distributed import is_main
from vssd_jax.models.detection.masks import paste_masks
from vssd_jax.models.family import Detections
from vssd_jax.tasks import average_precision
from vssd_jax.tasks.average_precision import KINDS, NUMBERS, results_of


def to_results(
    detections: Detections, batch: dict, source: DetectionSource, *, threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Detections of a batch in COCO's result format, in pixels of the original images.

    Args:
      detections: of `Detector.predict`, as NumPy arrays.
      batch: `index`, `image_shape` and `original_shape` as of the `eval_transform` of detection;
        images whose `valid` (if there) is False are left out.
      source: where the images come from.
      threshold: least probability of a mask's pixel.

    Returns:
      A dict per detection: image_id, category_id, bbox (x y width height), score, segmentation
      (run-length code).
    """
    results = []
    for i, index in enumerate(batch["index"]):
        if not batch.get("valid", np.ones(len(batch["index"]), bool))[i]:
            continue
        found = detections.valid[i]
        height, width = map(int, batch["original_shape"][i])
        boxes, codes = in_original(
            np.asarray(detections.boxes[i])[found], np.asarray(detections.masks[i])[found],
            batch["image_shape"][i], (height, width), threshold,
        )  # fmt: skip
        for box, score, label, code in zip(
            boxes, detections.scores[i][found], detections.labels[i][found], codes or (),
            strict=True,
        ):  # fmt: skip
            x1, y1, x2, y2 = map(float, box)
            results.append(
                {
                    "image_id": source.image_ids[index],
                    "category_id": int(source.category_ids[label]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": float(score),
                    "segmentation": code,
                }
            )
    return results


def in_original(
    boxes: np.ndarray,
    masks: np.ndarray | None,
    image_shape: np.ndarray,
    size: tuple[int, int],
    threshold: float = 0.5,
) -> tuple[np.ndarray, list[dict[str, Any]] | None]:
    """Boxes and masks of the resized image in pixels of the original one.

    Args:
      boxes: (N, 4) x1 y1 x2 y2.
      masks: (N, 28, 28) logits of each box's class, or None.
      image_shape: (H, W) of the resized image, without padding.
      size: (H, W) of the original one.
      threshold: least probability of a mask's pixel.

    Returns:
      (N, 4) float32 boxes, and a run-length code of each mask.
    """
    from pycocotools import mask as coco_mask

    scale = np.array(size[::-1], np.float32) / image_shape[::-1]
    boxes = np.float32(boxes) * np.tile(scale, 2).astype(np.float32)
    if masks is None:
        return boxes, None
    codes = []
    # One by one: the masks of a large picture together take gigabytes.
    for logits, box in zip(masks, boxes, strict=True):
        probabilities = 1 / (1 + np.exp(-np.float32(logits[None])))
        mask = paste_masks(probabilities, box[None], size, threshold)[0]
        code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        codes.append({"size": list(size), "counts": code["counts"].decode()})
    return boxes, codes


def evaluate(
    source: DetectionSource,
    results: list[dict],
    *,
    without: Container[int | str] = (),
    masks: bool = True,
    by_class: dict[str, np.ndarray] | None = None,
) -> dict[str, dict[str, float]]:
    """Mean average precision by pycocotools, over the images of the source.

    Args:
      source: has the ground truth.
      results: of `to_results`.
      without: ids of images that are left out.
      masks: whether masks are judged too. An object without a mask is then a region, that of its
        box, where masks neither count as right nor as wrong.
      by_class: filled with `class_ap` of each kind, where there are results.

    Returns:
      {"box": ..., "mask": ...}, each with the `NUMBERS`; -1 where there are no such objects.
    """
    kinds = [kind for kind in KINDS if masks or kind == "box"]
    if not results:
        return {kind: dict.fromkeys(NUMBERS, 0.0) for kind in kinds}
    scores = average_precision.evaluate(
        source.ground_truth(),
        results,
        without=without,
        masks=masks,
        progress=is_main(),
        # Several processes of a run do the same here, and may share a machine's cores.
        processes=None if jax.process_count() == 1 else 1,
    )
    if by_class is not None:
        by_class |= {kind: class_ap(score.precision) for kind, score in scores.items()}
    return {kind: score.numbers for kind, score in scores.items()}


def class_ap(precision: np.ndarray) -> np.ndarray:
    """(categories, 2) AP and AP50 of each category, in the order of their ids.

    Not-a-number for one without objects.

    Args:
      precision: of pycocotools: (thresholds, recalls, categories, sizes, numbers of detections).
    """
    curves = precision[:, :, :, 0, -1].astype(np.float64)  # all sizes, most detections
    curves[curves < 0] = np.nan  # there is all or nothing of a category
    return np.stack((curves.mean((0, 1)), curves[0].mean(0)), axis=1)


def save_predictions(
    folder: str | os.PathLike,
    source: DetectionSource,
    decoded: Source,
    results: list[dict],
    *,
    min_score: float = 0.3,
    max_pictures: int | None = None,
) -> None:
    """Writes `bbox.json` and `segm.json` (COCO's result format) and pictures.

    The pictures are the images with boxes, masks, names and scores (see `draw_detections`), as
    `<image id>.png`; none for an image that cannot be read.

    Args:
      folder: made if missing; each file is written beside its place and then renamed.
      source: where the images come from.
      decoded: its samples with pixels, see `DecodedSource`.
      results: of `to_results`.
      min_score: of the detections that are drawn.
      max_pictures: draw the first images only.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS.values():
        _write(folder / f"{kind}.json", json.dumps(results_of(kind, results)).encode())
    by_image: dict[int | str, list[dict]] = {}
    for result in results:
        if result["score"] >= min_score:
            by_image.setdefault(result["image_id"], []).append(result)
    label = {category: i for i, category in enumerate(source.category_ids.tolist())}
    for index in range(len(source))[:max_pictures]:
        element = decoded[index]
        if element["replaced"]:
            continue
        found = by_image.get(element["image_id"], [])
        boxes = np.array([r["bbox"] for r in found]).reshape(-1, 4)  # x y width height
        picture = draw_detections(
            element["image"],
            boxes=np.hstack((boxes[:, :2], boxes[:, :2] + boxes[:, 2:])),
            labels=[label[r["category_id"]] for r in found],
            scores=[r["score"] for r in found],
            masks=[rasterise(r["segmentation"], element["image"].shape[:2]) > 0 for r in found],
            class_names=source.class_names,
        )
        data = io.BytesIO()
        picture.save(data, "png")
        # An id may be any string, even a path.
        name_of_file = urllib.parse.quote(str(element["image_id"]), safe="")
        _write(folder / f"{name_of_file}.png", data.getvalue())


def _write(path: pathlib.Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        file.write(data)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
