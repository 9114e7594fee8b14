"""Models by name: protocols, families of models, configs and building.

A family is a kind of model in several sizes: `vssd_nano`, `vssd_tiny`, ... Each model file
registers its own; files outside of this package may register more.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.models.layers import shapes_alone
from vssd_jax.models.torch_names import Table, TensorShapes, under
from vssd_jax.types import Array, Float, Int

# Users may call models with NumPy arrays.
Images = Float[Array | np.ndarray, "B H W C"]
ImageShapes = Int[Array | np.ndarray, "B 2"]


# --- What a model must have ---------------------------------------------------------------------


@runtime_checkable
class Model(Protocol):
    """What every model has besides being an `nnx.Module`.

    Attributes:
      config: its architecture, a frozen dataclass.
      num_classes: size of the classifier; None for a backbone.
    """

    config: Any
    num_classes: int | None


@runtime_checkable
class Classifier(Model, Protocol):
    """What the classification task calls."""

    def __call__(self, images: Images, rngs: nnx.Rngs | None = None) -> Float[Array, "B K"]:
        """(B, H, W, 3) normalised images -> (B, num_classes) float32 logits.

        `rngs` has the `dropout` stream if the model needs one in training.
        """
        ...


class Detections(NamedTuple):
    """The objects that a detector found, best first; D is the most it returns for an image.

    Attributes:
      boxes: (B, D, 4) x1 y1 x2 y2 in pixels of the padded image.
      scores: (B, D), 0 to 1; not-a-number for an image whose outputs are not finite.
      labels: (B, D) int32 class indices.
      valid: (B, D) bool, False for padding at the end.
      masks: (B, D, 28, 28) logits of each box's class; see `detection.masks.paste_masks`.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array
    valid: jax.Array
    masks: jax.Array


@runtime_checkable
class Detector(Model, Protocol):
    """What the detection task calls."""

    def losses(self, batch: dict[str, jax.Array], rngs: nnx.Rngs) -> dict[str, jax.Array]:
        """The terms of the training loss by name, scalars to be summed.

        Args:
          batch: M is the most objects that an image can have.
            image: (B, H, W, 3), normalised, then padded with zeros at the bottom and the right.
            image_shape: (B, 2) int32 height and width without the padding.
            boxes: (B, M, 4) x1 y1 x2 y2 in pixels.
            labels: (B, M) int32 class indices.
            valid: (B, M) bool, False for padding.
            masks, mask_starts, mask_boxes: (B, S) uint8, (B, M) and (B, M, 4) int32, the fields of
              `detection.masks.PackedMasks`.
            has_mask: (B, M) bool, False for objects that train the boxes alone; may be absent.
            class_weights: (num_classes,) of the regions' classification; may be absent.
          rngs: with the streams `sampling` and `dropout`.
        """
        ...

    def predict(self, images: Images, image_shapes: ImageShapes) -> Detections:
        """Detects objects.

        Args:
          images: (B, H, W, 3), normalised, then padded with zeros at the bottom and the right.
          image_shapes: (B, 2) int32 height and width without the padding.
        """
        ...


@runtime_checkable
class Segmentor(Model, Protocol):
    """What the segmentation task calls.

    Attributes:
      aux_weight: weight of the auxiliary head's loss; without effect if there is no such head.
    """

    aux_weight: float

    def __call__(self, images: Images, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, ...]:
        """Logits of the decoder and, if there is one, of the auxiliary head, for the loss.

        Args:
          images: (B, H, W, 3), normalised.
          rngs: with the `dropout` stream if the model needs one in training.

        Returns:
          One or two arrays (B, H', W', num_classes), float32, of any height and width.
        """
        ...


