"""A dataset of one's own for classification, in one file: pictures of one colour each.

python train.py --config tests/extending/toy_dataset.py
"""

import io

import numpy as np
from PIL import Image

from vssd_jax.config import classification_config
from vssd_jax.data.registry import Dataset, register

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


class Colours:
    class_names = tuple(COLOURS)

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        label = int(index) % len(COLOURS)
        rng = np.random.default_rng(int(index))
        pixels = np.array(COLOURS[self.class_names[label]]) + rng.integers(0, 50, (40, 50, 3))
        png = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(png, "png")
        return {"image": png.getvalue(), "label": label}


DATASET = Dataset(
    name="colours",
    task="classification",
    open=lambda config, split: Colours({"train": 24, "val": 9}[split]),
    class_names=tuple(COLOURS),
)
register(DATASET)


def get_config(arg=None):
    config = classification_config()
    config.update(
        model="vssd_nano", dataset="colours", image_size=32, batch_size=8, eval_batch_size=8,
        epochs=1, log_every_steps=1,
    )  # fmt: skip
    config.model_options = {
        "embed_dim": 8, "depths": (1, 0, 0, 1), "num_heads": (1, 1, 2, 2), "d_state": 4,
        "stem": "patch", "downsample": "patch",  # compile fast
    }  # fmt: skip
    config.augmentation = {"randaugment_num_ops": 0}
    return config
