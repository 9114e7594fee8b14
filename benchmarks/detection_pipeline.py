"""Images per second of a detector's training pictures, against a plain OpenCV pipeline.

    python benchmarks/detection_pipeline.py [--schedule 3x] [--output detection_pipeline.json]

Both decode the same COCO-like JPEGs (sizes as frequent as COCO's, seven objects on average, with
polygons) and apply the same draws of size, crop and flip:

- "plain" does what mmdet does with them: whole masks, resized and mirrored one by one, normalised
  float32 pixels;
- "vssd_jax" is what this project's hosts do: pixels stay bytes, which the device normalises, and of
  the masks the parts that are not empty go, a bit a pixel.

Per core means per second of processor time, the pipelines taking turns picture by picture; the
ratio is the median over repetitions. MB are those of a batch of the config. `--workers N` measures
the whole data pipeline, Grain and its processes, by the clock.
"""

import argparse
import functools
import io
import json
import pathlib
import statistics
import sys
import tempfile
import time

import cv2
import numpy as np
from absl import flags
from PIL import Image
from pycocotools import mask as coco

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.padding import coco_sizes
from benchmarks.real_step import config_of
from vssd_jax.data.coco_masks import rasterise
from vssd_jax.data.datasets.coco import CocoSource
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.detection_transforms import train_transform
from vssd_jax.data.geometry import draw_geometry
from vssd_jax.data.grouping import ShuffledByShape
from vssd_jax.data.normalization import normalize
from vssd_jax.data.pipeline import train_batches

MEAN_OBJECTS, MAX_OBJECTS = 7, 100


