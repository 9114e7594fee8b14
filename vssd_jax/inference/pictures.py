"""What a model sees, as arrays: token weights, attention, receptive fields, Grad-CAM, features.

Every function takes a model (classifier, detector or segmentor; it is left as it is, and run in
evaluation mode) and images (B, H, W, 3) as the model gets them: normalised, of any size. The values
are those that the model computes with, see `vssd_jax.models.taps`; what is returned is NumPy.

`stage` counts the stages of the backbone from 0; negative numbers count from the last.
Shape letters: h and w are height and width of a stage's map, ceil(H / stride) and ceil(W / stride).
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import nnx

from vssd_jax.errors import UserError
from vssd_jax.host import compiler_options
from vssd_jax.kernels.attention.xla import split
from vssd_jax.models.family import Backbone, Detector, Images, ImageShapes, Segmentor
from vssd_jax.models.taps import watching
from vssd_jax.types import Float

# --- Token weights, attention, feature maps -----------------------------------------------------


def token_weights(
    model: nnx.Module, images: Images
) -> list[Float[np.ndarray, "B blocks h w heads"] | None]:
    """What each token weighs on its way into the state, for each head.

    NC-SSD has one state for all tokens, the sum over j of m_j B_j x_j^T, and this is m. Of a causal
    or bidirectional scan it is the step size dt_j in h_j = exp(dt_j a) h_(j-1) + dt_j B_j x_j^T.

    Returns:
      For each stage (B, blocks, h, w, heads) float32; None where it has no such mixer.
    """
    stages = _shown(model, images)
    return [_blocks(stage["token_weights"]) if "token_weights" in stage else None
            for stage in stages]  # fmt: skip


def attention(
    model: nnx.Module, images: Images, token: tuple[int, int], *, stage: int = -1
) -> Float[np.ndarray, "B blocks h w heads"]:
    """How much a token attends to each other: softmax(q_token k^T / sqrt(P)), for each head.

    Args:
      model, images: see above.
      token: row and column in the stage's map, from 0.
      stage: one whose mixers are attention.

    Returns:
      (B, blocks, h, w, heads) float32, which sums to 1 over h and w.

    Raises:
      UserError: the stage has no attention, or its map no such token.
    """
    index = stage_index(model, stage)
    shown = _shown(model, images)[index]
    if "qkv" not in shown:
        raise UserError(f"stage {index} has no attention: its mixers are of another kind")
    height, width = shown["map"][0].shape[1:3]
    if not (0 <= token[0] < height and 0 <= token[1] < width):
        raise UserError(f"there is no token {token}: the map has {height}x{width}")
    rows = []
    for qkv, heads in shown["qkv"]:
        wide = jnp.promote_types(qkv.dtype, jnp.float32)
        q, k, _ = (np.asarray(part, wide) for part in split(jnp.asarray(qkv), int(heads)))
        query = q[:, token[0] * width + token[1]] * q.shape[-1] ** -0.5
        row = scipy.special.softmax(np.einsum("bhp,blhp->blh", query, k), axis=1)
        rows.append(row.reshape(len(qkv), height, width, -1))
    return _blocks(rows)


def feature_maps(model: nnx.Module, images: Images) -> list[Float[np.ndarray, "B h w C"]]:
    """The output of each stage, before the norm that a detector's or segmentor's backbone adds.

    Returns:
      For each stage (B, h, w, C) in the model's dtype.
    """
    return [stage["map"][0] for stage in _shown(model, images)]


class Components(NamedTuple):
    """Feature maps by their first principal components.

    Attributes:
      maps: (B, h, w, components) float64, the projections of the centred features.
      shares: (components,) of the variance, in falling order.
    """

    maps: np.ndarray
    shares: np.ndarray


def principal_components(features: Float[np.ndarray, "B h w C"], components: int = 3) -> Components:
    """The first principal components of all tokens' features, those of the whole batch together.

    The sign of a component is that in which its greatest loading is positive. Where the map has
    fewer channels than `components`, what is missing is 0.

    Raises:
      ValueError: features that are not finite.
    """
    tokens = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
    if not np.isfinite(tokens).all():
        raise ValueError("the features are not finite, and have no principal components")
    tokens = tokens - tokens.mean(0)
    variances, loadings = np.linalg.eigh(tokens.T @ tokens)
    variances, loadings = variances[::-1], loadings[:, ::-1]
    largest = np.take_along_axis(loadings, abs(loadings).argmax(0)[None], 0)
    loadings = (loadings * np.sign(largest))[:, :components]
    total = variances.sum()
    shares = np.maximum(variances[:components], 0) / (total if total > 0 else 1)
    missing = components - len(shares)
    maps = np.pad(tokens @ loadings, ((0, 0), (0, missing)))
    return Components(maps.reshape(*features.shape[:-1], components), np.pad(shares, (0, missing)))


# --- The effective receptive field --------------------------------------------------------------


def receptive_field(
    model: nnx.Module, images: Images, *, stage: int = -1
) -> Float[np.ndarray, "H W"]:
    """The effective receptive field of the centre of a stage's map (Luo et al., arXiv 1701.04128).

    With s = sum over the channels of the map at (h // 2, w // 2), the mean over the images and
    their channels of |ds / dpixel|. The map is the stage's output before a norm for a head: the sum
    over the channels of what a LayerNorm gives would be constant.

    Returns:
      (H, W) float32.
    """
    images = _array(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images must be floating point and normalised, not {images.dtype}")
    return _run(_receptive_field, model, images, stage=stage)


def _receptive_field(model: nnx.Module, images: jax.Array, *, stage: int) -> jax.Array:
    index = stage_index(model, stage)

    def centre(images: jax.Array) -> jax.Array:
        features = _watched(model, images)[index]["map"][0]
        height, width = features.shape[1:3]
        value = features[:, height // 2, width // 2]
        return value.sum(dtype=jnp.promote_types(value.dtype, jnp.float32))

    return jnp.abs(jax.grad(centre)(images)).mean((0, 3))


def share_of_pixels(field: np.ndarray, fraction: float) -> float:
    """The smallest share of a map's pixels that holds `fraction` of its sum of magnitudes.

    Raises:
      ValueError: the map is 0 or not finite, or the fraction not from 0 to 1.
    """
    values = np.sort(abs(np.asarray(field, np.float64)), axis=None)[::-1]
    held = values.cumsum()
    if not 0 <= fraction <= 1 or not np.isfinite(held[-1]) or held[-1] == 0:
        raise ValueError(f"no share of the pixels holds {fraction} of {held[-1]}")
    if fraction == 0:
        return 0.0
    return float((np.searchsorted(held, fraction * held[-1]) + 1) / len(held))


# --- Grad-CAM ------------------------------------------------------------------------------------


class GradCAM(NamedTuple):
    """Where a score comes from.

    Attributes:
      maps: (B, h, w) float32, at least 0, in units of the score: the sum over the channels of the
        map times the mean over the positions of the score's gradient with respect to it.
      scores: (B,) float32.
      labels: (B,) int32, the classes that the scores are of.
      boxes: (B, 4) x1 y1 x2 y2 of a detector's objects, in pixels; None of other models.
    """

    maps: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray | None


class NothingFound(UserError):
    """An image has no such object, or no pixel of the class."""


def grad_cam(
    model: nnx.Module,
    images: Images,
    target: int | None = None,
    *,
    stage: int = -1,
    image_shapes: ImageShapes | None = None,
) -> GradCAM:
    """Grad-CAM (Selvaraju et al., arXiv 1610.02391) at the output of a stage.

    The score is a classifier's logit of a class; of a detector the score of an object, with the
    regions that it was found from held fixed; of a segmentor the mean logit of a class over the
    positions of the logits where it is the greatest.

    Args:
      model, images: see above.
      target: the class, or the number of the object, 0 is the best; the same in all images. None
        takes the best class of each image, the best object, or the most frequent class.
      stage: whose map is weighted.
      image_shapes: (B, 2) int32, a detector's images without padding; None if they have none.

    Raises:
      NothingFound: an image has no such object, or no pixel of the class.
      UserError: there is no such class.
    """
    images = _array(images)
    if image_shapes is None:
        image_shapes = np.array([images.shape[1:3]] * len(images), np.int32)
    target = None if target is None else operator.index(target)
    if not isinstance(model, Detector):
        classes: int = getattr(model, "num_classes", 0) or 0
        if not classes:
            raise UserError("the model has no classifier, whose scores Grad-CAM explains")
        if target is not None and not 0 <= target < classes:
            raise UserError(f"there is no class {target}: the model has {classes}")
    elif target is not None and target < 0:
        raise UserError(f"there is no object {target}: the best is 0")
    number = jnp.asarray(-1 if target is None else target, jnp.int32)
    maps, scores, labels, boxes, found = _run(
        _grad_cam, model, images, jnp.asarray(image_shapes), number, stage=stage
    )
    if not found.all():
        where = f" in image {np.argmin(found)}" if len(found) > 1 else ""
        what = "no such object is found" if boxes is not None else "no pixel is of the class"
        raise NothingFound(what + where)
    return GradCAM(maps, scores, labels, boxes)


def _grad_cam(
    model: nnx.Module, images: jax.Array, shapes: jax.Array, target: jax.Array, *, stage: int
) -> tuple[Any, ...]:
    index = stage_index(model, stage)
    shape = jax.eval_shape(lambda images: _watched(model, images)[index]["map"][0], images)

    def score(change: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
        maps: list[jax.Array] = []

        def watcher(name: str, value: Any, **about: Any) -> Any:
            if name == "proposals":
                return jax.lax.stop_gradient(value)
            if name == "map":
                maps.append(value)
                return value + change if len(maps) - 1 == index else value
            return value

        with watching(watcher):
            scores, *about = _scores(model, images, shapes, target)
        return scores.sum(), (maps[index], scores, *about)

    none = jnp.zeros(shape.shape, shape.dtype)
    gradient, (features, *about) = jax.grad(score, has_aux=True)(none)
    wide = jnp.promote_types(features.dtype, jnp.float32)
    weights = gradient.astype(wide).mean((1, 2), keepdims=True)
    return jax.nn.relu((weights * features).sum(-1)), *about


def _scores(
    model: Any, images: jax.Array, shapes: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """(B,) scores, labels, boxes, and whether there is such an object or a pixel of the class.

    Target -1 is the best.
    """
    if isinstance(model, Detector):
        objects = model.predict(images, shapes)
        most = objects.scores.shape[1]
        place = jnp.clip(target, 0, most - 1)
        found = objects.valid[:, place] & (target < most)
        return objects.scores[:, place], objects.labels[:, place], objects.boxes[:, place], found
    if isinstance(model, Segmentor):
        logits = model(images)[0]
        best = logits.argmax(-1)
        counts = jax.nn.one_hot(best, logits.shape[-1], dtype=jnp.int32).sum((1, 2))
        chosen = jnp.where(target < 0, counts.argmax(-1), target)
        inside = best == chosen[:, None, None]
        values = jnp.take_along_axis(logits, chosen[:, None, None, None], -1)[..., 0]
        count = inside.sum((1, 2))
        return (values * inside).sum((1, 2)) / jnp.maximum(count, 1), chosen, None, count > 0
    logits = model(images)
    chosen = jnp.where(target < 0, logits.argmax(-1), target)
    values = jnp.take_along_axis(logits, chosen[:, None], -1)[:, 0]
    return values, chosen, None, jnp.ones(len(images), bool)


# --- Running a model and watching it --------------------------------------------------------------


def backbone_of(model: nnx.Module) -> Backbone:
    """The backbone of a detector or segmentor; a classifier is its own.

    Raises:
      UserError: it gives no feature maps.
    """
    backbone = getattr(model, "backbone", model)
    if not isinstance(backbone, Backbone):
        raise UserError(f"{type(model).__name__} has no backbone that gives feature maps")
    return backbone


def stage_index(model: nnx.Module, stage: int) -> int:
    """The number of a stage from 0 on; raises a UserError if there is none of that number."""
    count = len(backbone_of(model).widths)
    if not -count <= operator.index(stage) < count:
        raise UserError(f"there is no stage {stage}: the model has {count}")
    return stage % count


def mixers(model: nnx.Module) -> list[str | None]:
    """What can be seen of the mixers of each stage: "token_weights", "attention" or None."""
    graph, state = nnx.split(model)
    found: list[str | None] = []

    def look(state: nnx.State, images: jax.Array) -> None:
        for stage in _watched(_evaluating(graph, state), images):
            seen = "token_weights" if "token_weights" in stage else None
            found.append("attention" if "qkv" in stage else seen)

    jax.eval_shape(look, state, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    return found


def _array(images: Images) -> jax.Array:
    return jnp.asarray(images)


def _watched(model: nnx.Module, images: jax.Array) -> list[dict[str, list[Any]]]:
    """For each stage what its taps showed by name, block by block; `map` is one array."""
    stages: list[dict[str, list[Any]]] = [{}]

    def watcher(name: str, value: Any, **about: Any) -> Any:
        shown = (value, about["heads"]) if name == "qkv" else value
        stages[-1].setdefault(name, []).append(shown)
        if name == "map":
            stages.append({})
        return value

    backbone = backbone_of(model)
    with watching(watcher):
        backbone.feature_maps(images)
    if len(stages) - 1 != len(backbone.widths):
        raise UserError(
            f"{type(backbone).__name__} shows {len(stages) - 1} maps of {len(backbone.widths)} "
            "stages: it has to call tap('map', ...) of vssd_jax.models.taps where they are made"
        )
    return stages[:-1]


def _shown(model: nnx.Module, images: Images) -> list[dict[str, list[Any]]]:
    """`_watched`, computed: one program for all that asks for it."""
    return _run(_watched, model, _array(images))


def _blocks(values: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays (B, ...) of each block -> (B, blocks, ...), in float32 at least."""
    stacked = np.stack(values, 1)
    return np.asarray(stacked, jnp.promote_types(stacked.dtype, jnp.float32))


def _run(
    function: Callable[..., Any], model: nnx.Module, *arrays: jax.Array, **options: Any
) -> Any:
    """`function(model, *arrays, **options)` as one program; its options are hashable."""
    graph, state = nnx.split(model)
    return jax.device_get(_program()(function, graph, tuple(options.items()), state, arrays))


def _evaluating(graph: nnx.GraphDef, state: nnx.State) -> nnx.Module:
    """A copy of a model in evaluation mode."""
    model = nnx.merge(graph, state, copy=True)
    model.eval()
    return model


@functools.cache
def _program() -> Callable[..., Any]:
    def look(
        function: Callable[..., Any],
        graph: nnx.GraphDef,
        options: tuple[tuple[str, Any], ...],
        state: nnx.State,
        arrays: tuple[jax.Array, ...],
    ) -> Any:
        return function(_evaluating(graph, state), *arrays, **dict(options))

    return jax.jit(look, static_argnums=(0, 1, 2), compiler_options=compiler_options())
