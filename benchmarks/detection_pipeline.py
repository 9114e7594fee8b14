"""Images per second of a detector's training pictures, against a plain OpenCV pipeline.

    python -m benchmarks.detection_pipeline --output detection_pipeline.json

All decode the same COCO-like JPEGs (sizes as frequent as COCO's, seven objects on average, with
polygons) and apply the same draws of size, crop and flip, of the 1x schedule and of 3x:

- "plain" does what mmdet does with them: whole masks, resized and mirrored one by one, normalised
  float32 pixels;
- "vssd_jax" is what this project's hosts do: pixels stay bytes, which the device normalises, and of
  the masks the parts that are not empty go, a bit a pixel.

How the rates are taken is said in `input_pipeline`.
"""

import functools
import io
import json
import pathlib

import cv2
import jax.numpy as jnp
import numpy as np
from PIL import Image
from pycocotools import mask as coco

from benchmarks.input_pipeline import compare
from benchmarks.padding import coco_sizes
from benchmarks.real_step import config_of
from vssd_jax.data.coco_masks import rasterise
from vssd_jax.data.datasets.coco import CocoSource
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.detection_transforms import train_transform
from vssd_jax.data.geometry import draw_geometry
from vssd_jax.data.grouping import ShuffledByShape
from vssd_jax.data.normalization import normalize
from vssd_jax.models.detection.masks import PackedMasks, unpack_mask

MEAN_OBJECTS, MAX_OBJECTS = 7, 100


def write_dataset(root: pathlib.Path, count: int) -> None:
    """COCO-like JPEGs of about 160 kB, with polygons of about 25 corners."""
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
    categories = [{"id": 1, "name": "thing"}]
    (root / "instances_train.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )


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


def check_element(result: dict, other: dict) -> None:
    height, width = result["image_shape"]
    if other["image"].shape != result["image"].shape:
        return
    image = normalize(result["image"][:height, :width])
    np.testing.assert_allclose(image, other["image"][:height, :width], atol=0.05)
    shape = result["image"].shape[:2]
    if result["valid"].sum() < len(other["masks"]):
        return  # some objects were cut away
    masks = PackedMasks(*(jnp.asarray(result[n]) for n in ("masks", "mask_starts", "mask_boxes")))
    for i, mask in enumerate(other["masks"]):
        np.testing.assert_array_equal(unpack_mask(masks, jnp.int32(i), shape), mask)


def pipelines(root: pathlib.Path) -> dict:
    """name -> (index, generator) -> example."""
    source = CocoSource(root / "train", root / "instances_train.json")
    return {
        f"{name}{suffix}": function
        for schedule, suffix in (("1x", ""), ("3x", ", 3x"))
        for name, function in of_a_schedule(source, schedule).items()
    }


def of_a_schedule(source: CocoSource, schedule: str) -> dict:
    config = config_of(f"mask_rcnn:tiny,{schedule}")
    draw = functools.partial(
        draw_geometry, short_sides=config.short_sides, long_side=config.long_side, crop=config.crop
    )
    shuffled = ShuffledByShape(
        DecodedSource(source), source.sizes, min(config.batch_size, len(source)),
        seed=0, steps=100_000, draw=draw, shapes=config.padded_shapes,
    )  # fmt: skip
    return {
        "plain": lambda i, rng: plain(shuffled[i]),
        "vssd_jax": lambda i, rng: train_transform(shuffled[i], rng, draw=draw),
    }


def check_agreement(functions: dict, count: int) -> None:
    """The comparison means nothing unless both make the same pictures and the same masks."""
    for suffix in ("", ", 3x"):
        for i in range(count):
            ours, theirs = (
                functions[f"{name}{suffix}"](i, np.random.default_rng(0))
                for name in ("vssd_jax", "plain")
            )
            check_element(ours, theirs)


if __name__ == "__main__":
    compare(
        __doc__,
        write_pictures=write_dataset,
        pipelines=pipelines,
        check_agreement=check_agreement,
        baselines=("plain", "plain, 3x"),
        about={"picture": "of COCO's sizes, JPEG, quality 92"},
        pictures=160,
    )