@runtime_checkable
class Backbone(Protocol):
    """What a detector or segmentor calls of its backbone.

    Attributes:
      widths: channels of each feature map, from fine to coarse.
      strides: pixels of the image per cell of each map.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]

    def feature_maps(self, images: Images, rngs: nnx.Rngs | None = None) -> list[jax.Array]:
        """(B, H, W, 3) normalised images -> maps (B, ceil(H/s), ceil(W/s), width), any H and W.

        `rngs` has the `dropout` stream, which a backbone with drop path needs in training.
        """
        ...


@runtime_checkable
class BackboneConfig(Protocol):
    """The config of a backbone, a frozen dataclass."""

    def make_backbone(
        self,
        *,
        dtype: jax.typing.DTypeLike,
        remat: bool,
        implementation: str | None,
        rngs: nnx.Rngs,
    ) -> Backbone:
        """The backbone; the arguments are those of `build`."""
        ...


# --- Families -----------------------------------------------------------------------------------


class Recognised(NamedTuple):
    """What the shapes in a PyTorch state dict show of its model.

    Attributes:
      num_classes: the size of the classifier.
      fields: the config's fields that the shapes show.
    """

    num_classes: int
    fields: dict[str, Any]


# `recognise_backbone(shapes, known, given)` returns the fields of the config that the shapes in a
# PyTorch state dict show. It is called twice. First with `known` None, when only the fields that
# distinguish the variants are needed. Then `known` has all fields of the config, those of the
# variant found and those that the user gave, whose names are in `given`. They decide where shapes
# alone do not: of two fields the shapes may show only the product. It raises a UserError for
# damaged tensors.
BackboneRecogniser = Callable[
    [TensorShapes, Mapping[str, Any] | None, Collection[str]], dict[str, Any]
]
# The same for a whole model; None if the state dict is not of this family.
Recogniser = Callable[
    [TensorShapes, Mapping[str, Any] | None, Collection[str]], Recognised | None
]


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that differ in their config alone.

    Attributes:
      prefix: the models' names are this and the variant's name.
      variants: the variant's name -> a function that makes its config, a frozen dataclass. The
        config of a model with a backbone has a field `backbone`, a `BackboneConfig`.
      module: called with (config, num_classes=, dtype=, remat=, implementation=, rngs=).
      num_classes: the default; None leaves it to the config.
      classifier: how the names of the parameters start whose shapes follow num_classes.
      torch_table: PyTorch's names of the parameters.
      recognise: finds out whether a PyTorch state dict is one of these models, and its config.
      variant_fields: the fields whose values distinguish the variants.
      recognise_backbone: the same for the model as a part of another, if it can be a backbone.
      training_fields: the config's fields that affect training alone.
      backbone: the family of classifiers whose weights may start the backbone, if there is one.
      stages: how the names of the parameters start of the stem and of each stage of the backbone,
        from the input on; empty if it has none.
      layers: config to layers of the backbone, from the input on, each as the starts of the names
        of its parameters. All other parameters are the head's.
    """

    prefix: str
    variants: Mapping[str, Callable[[], Any]]
    module: Callable[..., nnx.Module]
    num_classes: int | None
    classifier: tuple[str, ...]
    torch_table: Table
    recognise: Recogniser
    variant_fields: tuple[str, ...]
    recognise_backbone: BackboneRecogniser | None = None
    training_fields: tuple[str, ...] = ()
    backbone: "Family | None" = None
    stages: tuple[str, ...] = ()
    layers: Callable[[Any], list[tuple[str, ...]]] | None = None


