"""What a gradient does to the training state: in plain JAX, or on a GPU in a few kernels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vssd_jax.kernels import dispatch
from vssd_jax.models.split import Arrays
from vssd_jax.training.optimizer import Split
from vssd_jax.training.packed import Packed, pack
from vssd_jax.training.state import TrainState


def apply_gradient(
    optimizer: optax.GradientTransformation,
    split: Split | None,
    ema_decay: float,
    state: TrainState,
    gradient: Arrays,
    batch_stats: Arrays,
    loss: jax.Array,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """A step from its gradient on.

    Args:
      optimizer: of the parameters.
      split: the same for kernels, if it keeps moments as a vector; None for plain JAX everywhere.
      ema_decay: of the average, over parameters and statistics alike.
      state: before the step.
      gradient: of the parameters.
      batch_stats: after the step.
      loss: () of the step.

    Returns:
      The state after the step, the norm of the gradient, and whether both it and the loss are
      finite. Where they are not, nothing but the counters has changed.
    """
    # Packed once, for the norm here, clipping and moments. The barrier keeps XLA from putting the
    # vector together again for each of its slices.
    packed = jax.lax.optimization_barrier(pack(gradient)) if split else gradient
    norm = optax.tree.norm(packed)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    # In an array, for XLA's sake: see `vssd_jax.kernels.shared_one`.
    finite = jax.lax.optimization_barrier(jnp.full(2, finite))[0]
    if split is None or dispatch.pallas_triton(dispatch.target()):
        new = in_plain_jax(optimizer, ema_decay, state, packed, batch_stats, finite)
    else:
        new = in_few_kernels(split, ema_decay, state, packed, batch_stats, finite)
    nonfinite = jnp.where(finite, 0, state.nonfinite + 1)
    return dataclasses.replace(new, step=state.step + 1, nonfinite=nonfinite), norm, finite


def in_plain_jax(
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    state: TrainState,
    gradient: Arrays | Packed,
    batch_stats: Arrays,
    finite: jax.Array,
) -> TrainState:
    """The state after a step, but for its counters; the old one if not `finite`."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update({**params, **batch_stats}, state.ema, 1 - ema_decay)
    new = (params, batch_stats, opt_state, ema)
    old = (state.params, state.batch_stats, state.opt_state, state.ema)
    params, batch_stats, opt_state, ema = _guarded(finite, new, old)
    return dataclasses.replace(
        state, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
    )


def in_few_kernels(
    split: Split,
    ema_decay: float,
    state: TrainState,
    gradient: Arrays | Packed,
    batch_stats: Arrays,
    finite: jax.Array,
) -> TrainState:
    """The same. XLA would have a kernel for each size of parameter."""
    # Not before the device is known: it imports Pallas.
    from vssd_jax.kernels.multi_tensor import multi_tensor

    def step(
        update: jax.Array,
        param: jax.Array,
        average: jax.Array,
        decays: jax.Array,
        rate: jax.Array,
        factor: jax.Array,
        finite: jax.Array,
    ) -> tuple[jax.Array, ...]:
        new = optax.apply_updates(param, rate * (update + decays * factor * param))
        new = (new, optax.incremental_update(new, average, 1 - ema_decay))
        return _guarded(finite > 0, new, (param, average))

    (updates, factor), opt_state = split.update(gradient, state.opt_state)
    averages = {name: state.ema[name] for name in batch_stats}
    new = (batch_stats, opt_state, optax.incremental_update(batch_stats, averages, 1 - ema_decay))
    old = (state.batch_stats, state.opt_state, averages)
    batch_stats, opt_state, ema = _guarded(finite, new, old)
    params: dict[str, jax.Array] = {}
    for group, vector in zip(updates.groups, updates.vectors, strict=True):
        new_params, new_averages = multi_tensor(
            step,
            vector,
            [[arrays[name] for name in group.names] for arrays in (state.params, state.ema)],
            [split.constants[name] for name in group.names],
            [factor.astype(vector.dtype), finite.astype(vector.dtype)],
        )
        params |= dict(zip(group.names, new_params, strict=True))
        ema |= dict(zip(group.names, new_averages, strict=True))
    return dataclasses.replace(
        state, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
    )


def _guarded(finite: jax.Array, new: Any, old: Any) -> Any:
    """The new values if `finite`, else the old ones."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
