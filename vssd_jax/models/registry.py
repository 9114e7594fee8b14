"""Models by name."""

import dataclasses
import difflib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vssd_jax.errors import UserError
from vssd_jax.models.vssd import VSSD, VSSDConfig

VARIANTS = ("nano", "micro", "tiny", "small", "base")


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return [f"vssd_{variant}" for variant in VARIANTS]


def create_model(
    name: str,
    *,
    weights: str | None = None,
    num_classes: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> nnx.Module:
    """A model in evaluation mode.

    Args:
      name: one of `list_models()`.
      weights: a weights folder, a PyTorch `.pth` file or `hf://owner/repo/file`; None leaves the
        initialisation of `seed`.
      num_classes: size of the classifier; the default is that of the weights, else the
        dataset's of the paper (1000). If it differs from the weights', the classifier stays fresh.
      dtype: of the activations, float32 or bfloat16; parameters are float32.
      implementation: of the kernels: None (the best for the device), "xla", "pallas", "triton".
      seed: of the initialisation.
      **overrides: fields of the model's config, see `VSSDConfig`.

    Raises:
      UserError: unknown names and options, and weights that do not fit.
    """
    model = build(
        name,
        num_classes=num_classes,
        dtype=dtype,
        implementation=implementation,
        rngs=nnx.Rngs(seed),
        **overrides,
    )
    model.eval()
    return model


def build(
    name: str,
    *,
    num_classes: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
    remat: bool = False,
    rngs: nnx.Rngs,
    **overrides: Any,
) -> nnx.Module:
    """A fresh model in training mode; see `create_model`."""
    if name not in list_models():
        raise UserError(f"unknown model {name!r}{did_you_mean(name, list_models())}")
    config = getattr(VSSDConfig, name.removeprefix("vssd_"))()
    fields = [field.name for field in dataclasses.fields(config)]
    for option in overrides:
        if option not in fields:
            raise UserError(f"{name} has no option {option!r}{did_you_mean(option, fields)}")
    try:
        config = dataclasses.replace(config, **overrides)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return VSSD(
        config,
        num_classes=1000 if num_classes is None else num_classes,
        dtype=dtype,
        remat=remat,
        rngs=rngs,
    )


def did_you_mean(word: str, choices) -> str:
    """A hint for an error message: the nearest of `choices`, or all of them."""
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(choices)}"
