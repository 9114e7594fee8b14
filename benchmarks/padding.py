"""How many shapes a detector's epoch has, and how many of its pixels are padding.

    python benchmarks/padding.py [--annotations instances_train2017.json]

For both schedules of configs/mask_rcnn.py, three ways to make batches: the config's padded shapes;
one landscape and one portrait shape; and, as mmdet does, batches of one orientation of which each
two images, those of a GPU, are padded to the larger (to multiples of 32: hundreds of shapes, no
matter where nothing is compiled). In 3x a quarter is padding: short sides from 480 to 800 and crops
of any proportions fill a range of sizes that no six shapes fit well (a search found none below
24 %).

Without annotations the sizes are drawn from a table of COCO's most frequent ones, from memory and
rounded: for the exact share give the file.
"""

import argparse
import functools
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.real_step import config_of
from vssd_jax.data.geometry import draw_geometry
from vssd_jax.data.grouping import ShuffledByShape

# Height and width, and how often in a hundred pictures.
FREQUENT = {
    (480, 640): 26, (427, 640): 16.5, (640, 480): 9, (426, 640): 7, (640, 427): 5, (425, 640): 4,
    (375, 500): 4, (424, 640): 2.5, (640, 640): 2, (333, 500): 2, (428, 640): 2, (640, 426): 2,
    (500, 375): 1.6, (360, 640): 1.5, (612, 612): 1.5, (640, 425): 1.2, (500, 333): 0.8,
    (334, 500): 0.8, (332, 500): 0.8, (478, 640): 0.6, (359, 640): 0.5, (400, 640): 0.5,
    (500, 500): 0.5, (640, 512): 0.4, (480, 480): 0.3, (513, 640): 0.3, (640, 361): 0.3,
    (612, 459): 0.3, (540, 640): 0.3, (281, 500): 0.3, (300, 640): 0.2, (600, 640): 0.2,
}  # fmt: skip


def coco_sizes(count: int, seed: int = 0) -> np.ndarray:
    """(count, 2) heights and widths as frequent as in COCO, about."""
    weights = np.array(list(FREQUENT.values()))
    rng = np.random.default_rng(seed)
    return np.array(list(FREQUENT))[rng.choice(len(weights), count, p=weights / weights.sum())]


def read_sizes(path: pathlib.Path) -> np.ndarray:
    images = json.loads(path.read_text())["images"]
    return np.array([(image["height"], image["width"]) for image in images])


def of_a_config(config, shapes, sizes: np.ndarray) -> dict[str, float]:
    """Shapes, share of padding and images that are scaled down, in an epoch."""
    draw = functools.partial(
        draw_geometry, short_sides=config.short_sides, long_side=config.long_side, crop=config.crop
    )
    source = ShuffledByShape(
        sizes, sizes, config.batch_size, seed=0, steps=1, draw=draw, shapes=shapes
    )
    epoch = source.epoch(0)
    return {
        "shapes": len(np.unique(epoch.shapes, axis=0)),
        "padding": epoch.padding(),
        "scaled_down": float((epoch.scale() < 1).mean()),
    }


def in_twos(config, sizes: np.ndarray) -> dict[str, float]:
    """The same where each two images of one orientation are padded to the larger of them."""
    rng = np.random.default_rng(0)
    sizes = rng.permutation(sizes)
    portrait = sizes[:, 0] > sizes[:, 1]
    groups = [part[: len(part) // 2 * 2] for part in (sizes[~portrait], sizes[portrait])]
    drawn = draw_geometry(
        np.concatenate(groups),
        rng,
        short_sides=config.short_sides,
        long_side=config.long_side,
        crop=config.crop,
    )
    pairs = drawn.size.reshape(-1, 2, 2)
    padded = -(-pairs.max(1) // 32) * 32
    return {
        "shapes": len(np.unique(padded, axis=0)),
        "padding": 1 - pairs.prod(-1).sum() / (2 * padded.prod(-1).sum()),
        "scaled_down": 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotations", type=pathlib.Path)
    parser.add_argument("--images", type=int, default=100_000)
    arguments = parser.parse_args()
    given = arguments.annotations
    sizes = read_sizes(given) if given else coco_sizes(arguments.images)
    print(f"{'schedule':<10}{'batches':<24}{'shapes':>8}{'padding':>10}{'scaled down':>13}")
    for schedule in ("1x", "3x"):
        config = config_of(f"mask_rcnn:tiny,{schedule}")
        for name, result in (
            ("the config's shapes", of_a_config(config, config.padded_shapes, sizes)),
            ("two shapes", of_a_config(config, ((800, 1344), (1344, 800)), sizes)),
            ("padded in twos", in_twos(config, sizes)),
        ):
            shapes, padding, scaled = result.values()
            print(f"{schedule:<10}{name:<24}{shapes:>8}{padding:>10.1%}{scaled:>13.2%}")


if __name__ == "__main__":
    main()
