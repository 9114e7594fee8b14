"""Models by name: fresh, or with weights."""

import numbers
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vssd_jax.distributed import say
from vssd_jax.errors import UserError
from vssd_jax.models import family
from vssd_jax.models.family import list_models
from vssd_jax.weights.state import set_state, shapes

__all__ = ["create_model", "list_models"]


def create_model(
    name: str,
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool | str = False,
    num_classes: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
    seed: int = 0,
    allow_nonfinite: bool = False,
    **overrides: Any,
) -> nnx.Module:
    """A model in evaluation mode.

    Args:
      name: one of `list_models()`.
      weights: a weights folder, a PyTorch `.pth` file, a `.safetensors` file, or one of these on
        the Hugging Face hub: `hf://owner/repo[@revision]/file`, `hf://owner/repo[@revision]` for a
        weights folder; None leaves the initialisation of `seed`.
      pretrained: take the weights that the authors released: True, or a name where a model has
        several: "imagenet" or "mesa", "1x" or "3x"; see `vssd_jax.weights.released`.
      num_classes: size of the classifier; the default is that of the weights, else the
        dataset's of the paper (1000). If it differs from the weights', the classifier stays fresh.
        0 leaves the classifier out: the model gives the pooled features (B, C).
      dtype: of the activations, float32 or bfloat16; parameters are float32.
      implementation: of the kernels: None (the best for the device), "xla", "pallas", "triton".
      seed: of the initialisation.
      allow_nonfinite: let NaN and infinity in the weights pass.
      **overrides: fields of the model's config, see `VSSDConfig`.

    Raises:
      UserError: unknown names and options, and weights that do not fit.
    """
    _check_num_classes(name, num_classes)
    if pretrained is not False:
        if weights is not None:
            raise UserError(f"{name}: give either weights or pretrained, not both")
        from vssd_jax.weights import released

        weights = released.address(name, pretrained)
    if weights is not None:
        from vssd_jax.weights.load import load

        loaded = load(
            weights, model=name, overrides=overrides, allow_nonfinite=allow_nonfinite
        )
        overrides = loaded.overrides | overrides
        given = num_classes
        num_classes = loaded.num_classes if num_classes is None else num_classes
        if loaded.num_classes == 0 and given != 0:
            what = "the classifier stays fresh" if given else "the model gives the pooled features"
            say(f"{weights} has no head: {what}")

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
    elif given == 0:
        model = family.abstract(make)
        classifier = family.find(name)[0].classifier
        kept = {n: v for n, v in loaded.params.items() if not n.startswith(classifier)}
        set_state(model, kept)
    elif given in (None, loaded.num_classes):
        model = family.abstract(make)
        set_state(model, loaded.params)
    else:
        model = make(nnx.Rngs(seed))
        classifier = family.find(name)[0].classifier
        fresh = [n for n in {**shapes(model), **loaded.params} if n.startswith(classifier)]
        set_state(model, loaded.params, fresh=fresh)
    model.eval()
    return model


def _check_num_classes(name: str, num_classes: Any) -> None:
    least = 0 if family.find(name)[0].backbone is None else 1
    whole = isinstance(num_classes, numbers.Integral) and not isinstance(num_classes, bool)
    if num_classes is not None and (not whole or num_classes < least):
        raise UserError(
            f"{name}: num_classes={num_classes!r} must be a whole number of at least {least}"
        )
