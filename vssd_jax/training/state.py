"""The training state, and the named arrays that a checkpoint holds of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vssd_jax.models.split import Arrays, SplitModel


@flax.struct.dataclass
class TrainState:
    """Everything that a run is resumed from.

    Attributes:
      step: optimizer steps taken or skipped.
      params, batch_stats: of the model, by dotted name.
      opt_state: of the optimizer.
      ema: moving average of params and batch_stats together.
      nonfinite: steps skipped in a row for a loss or gradient that was not finite.
    """

    step: jax.Array
    params: Arrays
    batch_stats: Arrays
    opt_state: Any
    ema: Arrays
    nonfinite: jax.Array


def init_state(
    model: SplitModel,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    weights: Mapping[str, np.ndarray] | None = None,
) -> TrainState:
    """The state before the first step; the average starts at the initialisation.

    Args:
      model: the split model.
      optimizer: of its parameters.
      key: of the initialisation.
      weights: take the place of fresh parameters and statistics, by dotted name.
    """
    weights = weights or {}
    params, batch_stats = (
        {name: jnp.asarray(weights.get(name, value), value.dtype) for name, value in part.items()}
        for part in model.init(key)
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, {**params, **batch_stats}),
        nonfinite=jnp.zeros((), jnp.int32),
    )


def to_parts(state: TrainState) -> dict[str, dict[str, Any]]:
    """The parts of a checkpoint: "ema", by dotted name, and "train", the rest by tree path.

    A checkpoint of names and arrays can be read without the class of the state.
    """
    return {"ema": state.ema, "train": _named(dataclasses.replace(state, ema={}))}


def from_parts(parts: Mapping[str, dict[str, Any]], like: TrainState) -> TrainState:
    """The inverse of `to_parts`; `like` has the structure."""
    rest = dataclasses.replace(like, ema={})
    leaves = [parts["train"][name] for name in _named(rest)]
    state: TrainState = jax.tree.unflatten(jax.tree.structure(rest), leaves)
    return dataclasses.replace(state, ema=parts["ema"])


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
