"""Pictures of several hand-written digits each, with exact masks and boxes.

The digits are scikit-learn's (8x8 pixels, they come with the package), enlarged, coloured and
laid over each other on a cluttered background. They stand in for COCO and ADE20K where those are
not at hand.
"""

import dataclasses
import functools

import cv2
import numpy as np

NUM_CLASSES = 10  # the label of a digit is its value

# Of a digit, as a share of full ink: what counts as the object. Low, so that strokes are broad.
_INK = 0.3


@dataclasses.dataclass(frozen=True)
class Instance:
    """A digit of a scene.

    Attributes:
      label: 0 to 9.
      mask: (H, W) bool, the part that later digits leave visible.
      box: (4,) float32, x1 y1 x2 y2 of the mask in pixels; x2 and y2 are exclusive.
    """

    label: int
    mask: np.ndarray
    box: np.ndarray


@functools.cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # slow to import

    data = load_digits()
    held_out = np.arange(len(data.target)) % 5 == 0
    chosen = {"train": ~held_out, "test": held_out}[split]
    return (data.images[chosen] / 16).astype(np.float32), data.target[chosen]


def make_scene(
    rng: np.random.Generator,
    *,
    size: tuple[int, int] = (128, 160),
    num_digits: tuple[int, int] = (1, 6),
    digit_size: tuple[int, int] = (28, 72),
    min_visible: float = 0.6,
    clutter: int = 12,
    split: str = "train",
) -> tuple[np.ndarray, list[Instance]]:
    """A scene; equal generators make equal scenes.

    Args:
      rng: the source of everything random.
      size: (H, W) in pixels.
      num_digits: least and greatest number of digits; a digit that finds no room is left out.
      digit_size: least and greatest height of a digit in pixels.
      min_visible: the part of its mask that each digit keeps when others cover it.
      clutter: number of lines, rings and discs in the background.
      split: "train" or "test", disjoint sets of handwriting.

    Returns:
      The image, (H, W, 3) uint8 RGB, and its instances, back to front.
    """
    height, width = size
    image = _background(rng, size, clutter)
    digits, labels = _digits(split)
    # The topmost digit of each pixel, -1 for none, and the whole area of each digit.
    owner = np.full(size, -1, np.int32)
    placed: list[int] = []
    areas: list[int] = []
    for _ in range(rng.integers(num_digits[0], num_digits[1] + 1)):
        index = rng.integers(len(digits))
        for _ in range(20):
            patch = _render(rng, digits[index], digit_size, size)
            h, w = patch.shape
            y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            window = (slice(y, y + h), slice(x, x + w))
            inside = patch > _INK
            trial = owner.copy()
            trial[window][inside] = len(placed)
            visible = np.bincount(trial[trial >= 0], minlength=len(placed) + 1)
            if all(visible[:-1] >= min_visible * np.asarray(areas)):
                break
        else:
            continue
        owner = trial
        placed.append(int(labels[index]))
        areas.append(int(inside.sum()))
        _paint(rng, image[window], patch)
    instances = []
    for i, label in enumerate(placed):
        mask = owner == i
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32)
        instances.append(Instance(label, mask, box))
    image += rng.normal(0, 5, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), instances


def _background(rng: np.random.Generator, size: tuple[int, int], clutter: int) -> np.ndarray:
    """(H, W, 3) float64: a smooth colour field with dull shapes on it."""
    height, width = size
    coarse = rng.uniform(60, 140, (4, 4, 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(clutter):
        colour = rng.uniform(30, 170, 3).tolist()
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        kind, thickness = rng.integers(3), int(rng.integers(1, 4))
        if kind == 0:
            end = (int(rng.integers(width)), int(rng.integers(height)))
            cv2.line(image, centre, end, colour, thickness)
        else:
            radius = int(rng.integers(3, max(4, min(size) // 8)))
            cv2.circle(image, centre, radius, colour, thickness if kind == 1 else -1)
    return image.astype(np.float64)


def _render(
    rng: np.random.Generator,
    digit: np.ndarray,
    digit_size: tuple[int, int],
    size: tuple[int, int],
) -> np.ndarray:
    """The ink of one digit, (h, w) float32 in 0..1, cut to where it is; fits into `size`."""
    height = min(int(rng.integers(digit_size[0], digit_size[1] + 1)), size[0])
    width = min(max(8, round(height * rng.uniform(0.75, 1.0))), size[1])
    # Empty borders let the strokes at the edge of the 8x8 picture end smoothly.
    ink = cv2.resize(np.pad(digit, 1), (width, height), interpolation=cv2.INTER_CUBIC)
    inside = ink > _INK
    ys, xs = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return np.clip(ink[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1], 0, 1)


def _paint(rng: np.random.Generator, window: np.ndarray, ink: np.ndarray) -> None:
    """Lays a digit over `window` in place: bright or dark, with a darker or lighter rim."""
    bright = rng.random() < 0.7
    colour = rng.uniform(170, 255, 3) if bright else rng.uniform(0, 40, 3)
    shade = (0.55 + 0.45 * np.clip((ink - _INK) / 0.3, 0, 1))[..., None]
    paint = colour * shade if bright else 255 - (255 - colour) * shade
    inside = ink > _INK
    window[inside] = paint[inside]
