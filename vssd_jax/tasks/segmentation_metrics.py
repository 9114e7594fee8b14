"""Semantic segmentation: loss, predictions at the original size, and mIoU.

Shape letters: B batch, H and W height and width of the labels, h and w of the network's input,
K classes. Labels of 255 are ignored.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vssd_jax.data.segmentation_transforms import IGNORE
from vssd_jax.errors import UserError
from vssd_jax.models.family import Segmentor
from vssd_jax.models.upernet import bilinear_matrix, resize

# (B, h', w', K) logits, and the (h, w) of the images that they come from.
View = tuple[jax.Array, tuple[int, int]]

# Rows of a label map that are predicted at a time: K logits for every pixel of a large picture
# at once would take gigabytes.
_STRIP = 64


def pixel_cross_entropy(
    logits: jax.Array, labels: jax.Array, class_weights: np.ndarray | None = None
) -> jax.Array:
    """Cross-entropy of the upsampled logits, a scalar.

    The mean goes over all pixels, the ignored ones (whose loss is 0) included:
    mmsegmentation's default (`avg_non_ignore=False`), with which the recipe was tuned.

    Args:
      logits: (B, h, w, K) at any size.
      labels: (B, H, W) integers.
      class_weights: (K,) of the pixels by label; None: all are 1.
    """
    height, width = labels.shape[1:3]
    logits = resize(logits, (height, width))
    labels = labels.astype(jnp.int32)
    counted = labels != IGNORE
    targets = jnp.where(counted, labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if class_weights is not None:
        losses *= jnp.asarray(class_weights, losses.dtype)[targets]
    return jnp.where(counted, losses, 0).mean()


def segmentation_loss(
    outputs: tuple[jax.Array, ...],
    labels: jax.Array,
    *,
    aux_weight: float = 0.4,
    class_weights: np.ndarray | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a segmentor's heads and its parts.

    Args:
      outputs: logits of the decoder and, if there is one, of the auxiliary head, at any size.
      labels: (B, H, W) integers.
      aux_weight: of the auxiliary head.
      class_weights: (K,) of the pixels' losses by label; None: all are 1.
    """
    decode, *auxiliary = (pixel_cross_entropy(logits, labels, class_weights) for logits in outputs)
    if not auxiliary:
        return decode, {"decode": decode}
    return decode + aux_weight * auxiliary[0], {"decode": decode, "auxiliary": auxiliary[0]}


# --- Predictions ------------------------------------------------------------------------------


def _upsampling(length: int, inputs: int, outputs: jax.Array, rows: int) -> jax.Array:
    """(B, rows, length) matrices from logits to the labels of each picture, along one axis.

    In two steps, to the `inputs` pixels that the network saw and from there to the `outputs`
    (B,) pixels of the label map: what mmsegmentation does, so that the numbers are the same.
    """
    to_input = bilinear_matrix(length, inputs)
    to_output = jax.vmap(lambda size: bilinear_matrix(inputs, size, rows))(outputs)
    return jnp.einsum("boi,il->bol", to_output, to_input, precision=jax.lax.Precision.HIGHEST)


