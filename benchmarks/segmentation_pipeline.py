"""Images per second of segmentation's training transform, against plain OpenCV, in one run.

    python -m benchmarks.segmentation_pipeline --output segmentation_pipeline.json

All pipelines decode the same JPEGs and label maps of ADE20K's most common size and apply the same
draws of scale, crop, flip and colours; their pixels are the same, bit for bit:

- "opencv" is the plain pipeline, which computes colours in float32 and normalises on the host;
- "opencv, uint8" stops before normalisation, for a comparison of the pixel work alone;
- "vssd_jax" is what this project's hosts do: the device normalises.

Where mmsegmentation is installed, "mmsegmentation" are its own transforms, with draws of their own
(of the same distributions) and without normalisation, which is the device's there too.

How it is measured: see `benchmarks/input_pipeline.py`.
"""

import importlib.util
import pathlib
import sys
import unittest.mock

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.input_pipeline import BICUBIC, MEAN, STD, compare
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.label_maps import open_folders
from vssd_jax.data.segmentation_transforms import IGNORE, train_transform
from vssd_jax.data.sizes import fitted_size

CLASSES = 150
CROP = 512


def write_pictures(root: pathlib.Path, count: int) -> None:
    """683x512 JPEGs of about 120 kB, a third of them upright, and label maps of a dozen classes."""
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        height, width = (512, 683) if i % 3 else (683, 512)
        pixels = rng.normal(0, 6, (height, width, 1))
        for cells, weight in ((4, 0.5), (16, 0.3), (64, 0.2)):
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            pixels = pixels + weight * np.asarray(small.resize((width, height), BICUBIC), float)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(root / f"images/{i:05d}.jpg", quality=90)
        label = regions(height, width, rng)
        Image.fromarray(label).save(root / f"labels/{i:05d}.png")


