"""scikit-learn's 1,797 hand-written digits as a TFDS dataset in array_record format."""

import io
import pathlib

import cv2
import numpy as np
import tensorflow_datasets as tfds

NUM_CLASSES = 10
TEST_SIZE = 360
MEAN, STD = 0.305, 0.376  # of the pixels, scaled to [0, 1]


class Digits(tfds.core.GeneratorBasedBuilder):
    """8x8 grey-scale digits, the last 360 of them as the test split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        return {
            "train": self._generate_examples(images[:-TEST_SIZE], labels[:-TEST_SIZE]),
            "test": self._generate_examples(images[-TEST_SIZE:], labels[-TEST_SIZE:]),
        }

    def _generate_examples(self, images, labels):
        from PIL import Image

        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            # Encoded here: TFDS would need TensorFlow to encode an array.
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            yield index, {"image": io.BytesIO(png.getvalue()), "label": int(label)}


def load(data_dir: str, split: str):
    """A source of `{"image": PNG bytes, "label": int}`, prepared at the first call."""
    builder = Digits(data_dir=str(pathlib.Path(data_dir).absolute()), file_format="array_record")
    builder.download_and_prepare()
    return tfds.data_source(
        "digits",
        data_dir=builder.data_path.parents[1],
        split=split,
        decoders={"image": tfds.decode.SkipDecoding()},
    )


def _warp(png: bytes, size: int, angle: float, scale: float, shift) -> np.ndarray:
    """The decoded digit, turned by degrees, scaled and shifted in pixels: (size, size, 3)."""
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)
    old, new = (image.shape[0] - 1) / 2, (size - 1) / 2
    matrix = cv2.getRotationMatrix2D((old, old), angle, scale * size / image.shape[0])
    matrix[:, 2] += new - old + np.asarray(shift)
    image = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_CUBIC)
    image = (image.astype(np.float32) / 255 - MEAN) / STD
    return np.repeat(image[..., None], 3, axis=-1)


def train_transform(element: dict, rng: np.random.Generator, *, size: int) -> dict:
    """Random rotation, scale and shift."""
    image = _warp(
        element["image"],
        size,
        rng.uniform(-12, 12),
        rng.uniform(0.9, 1.1),
        rng.uniform(-0.08, 0.08, 2) * size,
    )
    return {"image": image, "label": np.int32(element["label"])}


def eval_transform(element: dict, *, size: int) -> dict:
    return {
        "image": _warp(element["image"], size, 0.0, 1.0, (0.0, 0.0)),
        "label": np.int32(element["label"]),
    }
