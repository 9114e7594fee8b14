"""ImageNet-1K, from array_record files of TensorFlow Datasets or from plain folders.

Labels number the synsets in the order of their names, the same in both layouts.
"""

import os
import pathlib
from typing import Any

import ml_collections

from vssd_jax.data.image_folder import ImageFolder, class_folders
from vssd_jax.data.registry import Dataset
from vssd_jax.errors import UserError

SPLITS = {"train": "train", "val": "validation"}  # ours -> TensorFlow Datasets'


class TfdsImageNet:
    """`imagenet2012` as `vssd_jax.data.prepare_imagenet` makes it; reading needs no TensorFlow.

    Args:
      data_dir: the folder that holds `imagenet2012/<version>/`.
      split: "train" or "val".

    Raises:
      UserError: no such dataset, or not as array_record files.
    """

    def __init__(self, data_dir: str | os.PathLike, split: str):
        import tensorflow_datasets as tfds  # slow; folders do without

        folder = prepared_folder(data_dir)
        if folder is None:
            raise UserError(
                f"No prepared imagenet2012 in {data_dir}. Make it with `python -m "
                "vssd_jax.data.prepare_imagenet --manual-dir ... --data-dir ...`."
            )
        builder = tfds.builder_from_directory(folder)
        if builder.info.file_format.value != "array_record":
            raise UserError(
                f"{folder} holds {builder.info.file_format.value} files; array_record is needed. "
                "Prepare the dataset into another folder with `python -m "
                "vssd_jax.data.prepare_imagenet`."
            )
        name = SPLITS[split]
        if name not in builder.info.splits:
            raise UserError(
                f"{folder} has no split {name!r}, only {', '.join(builder.info.splits) or 'none'}. "
                "Prepare the dataset again with all archives in place."
            )
        self.class_names = builder.info.features["label"].names
        self._source = builder.as_data_source(
            split=name, decoders={"image": tfds.decode.SkipDecoding()}
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        record = self._source[int(index)]
        return {"image": record["image"], "label": record["label"]}


def prepared_folder(data_dir: str | os.PathLike) -> pathlib.Path | None:
    """The newest complete `imagenet2012/<version>` in `data_dir`, or None."""
    found = pathlib.Path(data_dir).glob("imagenet2012/[0-9]*.[0-9]*.[0-9]*/dataset_info.json")
    folders = [file.parent for file in found]
    return max(folders, key=lambda f: tuple(map(int, f.name.split("."))), default=None)


def open_imagenet(data_dir: str | os.PathLike, split: str) -> TfdsImageNet | ImageFolder:
    """Opens the split "train" or "val" in whichever layout `data_dir` has.

    Raises:
      UserError: `data_dir` is missing or holds neither layout.
    """
    data_dir = pathlib.Path(data_dir)
    if prepared_folder(data_dir) is not None:
        return TfdsImageNet(data_dir, split)
    # A validation part that lacks a class keeps the labels of the training part.
    if (data_dir / "train").is_dir():
        return ImageFolder(data_dir / split, class_folders(data_dir / "train"))
    if (data_dir / "val").is_dir():
        return ImageFolder(data_dir / split)
    raise UserError(
        f"No ImageNet in {data_dir}: expected imagenet2012/<version>/ (made by `python -m "
        "vssd_jax.data.prepare_imagenet`) or folders like train/n01440764/*.JPEG and "
        "val/n01440764/*.JPEG."
    )


def open_split(config: ml_collections.ConfigDict, split: str) -> TfdsImageNet | ImageFolder:
    """The split "train" or "val" in `config.data_dir`."""
    return open_imagenet(config.data_dir, split)


DATASET = Dataset("imagenet2012", "classification", open_split)