def regions(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W) uint8 labels 0 to 150: what is nearest to each of 25 points, with wavy borders."""
    points = rng.random((25, 2)) * [height, width]
    labels = rng.integers(0, CLASSES + 1, 12)[rng.integers(0, 12, len(points))]
    y, x = np.mgrid[:height, :width]
    wave = 6 * np.sin(y / 17) + 6 * np.cos(x / 23)
    distance = np.stack([(y + wave - p) ** 2 + (x + wave - q) ** 2 for p, q in points])
    return labels[distance.argmin(0)].astype(np.uint8)


def _clip(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 255).astype(np.uint8)


def plain_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`photometric_distortion`, every pixel computed in float32."""

    def contrast(image):
        return _clip(image * np.float32(rng.uniform(0.5, 1.5))) if rng.integers(2) else image

    if rng.integers(2):
        image = _clip(image + np.float32(rng.uniform(-32, 32)))
    contrast_first = rng.integers(2)
    if contrast_first:
        image = contrast(image)
    saturate, turn = rng.integers(2, size=2)
    if saturate or turn:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        if saturate:
            hsv[..., 1] = _clip(hsv[..., 1] * np.float32(rng.uniform(0.5, 1.5)))
        if turn:
            hsv[..., 0] = (hsv[..., 0].astype(np.int32) + rng.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if contrast_first else contrast(image)


def plain_window(label: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice]:
    """`random_crop_window`, with `numpy.unique` to count."""

    def draw():
        top, left = (rng.integers(max(length - CROP, 0) + 1) for length in label.shape)
        return slice(top, top + CROP), slice(left, left + CROP)

    window = draw()
    for _ in range(10):
        labels, counts = np.unique(label[window], return_counts=True)
        counts = counts[labels != IGNORE]
        if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
            break
        window = draw()
    return window


def plain_example(image: pathlib.Path, label: pathlib.Path, rng: np.random.Generator) -> dict:
    """`train_transform` of two files, step by step."""
    pixels = cv2.imread(str(image), cv2.IMREAD_COLOR_RGB)
    labels = cv2.imread(str(label), cv2.IMREAD_UNCHANGED)
    labels[labels == 0] = IGNORE
    labels = labels - 1
    labels[labels == IGNORE - 1] = IGNORE
    factor = rng.uniform(0.5, 2.0)
    height, width = fitted_size(labels.shape, int(512 * factor), int(2048 * factor))
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
    window = plain_window(labels, rng)
    pixels, labels = pixels[window], labels[window]
    if rng.random() < 0.5:
        pixels, labels = np.flip(pixels, 1), np.flip(labels, 1)
    pixels = plain_distortion(np.ascontiguousarray(pixels), rng)
    below, right = (CROP - length for length in labels.shape)
    return {
        "image": np.pad(pixels, ((0, below), (0, right), (0, 0))),
        "image_shape": np.array(labels.shape, np.int32),
        "label": np.pad(labels, ((0, below), (0, right)), constant_values=IGNORE),
    }


def plain_complete(image: pathlib.Path, label: pathlib.Path, rng: np.random.Generator) -> dict:
    """`plain_example` through normalisation: (512, 512, 3) float32, 0 where padded."""
    example = plain_example(image, label, rng)
    height, width = example["image_shape"]
    pixels = example["image"].astype(np.float32)
    pixels /= 255
    pixels -= MEAN
    pixels /= STD
    pixels[height:] = 0
    pixels[:, width:] = 0
    return {"image": pixels, "label": example["label"]}


def mmseg_transforms() -> dict | None:
    """name -> class of mmsegmentation's transforms for training; None without mmsegmentation."""
    if importlib.util.find_spec("mmseg") is None:
        return None
    if importlib.util.find_spec("mmcv._ext") is None:
        # mmcv-lite. Models need its compiled operations; no transform does.
        operations = unittest.mock.MagicMock(__path__=[], __spec__=None)
        sys.modules.setdefault("mmcv.ops", operations)
    import mmcv.transforms
    import mmseg.datasets.transforms

    return {**vars(mmcv.transforms), **vars(mmseg.datasets.transforms)}


def mmseg_pipeline(images: list, labels: list):
    """The training pipeline of mmsegmentation's ADE20K config; None without mmsegmentation."""
    known = mmseg_transforms()
    if known is None:
        print("mmsegmentation is not installed, and left out")
        return None
    steps = [
        known["LoadImageFromFile"](),
        known["LoadAnnotations"](),
        known["RandomResize"](scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
        known["RandomCrop"](crop_size=(CROP, CROP), cat_max_ratio=0.75),
        known["RandomFlip"](prob=0.5),
        known["PhotoMetricDistortion"](),
    ]

    def example(i, rng):
        np.random.seed(rng.integers(2**32))
        results = {
            "img_path": str(images[i]),
            "seg_map_path": str(labels[i]),
            "reduce_zero_label": True,
            "seg_fields": [],
        }
        for step in steps:
            results = step(results)
        return {"image": results["img"], "label": results["gt_seg_map"]}

    return example


def pipelines(root: pathlib.Path) -> dict:
    """name -> (index, generator) -> example."""
    source = open_folders(
        root / "images",
        root / "labels",
        class_names=[str(label) for label in range(CLASSES)],
        reduce_zero_label=True,
    )
    decoded = DecodedSource(source)
    images, labels = (sorted((root / kind).iterdir()) for kind in ("images", "labels"))
    functions = {
        "opencv": lambda i, rng: plain_complete(images[i], labels[i], rng),
        "opencv, uint8": lambda i, rng: plain_example(images[i], labels[i], rng),
        "vssd_jax": lambda i, rng: train_transform(decoded[i], rng),
    }
    if (theirs := mmseg_pipeline(images, labels)) is not None:
        functions["mmsegmentation"] = theirs
    return functions


def check_agreement(functions: dict, count: int) -> None:
    """The comparison means nothing unless both do the same work."""
    for i in range(count):
        one = functions["opencv, uint8"](i, np.random.default_rng(i))
        other = functions["vssd_jax"](i, np.random.default_rng(i))
        for name, value in one.items():
            if not np.array_equal(value, other[name]):
                raise AssertionError(f"OpenCV and vssd_jax differ on {name} of picture {i}")


if __name__ == "__main__":
    compare(
        __doc__,
        write_pictures=write_pictures,
        pipelines=pipelines,
        check_agreement=check_agreement,
        baselines=("opencv", "opencv, uint8"),
        about={"picture": "683x512 JPEG, quality 90", "image_size": CROP},
        pictures=100,
    )
