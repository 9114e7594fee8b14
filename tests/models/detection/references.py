"""What the tests of several parts use: random boxes, and RoIAlign as its definition says."""

import math

import numpy as np


def random_boxes(rng, count, size=40.0):
    """Boxes of all kinds: usual, empty, one pixel, outside, slivers, and copies of others."""
    centre, half = rng.uniform(-5, size + 5, (count, 2)), rng.uniform(0, size / 3, (count, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=1)
    kind = rng.integers(0, 10, count)
    boxes[kind == 0, 2:] = boxes[kind == 0, :2]
    boxes[kind == 1, :2] = np.floor(boxes[kind == 1, :2])
    boxes[kind == 1, 2:] = boxes[kind == 1, :2] + 1
    boxes[kind == 2] += 3 * size
    boxes[kind == 3, 2] = boxes[kind == 3, 0] + 0.01
    boxes[kind == 4] = np.round(boxes[kind == 4])
    boxes[kind == 5, 2:] = boxes[kind == 5, :2] - 1  # inside out
    for i in np.flatnonzero(kind == 6):
        boxes[i] = boxes[rng.integers(count)]
    return boxes.astype(np.float32)


def reference_roi_align(features, box, bins, scale):
    """mmcv's definition, sample by sample, in float32 coordinates."""
    height, width, channels = features.shape
    f = np.float32
    x1, y1, x2, y2 = (f(v) * f(scale) - f(0.5) for v in box)
    bin_h, bin_w = (y2 - y1) / f(bins), (x2 - x1) / f(bins)
    count_y, count_x = max(math.ceil(bin_h), 0), max(math.ceil(bin_w), 0)
    result = np.zeros((bins, bins, channels))
    for p in range(bins):
        for q in range(bins):
            for i in range(count_y):
                y = y1 + f(p) * bin_h + f(i + 0.5) * bin_h / f(count_y)
                for j in range(count_x):
                    x = x1 + f(q) * bin_w + f(j + 0.5) * bin_w / f(count_x)
                    if y < -1 or y > height or x < -1 or x > width:
                        continue
                    yc, xc = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                    y0, x0 = int(yc), int(xc)
                    ya, xa = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
                    ly, lx = yc - y0, xc - x0
                    result[p, q] += (1 - ly) * (
                        (1 - lx) * features[y0, x0] + lx * features[y0, xa]
                    ) + ly * ((1 - lx) * features[ya, x0] + lx * features[ya, xa])
    return result / max(count_y * count_x, 1)
