"""Checkpoints of a small state whose values all show its step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vssd_jax.training.checkpoints import Checkpoints
from vssd_jax.training.state import TrainState, from_parts, to_parts


def make_state(step):
    """A small state whose values all show its step."""
    params = {f"layer{i}.kernel": jnp.full((8, 3), float(step)) for i in range(3)}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        batch_stats={},
        opt_state=optax.adamw(1e-3).init(params),
        ema=jax.tree.map(jnp.copy, params),
        nonfinite=jnp.int32(0),
    )


def save(workdir, steps):
    with Checkpoints(workdir, best_metric="score") as checkpoints:
        for step in steps:
            checkpoints.save(step, to_parts(make_state(step)), {"score": -step})


def restored_step(workdir):
    """The step that a new run starts from, once its values have been checked; 0: the start."""
    with Checkpoints(workdir, best_metric="score") as checkpoints:
        if not checkpoints.latest_step:
            return 0
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0)
        )
        state = from_parts(checkpoints.restore(to_parts(abstract)), abstract)
    expected = make_state(checkpoints.latest_step)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    return int(state.step)