def _map_strips(
    function: Callable[[jax.Array], jax.Array],
    views: Sequence[View],
    sizes: jax.Array,
    shape: tuple[int, int],
) -> jax.Array:
    """Applies `function` to (B, rows, W, K) probabilities, strip by strip: -> (B, H, W, ...)."""
    height, width = shape
    matrices, wide = [], []
    for logits, (h, w) in views:
        columns = _upsampling(logits.shape[2], w, sizes[:, 1], width)
        highest = jax.lax.Precision.HIGHEST
        wide.append(jnp.einsum("bow,bhwk->bhok", columns, logits, precision=highest))
        rows = _upsampling(logits.shape[1], h, sizes[:, 0], -(-height // _STRIP) * _STRIP)
        # (strips, B, _STRIP, logits' height)
        matrices.append(rows.reshape(len(rows), -1, _STRIP, rows.shape[-1]).swapaxes(0, 1))

    def strip(rows: list[jax.Array]) -> jax.Array:
        total: Any = 0
        for row, x in zip(rows, wide, strict=True):
            logits = jnp.einsum("boh,bhwk->bowk", row, x, precision=jax.lax.Precision.HIGHEST)
            total += jax.nn.softmax(logits)
        return function(total / len(wide))

    strips = jax.lax.map(strip, matrices)  # (strips, B, _STRIP, W, ...)
    whole = jnp.moveaxis(strips, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :height]


def probabilities(views: Sequence[View], sizes: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Class probabilities at the pictures' original sizes, averaged over views.

    Args:
      views: what to average, see `View`.
      sizes: (B, 2) integers, the original heights and widths.
      shape: (H, W) of the result; what lies beyond a picture's size means nothing.

    Returns:
      (B, H, W, K): the mean over the views of the softmax of the upsampled logits.
    """
    return _map_strips(lambda x: x, views, sizes, shape)


def predict_labels(views: Sequence[View], sizes: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The most probable class of each pixel, (B, H, W) int32; arguments as `probabilities`.

    255 where no class is more probable than all others, or the probabilities are not finite.
    """

    def decide(probabilities: jax.Array) -> jax.Array:
        best = probabilities.max(-1, keepdims=True)
        alone = (probabilities == best).sum(-1) == 1
        return jnp.where(alone, jnp.argmax(probabilities, -1), IGNORE).astype(jnp.int32)

    return _map_strips(decide, views, sizes, shape)


def model_views(
    model: Segmentor, images: Mapping[str, jax.Array], *, flip: bool = False
) -> list[View]:
    """The decoder's logits for each scale of the images, and with `flip` for their mirrors too.

    Args:
      model: in evaluation mode.
      images: name -> (B, h, w, 3) normalised.
      flip: add the mirrored images; their logits are mirrored back.

    Returns:
      `views` for `probabilities` and `predict_labels`.
    """
    views = []
    for x in images.values():
        size = (x.shape[1], x.shape[2])
        if not flip:
            views.append((model(x)[0], size))
            continue
        # One batch of both; a picture's rows stay on its device.
        both = jnp.stack([x, x[:, :, ::-1]], 1)
        logits = model(both.reshape(-1, *x.shape[1:]))[0]
        logits = logits.reshape(*both.shape[:2], *logits.shape[1:])
        views += [(logits[:, 0], size), (logits[:, 1, :, ::-1], size)]
    return views


# --- Metrics ----------------------------------------------------------------------------------


def confusion_matrix(predictions: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """(K, K + 1) int32 pixel counts of a batch: row label, column prediction.

    Pixels whose label is 255 are left out; a prediction of 255, no class, counts in the last
    column.

    A batch may have up to 2**31 pixels. Sum the matrices of a dataset as 64-bit integers (NumPy):
    ADE20K's validation images come close to what 32 bits hold.
    """
    return picture_confusions(predictions, labels, num_classes).sum(0)


def picture_confusions(predictions: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """(B, K, K + 1) int32, the `confusion_matrix` of each picture."""
    labels, predictions = labels.astype(jnp.int32), predictions.astype(jnp.int32)
    predictions = jnp.where(predictions == IGNORE, num_classes, predictions)
    columns = num_classes + 1
    cells = num_classes * columns
    cell = jnp.where(labels == IGNORE, cells, labels * columns + predictions)
    # Per picture first, so that a batch that is split over devices stays where it is.
    count = jax.vmap(lambda x: jnp.zeros(cells, jnp.int32).at[x].add(1, mode="drop"))
    return count(cell.reshape(len(cell), -1)).reshape(-1, num_classes, columns)


def picture_iou(confusions: jax.Array) -> jax.Array:
    """(B, K, K + 1) -> (B,) float32, each picture's mean IoU over the classes that are in it.

    Those labelled or predicted there; not-a-number where nothing is labelled.
    """
    hits = jnp.diagonal(confusions, axis1=1, axis2=2)
    union = confusions.sum(2) + confusions.sum(1)[:, : hits.shape[1]] - hits
    there = union > 0
    return jnp.where(there, hits / jnp.maximum(union, 1), 0).sum(1) / there.sum(1)


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """`iou` and `accuracy` (recall) of each class in 0..1, and `pixels`, its share of the labels.

    Not-a-number where undefined: the IoU of a class that is neither labelled nor predicted, the
    accuracy of one that is not labelled.
    """
    confusion = np.asarray(confusion, np.float64)
    hits, labelled = np.diag(confusion), confusion.sum(1)
    predicted = confusion.sum(0)[: len(hits)]
    union = labelled + predicted - hits

    def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.divide(a, b, out=np.full(len(hits), np.nan), where=b > 0)

    return {
        "iou": ratio(hits, union),
        "accuracy": ratio(hits, labelled),
        "pixels": labelled / max(confusion.sum(), 1),
    }


def summarize_confusion(confusion: np.ndarray) -> dict[str, float]:
    """`miou`, `mean_accuracy` and `pixel_accuracy` in 0..1; undefined classes are left out.

    Raises:
      UserError: no pixel was counted.
    """
    confusion = np.asarray(confusion)
    if not confusion.any():
        raise UserError("every pixel of the evaluation set is ignored; check its label maps")
    classes = per_class(confusion)
    return {
        "miou": float(np.nanmean(classes["iou"])),
        "mean_accuracy": float(np.nanmean(classes["accuracy"])),
        "pixel_accuracy": float(np.trace(confusion) / confusion.sum()),
    }


def format_per_class(confusion: np.ndarray, names: Sequence[str]) -> str:
    """The per-class table as text, percentages; "-" where undefined."""
    classes = per_class(confusion)
    width = max(map(len, (*names, "class")))
    lines = [f"{'class':<{width}}  {'IoU':>6}  {'accuracy':>8}  {'pixels':>6}"]
    for name, *values in zip(names, *classes.values(), strict=True):
        cells = ["-" if np.isnan(value) else f"{100 * value:.2f}" for value in values]
        lines.append(f"{name:<{width}}  {cells[0]:>6}  {cells[1]:>8}  {cells[2]:>6}")
    return "\n".join(lines)