@dataclasses.dataclass(frozen=True)
class Head:
    """A kind of detector or segmentor, apart from its backbone.

    Its module has the backbone as the attribute `backbone`, its config as the field of that name.

    Attributes:
      prefix: stands before the prefix of the backbone's family.
      module, classifier, training_fields: see `Family`.
      torch_table: PyTorch's names of the parameters, without the backbone's.
      recognise: whether a PyTorch state dict has this head, and the fields that it shows.
    """

    prefix: str
    module: Callable[..., nnx.Module]
    classifier: tuple[str, ...]
    torch_table: Table
    recognise: Callable[[TensorShapes], Recognised | None]
    training_fields: tuple[str, ...] = ()

    def on(self, backbone: Family, variants: Mapping[str, Callable[[], Any]]) -> Family:
        """The family of this head's models on a family of backbones.

        Args:
          backbone: its classifiers' weights may start the models' backbones.
          variants: the name of a variant of `backbone` -> a function that makes the config.

        Raises:
          ValueError: the family cannot be a backbone.
        """
        recognise_backbone = backbone.recognise_backbone
        if recognise_backbone is None:
            raise ValueError(f"the family {backbone.prefix} does not recognise its backbones")

        def recognise(
            shapes: TensorShapes, known: Mapping[str, Any] | None, given: Collection[str]
        ) -> Recognised | None:
            if (found := self.recognise(shapes)) is None:
                return None
            inner = recognise_backbone(shapes.under("backbone."), known, given)
            return Recognised(found.num_classes, found.fields | inner)

        def layers(config: Any) -> list[tuple[str, ...]]:
            assert backbone.layers is not None
            return [
                tuple(f"backbone.{start}" for start in layer)
                for layer in backbone.layers(config.backbone)
            ]

        return Family(
            prefix=self.prefix + backbone.prefix,
            variants=variants,
            module=self.module,
            num_classes=None,
            classifier=self.classifier,
            torch_table=(
                *under("backbone.", "backbone.", backbone.torch_table),
                *self.torch_table,
            ),
            recognise=recognise,
            variant_fields=backbone.variant_fields,
            training_fields=(*backbone.training_fields, *self.training_fields),
            backbone=backbone,
            stages=tuple(f"backbone.{start}" for start in backbone.stages),
            layers=None if backbone.layers is None else layers,
        )


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Makes the models of a family known by name; returns the family."""
    _FAMILIES[family.prefix] = family
    return family


def families() -> list[Family]:
    return list(_FAMILIES.values())


def list_models() -> list[str]:
    """The names of all registered models."""
    return [family.prefix + name for family in families() for name in family.variants]


def find(name: str) -> tuple[Family, str]:
    """The family and variant of a model's name; raises a UserError for unknown names."""
    for family in families():
        variant = name.removeprefix(family.prefix)
        if name.startswith(family.prefix) and variant in family.variants:
            return family, variant
    raise UserError(f"unknown model {name!r}{did_you_mean(name, list_models())}")


def task_of(name: str) -> str:
    """What a model is for: "classification", "detection" or "segmentation"."""
    of_family, _ = find(name)
    if of_family.backbone is None:
        return "classification"
    return "detection" if hasattr(of_family.module, "losses") else "segmentation"


# --- Configs ------------------------------------------------------------------------------------


def make_config(name: str, **overrides: Any) -> Any:
    """The config of a model by name, with some fields of it or of its backbone replaced.

    Raises:
      UserError: unknown models and fields, and values that the config refuses.
    """
    family, variant = find(name)
    config = family.variants[variant]()

    def fields(config: Any) -> set[str]:
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
    # A list where it comes from JSON.
    overrides = {
        key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()
    }
    try:
        if inner:
            backbone = {key: value for key, value in overrides.items() if key in inner}
            config = dataclasses.replace(
                config, backbone=dataclasses.replace(config.backbone, **backbone)
            )
        changes = {key: value for key, value in overrides.items() if key in own}
        return dataclasses.replace(config, **changes)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{name}: {error}") from error


def _alike(value: Any, default: Any) -> bool:
    """Whether the types agree; tuples may be lists, and floats whole numbers."""
    if isinstance(default, tuple):
        return isinstance(value, tuple | list) and all(_alike(v, default[0]) for v in value)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def architecture(config: Any) -> dict[str, Any]:
    """All fields of a config, with those of its backbone beside them."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    backbone = values.pop("backbone", None)
    return values if backbone is None else values | architecture(backbone)


# --- Modules ------------------------------------------------------------------------------------


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
    """A freshly initialised model in training mode.

    Args:
      name: one of `list_models()`.
      num_classes: size of the classifier; None is the family's default, 0 (of classifiers) leaves
        it out: the model gives the pooled features.
      dtype: of the activations; parameters are float32 at least.
      implementation: of the operations, see `vssd_jax.kernels.dispatch`.
      remat: recompute the blocks in the backward pass instead of keeping their activations.
      rngs: with a `params` stream. Outside of `jax.jit` the largest model takes seconds.
      **overrides: fields of the model's config.

    Raises:
      UserError: unknown names and fields, and values that the config refuses.
    """
    family, _ = find(name)
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise UserError(f"{name}: dtype={dtype!r} must be float32 or bfloat16")
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

    with shapes_alone():
        return nnx.eval_shape(lambda key: make(_SameKey(key)), jax.random.key(0))


class _SameKey(nnx.Rngs):
    """Returns one key every time, for tracing: there `nnx.Rngs` takes quadratic time for n keys."""

    def __init__(self, key: jax.Array) -> None:
        self._key = key

    def params(self) -> jax.Array:
        return self._key
