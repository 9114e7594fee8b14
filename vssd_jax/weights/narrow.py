"""Weights in fewer bytes, and what that costs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vssd_jax.errors import UserError
from vssd_jax.models import family
from vssd_jax.models.split import SplitModel
from vssd_jax.weights.folder import Weights

DTYPES: dict[str, Any] = {
    "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16,
}  # fmt: skip
# How many random pictures of 224 x 224 the cost is measured on.
_PICTURES = {"classification": 32, "segmentation": 2, "detection": 2}


def narrow(params: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Parameters whose matrices and kernels are `dtype`; vectors are float32.

    Vectors (biases, norms, step sizes and decays of the scans) have less than a hundredth of the
    bytes, and rounding them would move whole channels.

    Args:
      params: by name, of any floating-point dtype.
      dtype: "float32", "bfloat16" or "float16".

    Raises:
      UserError: values beyond the greatest of float16.
    """
    narrowed = {}
    for name, array in params.items():
        with np.errstate(over="ignore"):
            values = array.astype(DTYPES[dtype] if array.ndim > 1 else np.float32)
        if not np.isfinite(values).all() and np.isfinite(array).all():
            raise UserError(
                f"the tensor {name} has values up to {np.abs(array).max():.3g}, too large for "
                f"{dtype}; take bfloat16"
            )
        narrowed[name] = values
    return narrowed


def num_bytes(params: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in params.values())


def cost(
    weights: Weights,
    narrowed: Mapping[str, np.ndarray],
    *,
    activations: str = "float32",
    features: bool = False,
) -> str:
    """What narrower weights and activations change on random pictures, measured; a line.

    What is compared are the logits, or the feature maps: of a detector, whose boxes have no
    counterpart among those of another, with `features`, and of what has no classifier.

    Args:
      weights: the model, and its parameters to compare with, in float32 activations.
      narrowed: parameters by name.
      activations: dtype of the model with these.
      features: compare the feature maps of the backbone.
    """
    task = family.task_of(weights.model)
    features = features or task == "detection" or not weights.num_classes
    count = _PICTURES[task]

    def outputs(params: Mapping[str, np.ndarray], dtype: str) -> list[np.ndarray]:
        split = SplitModel(
            lambda rngs: family.build(
                weights.model, num_classes=weights.num_classes, dtype=dtype, rngs=rngs,
                **weights.overrides,
            )
        )  # fmt: skip

        def forward(params: Mapping[str, jax.Array], images: jax.Array) -> list[jax.Array]:
            model: Any = split.merge(
                {name: value.astype(jnp.float32) for name, value in params.items()}, training=False
            )
            if features:
                found = getattr(model, "backbone", model).feature_maps(images)
            else:
                found = [model(images)[0] if task == "segmentation" else model(images)]
            return [x.astype(jnp.float32) for x in found]

        run = jax.jit(forward)
        params = jax.device_put(dict(params))
        size = min(count, 8)
        batches = [
            jax.device_get(run(params, _random_pictures(size, seed=first)))
            for first in range(0, count, size)
        ]
        return [np.concatenate(parts) for parts in zip(*batches, strict=True)]

    expected, got = outputs(weights.params, "float32"), outputs(narrowed, activations)
    differences = [np.abs(b - a) for a, b in zip(expected, got, strict=True)]
    absolute = max(float(x.max()) for x in differences)
    norms = [np.sqrt(sum(float(np.square(x).sum()) for x in xs)) for xs in (differences, expected)]
    what = "feature maps" if features else "logits"
    line = (
        f"on {count} random pictures of 224x224, the {what} differ by {absolute:.2e} at most, by "
        f"{norms[0] / max(norms[1], 1e-30):.2e} relative to their norm"
    )
    if not features:
        (before,), (after,) = expected, got
        same = before.argmax(-1) == after.argmax(-1)
        of = "pictures" if task == "classification" else "cells"
        line += f"; the same class is first for {same.sum():,} of {same.size:,} {of}"
    return line


def _random_pictures(count: int, seed: int) -> np.ndarray:
    """(count, 224, 224, 3) float32, normalised: patches of 2 to 32 pixels, one size a picture."""
    rng = np.random.default_rng(seed)
    pictures = []
    for i in range(count):
        patch = 2 ** (1 + i % 5)
        cells = rng.normal(size=(-(-224 // patch),) * 2 + (3,))
        pictures.append(np.kron(cells, np.ones((patch, patch, 1)))[:224, :224])
    return np.stack(pictures).astype(np.float32)
