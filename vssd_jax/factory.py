"""Models by name: fresh, or with weights."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vssd_jax.models import family
from vssd_jax.models.family import list_models
from vssd_jax.weights.state import set_state

__all__ = ["create_model", "list_models"]


def create_model(
    name: str,
    *,
    weights: str | os.PathLike | None = None,
    num_classes: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> nnx.Module:
    """A model in evaluation mode.

    Args:
      name: one of `list_models()`.
      weights: a weights folder, a PyTorch `.pth` file, a `.safetensors` file or
        `hf://owner/repo/file`; None leaves the initialisation of `seed`.
      num_classes: size of the classifier; the default is that of the weights, else the
        dataset's of the paper (1000). If it differs from the weights', the classifier stays fresh.
      dtype: of the activations, float32 or bfloat16; parameters are float32.
      implementation: of the kernels: None (the best for the device), "xla", "pallas", "triton".
      seed: of the initialisation.
      **overrides: fields of the model's config, see `VSSDConfig`.

    Raises:
      UserError: unknown names and options, and weights that do not fit.
    """
    if weights is not None:
        from vssd_jax.weights.load import load

        loaded = load(weights, model=name, overrides=overrides)
        overrides = loaded.overrides | overrides
        given, num_classes = num_classes, num_classes or loaded.num_classes

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return family.build(
            name,
            num_classes=num_classes,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
            **overrides,
        )

    if weights is None:
        model = make(nnx.Rngs(seed))
    elif given in (None, loaded.num_classes):
        model = family.abstract(make)
        set_state(model, loaded.params)
    else:
        model = make(nnx.Rngs(seed))
        classifier = family.find(name)[0].classifier
        set_state(
            model, loaded.params, fresh=[n for n in loaded.params if n.startswith(classifier)]
        )
    model.eval()
    return model
