"""Seconds of COCO's evaluation: 5,000 images with 100 detections each, boxes and masks.

    python -m benchmarks.coco_evaluation [--small] [--json FILE]

The ground truth has val2017's numbers of objects and categories. Of the detections some are objects
moved a little, some have another class, and most are where nothing is, with low scores.
"""

import argparse
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import common
from vssd_jax.host import cores
from vssd_jax.tasks import coco_metrics

IMAGES, OBJECTS, CATEGORIES, DETECTIONS = 5000, 36_781, 80, 100
SIZE = (480, 640)
SMALL = 100  # times fewer images


class MadeUp:
    """The part of a `DetectionSource` that an evaluation needs.

    Attributes:
      results: detections, as of `coco_metrics.to_results`.
    """

    def __init__(self, images: int, *, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.results: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._images = [
            {"id": 7 * i + 3, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for i in range(images)
        ]
        share = 1 / np.arange(1, CATEGORIES + 1)
        share /= share.sum()
        for image in self._images:
            number = image["id"]
            objects = rng.geometric(images / (images + OBJECTS * images / IMAGES)) - 1
            near = rng.choice(CATEGORIES, 15)  # a picture has few of the categories
            labels, boxes = rng.choice(CATEGORIES, objects, p=share), _boxes(rng, objects)
            for label, box in zip(labels, boxes, strict=True):
                crowd = int(rng.random() < 0.01)
                polygon = _polygon(rng, box)
                code = coco_mask.frPyObjects([polygon], *SIZE)[0]
                self._annotations.append(
                    {
                        "id": len(self._annotations) + 1,
                        "image_id": number,
                        "category_id": int(label) + 1,
                        "bbox": box.tolist(),
                        "area": float(coco_mask.area(code)),
                        "iscrowd": crowd,
                        "segmentation": _text(code) if crowd else [polygon],
                    }
                )
            found = rng.random(objects) < 0.8
            moved = boxes[found] + rng.normal(0, 0.1, (found.sum(), 4)) * np.tile(
                boxes[found, 2:], 2
            )
            moved[:, 2:] = moved[:, 2:].clip(2)
            others = max(DETECTIONS - len(moved), 0)
            boxes = np.concatenate([moved, _boxes(rng, others)])[:DETECTIONS]
            named = np.where(rng.random(found.sum()) < 0.9, labels[found], near[0])
            labels = np.concatenate([named, rng.choice(near, others)])[:DETECTIONS]
            scores = np.concatenate([rng.beta(4, 2, len(moved)), rng.beta(1, 8, others)])
            for box, label, score in zip(boxes, labels, scores, strict=False):
                code = coco_mask.frPyObjects([_polygon(rng, box)], *SIZE)[0]
                self.results.append(
                    {
                        "image_id": number,
                        "category_id": int(label) + 1,
                        "bbox": box.tolist(),
                        "score": round(float(score), 3),  # some are equal
                        "segmentation": _text(code),
                    }
                )

    def ground_truth(self) -> dict[str, Any]:
        """In COCO's instances format."""
        categories = [{"id": i + 1, "name": f"thing {i}"} for i in range(CATEGORIES)]
        return {
            "images": self._images,
            "annotations": self._annotations,
            "categories": categories,
        }


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) x, y, width and height."""
    sides = np.exp(rng.uniform(np.log(8), np.log(np.array(SIZE[::-1]) * 0.8), (count, 2)))
    return np.hstack((rng.random((count, 2)) * (SIZE[::-1] - sides), sides))


def _polygon(rng: np.random.Generator, box: np.ndarray) -> list[float]:
    angle = np.sort(rng.random(12))[:, None] * 2 * np.pi
    points = box[:2] + box[2:] / 2 * (1 + np.hstack((np.cos(angle), np.sin(angle))))
    return points.ravel().tolist()


def _text(code: dict) -> dict[str, Any]:
    return {"size": list(SIZE), "counts": code["counts"].decode()}


def _used() -> float:
    """Processor time of this process and of those that it has waited for, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help=f"{SMALL} times fewer images")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    options = parser.parse_args()
    made_up = MadeUp(IMAGES // (SMALL if options.small else 1))
    start, used = time.perf_counter(), _used()
    scores = coco_metrics.evaluate(made_up, made_up.results)
    row = {
        "images": len(made_up.ground_truth()["images"]),
        "detections": len(made_up.results),
        "seconds": time.perf_counter() - start,
        "seconds of all cores": _used() - used,
        "cores": cores(),
    }
    common.report(options, [row], scores=scores)


if __name__ == "__main__":
    main()