def write_dataset(root: pathlib.Path, count: int) -> tuple[pathlib.Path, pathlib.Path]:
    """COCO-like JPEGs of about 160 kB, polygons of about 25 corners; returns folder and JSON."""
    (root / "train").mkdir()
    images, annotations = [], []
    for i, (height, width) in enumerate(coco_sizes(count).tolist()):
        rng = np.random.default_rng(i)
        low = rng.random((height // 24 + 2, width // 24 + 2, 3)).astype(np.float32) * 255
        pixels = cv2.resize(low, (width, height), interpolation=cv2.INTER_CUBIC)
        pixels += rng.normal(0, 9, (height, width, 1))
        data = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=92)
        (root / "train" / f"{i}.jpg").write_bytes(data.getvalue())
        images.append({"id": i, "file_name": f"{i}.jpg", "height": height, "width": width})
        for _ in range(min(rng.geometric(1 / MEAN_OBJECTS), MAX_OBJECTS)):
            angles = np.sort(rng.random(rng.integers(8, 43))) * 2 * np.pi
            radius = min(height, width) * np.exp(rng.normal(-2, 0.9))
            radius = radius * rng.uniform(0.6, 1, len(angles))
            center = rng.random(2) * [width, height]
            points = center + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
            points = points.clip(0, [width, height]).round(2)
            low, high = points.min(0), points.max(0)
            if min(high - low) < 2:
                continue
            annotations.append({
                "id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": 0,
                "bbox": [*low.tolist(), *(high - low).tolist()], "area": float(np.prod(high - low)),
                "segmentation": [points.ravel().tolist()],
            })  # fmt: skip
    path = root / "instances_train.json"
    categories = [{"id": 1, "name": "thing"}]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return root / "train", path


def plain(element: dict) -> dict:
    """The picture, the boxes and the masks of `train_transform`, with OpenCV alone."""
    geometry = element["geometry"]
    top, left, height, width = geometry.window.tolist()
    size = tuple(map(int, geometry.size))
    shape = np.maximum(element["shape"], size)  # the rare one that `train_transform` scales down

    def moved(array: np.ndarray, interpolation: int) -> np.ndarray:
        array = cv2.resize(array, geometry.first[::-1].tolist(), interpolation=interpolation)
        array = np.ascontiguousarray(array[top : top + height, left : left + width])
        array = cv2.resize(array, size[::-1], interpolation=interpolation)
        return cv2.flip(array, 1) if geometry.flip else array

    masks = np.zeros((len(element["boxes"]), *shape), np.uint8)
    for mask, polygons in zip(masks, element["segmentations"], strict=True):
        codes = coco.frPyObjects(polygons, *element["image"].shape[:2])
        whole = rasterise(coco.merge(codes), element["image"].shape[:2])
        mask[: size[0], : size[1]] = moved(np.ascontiguousarray(whole), cv2.INTER_NEAREST)
    image = np.zeros((*shape, 3), np.float32)
    image[: size[0], : size[1]] = normalize(moved(element["image"], cv2.INTER_LINEAR))
    return {"image": image, "masks": masks}


def check_agreement(result: dict, other: dict) -> None:
    """The comparison means nothing unless both make the same picture and the same masks."""
    height, width = result["image_shape"]
    if other["image"].shape != result["image"].shape:
        return
    image = normalize(result["image"][:height, :width])
    np.testing.assert_allclose(image, other["image"][:height, :width], atol=0.05)
    shape = result["image"].shape[:2]
    if result["valid"].sum() < len(other["masks"]):
        return  # some objects were cut away
    for i, mask in enumerate(other["masks"]):
        x1, y1, x2, y2 = result["mask_boxes"][i]
        row = -(-(x2 - x1) // 8)
        start = result["mask_starts"][i]
        bits = result["masks"][start : start + row * (y2 - y1)].reshape(y2 - y1, row)
        whole = np.zeros(shape, np.uint8)
        whole[y1:y2, x1:x2] = np.unpackbits(bits, axis=-1)[:, : x2 - x1]
        np.testing.assert_array_equal(whole, mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", choices=("1x", "3x"), default="1x")
    parser.add_argument("--pictures", type=int, default=160)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    flags.FLAGS(sys.argv[:1])  # Grain's workers ask for them
    config = config_of(f"mask_rcnn:tiny,{arguments.schedule}")
    draw = functools.partial(
        draw_geometry, short_sides=config.short_sides, long_side=config.long_side, crop=config.crop
    )
    with tempfile.TemporaryDirectory() as folder:
        source = CocoSource(*write_dataset(pathlib.Path(folder), arguments.pictures))
        options = {"seed": 0, "draw": draw, "shapes": config.padded_shapes}
        batch = config.batch_size
        shuffled = ShuffledByShape(
            DecodedSource(source), source.sizes, batch, steps=100_000, **options
        )
        transform = functools.partial(train_transform, draw=draw)
        functions = {
            "plain": lambda element, rng: plain(element),
            "vssd_jax": transform,
        }
        count = arguments.pictures // batch * batch
        for i in range(16):
            element, rng = shuffled[i], np.random.default_rng(0)
            check_agreement(transform(element, rng), plain(element))
        times = {name: [] for name in functions}
        for repetition in range(arguments.repetitions):
            total = dict.fromkeys(functions, 0.0)
            for i in range(repetition * count, (repetition + 1) * count):
                for name, function in functions.items():
                    start = time.process_time()
                    function(shuffled[i], np.random.default_rng(i))
                    total[name] += time.process_time() - start
            for name, seconds in total.items():
                times[name].append(seconds / count)
        few = ShuffledByShape(DecodedSource(source), source.sizes, batch, steps=30, **options)
        batches = train_batches(
            few, transform, batch_size=batch, seed=0, shuffle=False, num_workers=arguments.workers
        )
        sizes = [sum(array.nbytes for array in next(batches).values()) / 1e6 for _ in range(6)]
        start = time.perf_counter()
        rest = sum(1 for _ in batches)
        joint = rest * batch / (time.perf_counter() - start)
    report = {
        "schedule": arguments.schedule,
        "images_per_second_per_core": {n: 1 / statistics.median(t) for n, t in times.items()},
        "ratio": statistics.median(a / b for a, b in zip(*times.values(), strict=True)),
        "mb_a_batch": max(sizes),
        "mb_an_image": max(sizes) / batch,
        "images_per_second_with_grain": joint,
        "workers": arguments.workers,
    }
    print(json.dumps(report, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
