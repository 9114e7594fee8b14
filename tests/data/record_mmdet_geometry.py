"""Records what mmdet 3.3 draws for pictures of two sizes: `mmdet_geometry.npz`.

    python tests/data/record_mmdet_geometry.py

needs mmdet 3.3.0, mmengine and mmcv 2.1 (mmcv-lite will do: compiled operations are not used).
Each row is a picture of the 3x schedule: height and width afterwards, the scale along x and along
y, where its origin came to lie, in pixels of the result, and whether it is mirrored.
"""

import pathlib
import sys
import types

import numpy as np

SIZES = ((480, 640), (640, 427))
SAMPLES = 3000
HERE = pathlib.Path(__file__).parent


class _Missing(types.ModuleType):
    """Stands for mmcv's compiled operations."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def pipeline():
    """The 3x schedule of the authors' configs (Swin's in mmdet, with a long side of 1333)."""
    try:
        import mmcv.ops  # noqa: F401
    except ImportError:
        for name in ("mmcv.ops", "mmcv.ops.roi_align"):
            sys.modules[name] = _Missing(name)
    from mmcv.transforms import RandomChoice
    from mmdet.datasets.transforms import RandomFlip
    from mmdet.registry import TRANSFORMS  # noqa: F401

    def choose(sides):
        scales = [(side, 1333) for side in sides]
        return {"type": "mmdet.RandomChoiceResize", "scales": scales, "keep_ratio": True,
                "resize_type": "mmdet.Resize"}  # fmt: skip

    last = choose(range(480, 801, 32))
    crop = {"type": "mmdet.RandomCrop", "crop_type": "absolute_range", "crop_size": (384, 600),
            "allow_negative_crop": True}  # fmt: skip
    both = RandomChoice([[last], [choose((400, 500, 600)), crop, last]])
    return lambda results: both(RandomFlip(prob=0.5)(results))


def main():
    apply = pipeline()
    np.random.seed(0)
    recorded = {}
    for height, width in SIZES:
        rows = []
        for _ in range(SAMPLES):
            image = np.zeros((height, width, 3), np.uint8)
            out = apply({"img": image, "img_shape": (height, width)})
            matrix, flip = out["homography_matrix"], out.get("flip", False)
            end = out["img"].shape[:2]
            if flip:  # undo: the window is counted from the mirrored picture's left
                matrix = matrix @ np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]])
            rows.append([*end, matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2], flip])
        recorded[f"{height}x{width}"] = np.array(rows, np.float32)
    np.savez_compressed(HERE / "mmdet_geometry.npz", **recorded)


if __name__ == "__main__":
    main()
