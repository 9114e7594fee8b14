"""ADE20K scene parsing from the folders of ADEChallengeData2016.

    ROOT/images/{training,validation}/*.jpg
    ROOT/annotations/{training,validation}/*.png

In a label map 0 is "other" and ignored, n is class n - 1.
"""

import pathlib

import ml_collections

from vssd_jax import known_classes
from vssd_jax.data.datasets.label_maps import FIELDS, open_label_maps
from vssd_jax.data.label_maps import LabelMaps
from vssd_jax.data.registry import Dataset
from vssd_jax.errors import UserError

CLASSES = known_classes.read("ade20k")


def open_split(config: ml_collections.ConfigDict, split: str) -> LabelMaps:
    """ADE20K's "train" or "val" in `config.data_dir`.

    Raises:
      UserError: folders or pairs are missing.
    """
    if config.train_images is None and not (pathlib.Path(config.data_dir) / "images").is_dir():
        raise UserError(
            f"{config.data_dir} has no folder images; give the folder of ADEChallengeData2016, "
            "with images and annotations (for label maps of your own: config.dataset=label_maps)"
        )
    return open_label_maps(config, split, class_names=CLASSES, reduce_zero_label=True)


DATASET = Dataset("ade20k", "segmentation", open_split, class_names=CLASSES, fields=FIELDS)
