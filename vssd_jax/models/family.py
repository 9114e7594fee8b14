"""Models by name."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.models.mask_rcnn import MaskRCNN, MaskRCNNConfig
from vssd_jax.models.upernet import UperNet, UperNetConfig
from vssd_jax.models.vssd import VSSD, VSSDConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that differ in their config alone.

    Attributes:
      module: called with (config, num_classes=, dtype=, remat=, implementation=, rngs=).
      config: a dataclass with a classmethod for each variant.
      variants: what stands behind the prefix in the models' names.
      num_classes: the default; None leaves it to the config.
      classifier: how the names of the parameters start whose shapes follow num_classes.
    """

    module: Callable[..., nnx.Module]
    config: type
    variants: tuple[str, ...]
    num_classes: int | None
    classifier: tuple[str, ...]


FAMILIES = {
    "vssd_": Family(VSSD, VSSDConfig, ("nano", "micro", "tiny", "small", "base"), 1000, ("head.",)),
    "mask_rcnn_vssd_": Family(
        MaskRCNN,
        MaskRCNNConfig,
        ("nano", "micro", "tiny", "small"),
        None,
        ("box_head.cls.", "box_head.reg.", "mask_head.logits."),
    ),
    "upernet_vssd_": Family(
        UperNet,
        UperNetConfig,
        ("nano", "micro", "tiny", "small"),
        None,
        ("decode_head.classifier.", "auxiliary_head.classifier."),
    ),
}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return [prefix + name for prefix, family in FAMILIES.items() for name in family.variants]


def find(name: str) -> tuple[Family, str]:
    """The family and variant of a model's name; a UserError if there is none."""
    if name not in list_models():
        raise UserError(f"unknown model {name!r}{did_you_mean(name, list_models())}")
    prefix, _, variant = name.rpartition("_")
    return FAMILIES[prefix + "_"], variant


def make_config(name: str, **overrides: Any):
    """The config of a model by name, with some fields of it or of its backbone replaced.

    Raises:
      UserError: unknown models and fields, and values that the config refuses.
    """
    family, variant = find(name)
    config = getattr(family.config, variant)()

    def fields(config) -> set[str]:
        return {field.name for field in dataclasses.fields(config)}

    own = fields(config) - {"backbone", "num_classes"}
    inner = fields(config.backbone) if hasattr(config, "backbone") else set()
    for option in overrides:
        if option not in own | inner:
            near = did_you_mean(option, sorted(own | inner))
            raise UserError(f"{name} has no option {option!r}{near}")
    default = architecture(config)
    for option, value in overrides.items():
        if not _alike(value, default[option]):
            raise UserError(f"{name}: {option}={value!r} must be like {default[option]!r}")
    try:
        if inner:
            backbone = {key: value for key, value in overrides.items() if key in inner}
            config = dataclasses.replace(
                config, backbone=dataclasses.replace(config.backbone, **backbone)
            )
        own = {key: value for key, value in overrides.items() if key in own}
        return dataclasses.replace(config, **own)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{name}: {error}") from error


def _alike(value, default) -> bool:
    """Whether the types agree; tuples may be lists, and floats whole numbers."""
    if isinstance(default, tuple):
        return isinstance(value, tuple | list) and all(_alike(v, default[0]) for v in value)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def architecture(config) -> dict[str, Any]:
    """The fields of a config, those of its backbone among them."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    backbone = values.pop("backbone", None)
    return values if backbone is None else values | architecture(backbone)


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
    """A freshly initialised model in training mode; arguments as for `create_model`.

    Args:
      remat: recompute the blocks in the backward pass instead of keeping their activations.
      rngs: with a `params` stream. Outside of `jax.jit` the largest model takes seconds.
    """
    family, _ = find(name)
    config = make_config(name, **overrides)
    return family.module(
        config,
        num_classes=family.num_classes if num_classes is None else num_classes,
        dtype=dtype,
        remat=remat,
        implementation=implementation,
        rngs=rngs,
    )


def abstract(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """The module that `make` builds, with shapes in place of arrays; nothing is computed."""

    # In place of nnx.Rngs, which while tracing takes time quadratic in the number of keys.
    def traced(key):
        return make(types.SimpleNamespace(params=lambda: key))

    return nnx.eval_shape(traced, jax.random.key(0))
