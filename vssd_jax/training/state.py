"""The training state and one step: plain functions of arrays by dotted name.

A model is split once into its structure and its arrays; inside a step the two are merged
again, so that any Flax NNX module trains under `jax.jit` with any sharding.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vssd_jax.models.family import abstract

Arrays = dict[str, jax.Array]


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


class Functional:
    """A module as structure plus named arrays.

    Args:
      build: makes the module in training mode from an `nnx.Rngs`.

    Attributes:
      abstract: the module in evaluation mode, with shapes in place of arrays.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        model = abstract(build)
        self._train_graph, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
        model.eval()
        self._eval_graph = nnx.graphdef(model)
        self.abstract = model
        self._structures = [jax.tree.structure(state) for state in states]
        self._names = [
            [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)] for state in states
        ]

    def _flat(self, states) -> list[Arrays]:
        return [
            dict(zip(names, jax.tree.leaves(state), strict=True))
            for names, state in zip(self._names, states, strict=True)
        ]

    def init(self, key: jax.Array) -> tuple[Arrays, Arrays]:
        """Fresh parameters and BatchNorm statistics."""
        model = self._build(nnx.Rngs(params=key))
        return tuple(self._flat(nnx.split(model, nnx.Param, nnx.BatchStat)[1:]))

    def merge(self, arrays: Arrays, *, training: bool) -> nnx.Module:
        """The module with these parameters and statistics."""
        states = [
            jax.tree.unflatten(structure, [arrays[name] for name in names])
            for structure, names in zip(self._structures, self._names, strict=True)
        ]
        graph = self._train_graph if training else self._eval_graph
        return nnx.merge(graph, *states, copy=True)

    def batch_stats(self, model: nnx.Module) -> Arrays:
        """The BatchNorm statistics of a merged module, after its forward pass."""
        return self._flat(nnx.split(model, nnx.Param, nnx.BatchStat)[1:])[1]


def init_state(
    functional: Functional,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    weights: Mapping[str, np.ndarray] | None = None,
) -> TrainState:
    """The state before the first step; the average starts at the initialisation.

    Args:
      functional, optimizer: see there.
      key: of the initialisation.
      weights: take the place of fresh parameters and statistics, by dotted name.
    """
    weights = weights or {}
    params, batch_stats = (
        {name: jnp.asarray(weights.get(name, value), value.dtype) for name, value in part.items()}
        for part in functional.init(key)
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, {**params, **batch_stats}),
        nonfinite=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    functional: Functional,
    optimizer: optax.GradientTransformation,
    loss: Callable,
    *,
    ema_decay: float,
    accumulate: int = 1,
) -> Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict]]:
    """One optimizer step, to be compiled by the caller.

    Args:
      functional, optimizer: see above.
      loss: `loss(model, batch, *, step, rngs, teacher) -> (scalar, dict of scalars)`; `teacher` is
        the averaged model in evaluation mode.
      ema_decay: of the average, over parameters and statistics alike.
      accumulate: micro-batches that one step averages the gradients of.

    Returns:
      `step(state, batch, key) -> (state, metrics)`. A step whose loss or gradient is not finite
      changes nothing but the counters.
    """

    def micro_batch_gradient(params, batch_stats, state, batch, key):
        def loss_fn(params):
            model = functional.merge({**params, **batch_stats}, training=True)
            teacher = functional.merge(state.ema, training=False)
            value, metrics = loss(
                model, batch, step=state.step, rngs=nnx.Rngs(key), teacher=teacher
            )
            return value, ({"loss": value, **metrics}, functional.batch_stats(model))

        gradient, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(params)
        return gradient, batch_stats, metrics

    def gradient_of(state, batch, key):
        if accumulate == 1:
            return micro_batch_gradient(state.params, state.batch_stats, state, batch, key)

        # Every accumulate-th sample: each device keeps its own rows.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch
        )

        def add(carry, inputs):
            total, batch_stats = carry
            gradient, batch_stats, metrics = micro_batch_gradient(
                state.params, batch_stats, state, inputs[0], inputs[1]
            )
            return (jax.tree.map(jnp.add, total, gradient), batch_stats), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        keys = jax.random.split(key, accumulate)
        (gradient, batch_stats), metrics = jax.lax.scan(
            add, (zeros, state.batch_stats), (micro, keys)
        )
        gradient, metrics = (
            jax.tree.map(lambda x: x / accumulate, gradient),
            jax.tree.map(lambda x: x.mean(0), metrics),
        )
        return gradient, batch_stats, metrics

    def train_step(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(key, state.step)
        gradient, batch_stats, metrics = gradient_of(state, batch, key)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update({**params, **batch_stats}, state.ema, 1 - ema_decay)
        new = (params, batch_stats, opt_state, ema)
        old = (state.params, state.batch_stats, state.opt_state, state.ema)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        state = TrainState(
            state.step + 1, *new, nonfinite=jnp.where(finite, 0, state.nonfinite + 1)
        )
        skipped = 1 - finite.astype(jnp.float32)
        return state, {**metrics, "grad_norm": norm, "skipped": skipped}

    return train_step
