"""What mmsegmentation's transforms for training do to a picture, as histograms.

`mmsegmentation_draws.json` was recorded with mmsegmentation 1.2.2 and mmcv-lite 2.1.0. To record it
anew, in an environment that has them and this project:

    python -m tests.data.mmsegmentation_draws

A seed means something else to mmsegmentation, so that only distributions can be compared.
"""

import collections
import json
import pathlib

import numpy as np

RECORDED = pathlib.Path(__file__).with_suffix(".json")
SAMPLES = 20_000
HEIGHT, WIDTH, CROP, SHORT, LONG = 64, 96, 32, 64, 256
# Middles of the ranges of 8 levels that are counted: one level more or less is rounding.
COLOURS = np.uint8([[[100, 100, 100], [204, 124, 44], [36, 164, 220], [180, 60, 148]]])


def picture():
    """A picture and a label map that both tell the column of a pixel; the picture also the row."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8)
    return np.stack([rows, columns, columns], -1), columns


def corner():
    """A label map of one class with others in a corner, so that most windows are refused."""
    label = np.zeros((14, 18), np.uint8)
    label[:6, :7] = 1 + np.arange(7) % 3
    label[12:, 15:] = 255
    return label


def geometry(image, label):
    """Scale, place and direction of a crop of `picture()`: name -> whole number.

    `image` is (h, w, 3) with h and w of at most `CROP`, without padding.
    """
    first, last = int(label[0, 0]), int(label[0, -1])
    return {
        "columns seen": abs(last - first),
        "rows seen": int(image[-1, 0, 0]) - int(image[0, 0, 0]),
        "first column": min(first, last),
        "first row": int(image[0, 0, 0]),
        "direction": int(np.sign(last - first)),
    }


def colours(image):
    """Ranges of the levels of `COLOURS` after a distortion: name -> whole number."""
    return {f"colour {i}": int(level) // 8 for i, level in enumerate(image.ravel())}


def histograms(samples):
    """name -> value -> count, of dicts."""
    counts = collections.defaultdict(collections.Counter)
    for sample in samples:
        for name, value in sample.items():
            counts[name][str(value)] += 1
    return {name: dict(sorted(c.items(), key=lambda x: int(x[0]))) for name, c in counts.items()}


def theirs():
    """Samples of mmsegmentation."""
    from benchmarks.segmentation_pipeline import mmseg_transforms

    known = mmseg_transforms()
    if known is None:
        raise SystemExit("mmsegmentation is not installed")
    np.random.seed(0)
    resize = known["RandomResize"](scale=(LONG, SHORT), ratio_range=(0.5, 2.0), keep_ratio=True)
    crop = known["RandomCrop"](crop_size=(CROP, CROP), cat_max_ratio=0.75)
    small_crop = known["RandomCrop"](crop_size=(8, 8), cat_max_ratio=0.75)
    flip, distort = known["RandomFlip"](prob=0.5), known["PhotoMetricDistortion"]()
    image, label = picture()
    for _ in range(SAMPLES):
        results = {"img": image.copy(), "gt_seg_map": label.copy(), "seg_fields": ["gt_seg_map"]}
        results["img_shape"] = image.shape[:2]
        for transform in (resize, crop, flip):
            results = transform(results)
        top, _, left, _ = small_crop.crop_bbox({"img": corner(), "gt_seg_map": corner()})
        # The order blue, green, red is theirs.
        distorted = distort({"img": np.ascontiguousarray(COLOURS[..., ::-1])})["img"][..., ::-1]
        yield {
            **geometry(results["img"], results["gt_seg_map"]),
            "window": 100 * int(top) + int(left),
            **colours(distorted),
        }


if __name__ == "__main__":
    found = histograms(theirs())
    lines = [f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in found.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
