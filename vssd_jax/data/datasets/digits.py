"""scikit-learn's 1,797 hand-written digits as a TFDS dataset in array_record format."""

import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vssd_jax.data.classification_transforms import EvalTransform
from vssd_jax.data.registry import Dataset
from vssd_jax.errors import UserError

CLASSES = tuple(map(str, range(10)))
TEST_SIZE = 360


class DigitsBuilder(tfds.core.GeneratorBasedBuilder):
    """8x8 grey-scale digits, the last 360 of them as the test split."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=len(CLASSES)),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        from sklearn.datasets import load_digits  # slow to import

        images, labels = load_digits(return_X_y=True)
        images = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        return {
            "train": self._generate_examples(images[:-TEST_SIZE], labels[:-TEST_SIZE]),
            "test": self._generate_examples(images[-TEST_SIZE:], labels[-TEST_SIZE:]),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            # As a PNG: TFDS would need TensorFlow to encode an array.
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            yield index, {"image": io.BytesIO(png.getvalue()), "label": int(label)}


class Digits:
    """The digits as PNGs, a `LabelledSource`; prepared when first used.

    Args:
      data_dir: where the dataset is, or will be.
      split: "train" or "val".

    Raises:
      UserError: a folder that cannot be written.
    """

    class_names = CLASSES

    def __init__(self, data_dir: str, split: str):
        folder = pathlib.Path(data_dir).absolute()
        builder = DigitsBuilder(data_dir=str(folder), file_format="array_record")
        try:
            if not builder.data_path.exists():
                tfds.disable_progress_bar()
                builder.download_and_prepare()
        except OSError as error:
            if not builder.data_path.exists():  # or else another process was first
                raise UserError(
                    f"the digits cannot be prepared in {data_dir}: {error.strerror or error}"
                ) from error
        self._source = tfds.data_source(
            builder.name,
            data_dir=folder,
            split={"train": "train", "val": "test"}[split],
            decoders={"image": tfds.decode.SkipDecoding()},
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return self._source[int(index)]


def _warp(
    image: np.ndarray,
    size: int,
    angle: float = 0.0,
    scale: float = 1.0,
    shift: Sequence[float] | np.ndarray = (0.0, 0.0),
) -> np.ndarray:
    """The digit turned by degrees, scaled and shifted in pixels of the output."""
    old, new = (image.shape[0] - 1) / 2, (size - 1) / 2
    matrix = cv2.getRotationMatrix2D((old, old), angle, scale * size / image.shape[0])
    matrix[:, 2] += new - old + np.asarray(shift)
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_CUBIC)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random rotation, scale and shift; the image becomes (size, size, 3) uint8."""

    size: int

    def __call__(self, element: dict, rng: np.random.Generator) -> dict:
        image = _warp(
            element["image"],
            self.size,
            rng.uniform(-15, 15),
            rng.uniform(0.8, 1.2),
            rng.uniform(-0.1, 0.1, 2) * self.size,
        )
        return {**element, "image": image}


def open_split(config: ml_collections.ConfigDict, split: str) -> Digits:
    """The digits of "train" or "val" in `config.data_dir`, prepared at the first call."""
    return Digits(config.data_dir, split)


def transforms(config: ml_collections.ConfigDict) -> tuple[Callable, Callable]:
    """For training and for evaluation; a mirrored digit would be another shape."""
    size = config.image_size
    return TrainTransform(size), EvalTransform(size, config.eval_crop)


DATASET = Dataset(
    "digits", "classification", open_split, class_names=CLASSES, transforms=transforms
)
