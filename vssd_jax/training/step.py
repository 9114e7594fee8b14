"""One optimizer step: as a plain function, and compiled with its model, optimizer and devices."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vssd_jax.distributed import say
from vssd_jax.host import compiler_options
from vssd_jax.models.casting import cast_together
from vssd_jax.models.split import Arrays, SplitModel
from vssd_jax.tasks.protocol import Task
from vssd_jax.training import report
from vssd_jax.training.apply import apply_gradient
from vssd_jax.training.clock import Clock
from vssd_jax.training.evaluator import Evaluator
from vssd_jax.training.optimizer import (
    decayed,
    frozen_parts,
    layer_rates,
    make_optimizer,
    make_schedule,
    make_split,
)
from vssd_jax.training.packed import pack_all, unpack_all
from vssd_jax.training.plan import Plan
from vssd_jax.training.sharding import (
    check_batch,
    check_groups,
    device_batches,
    make_mesh,
    state_shardings,
    with_shardings,
)
from vssd_jax.training.state import TrainState, from_parts, init_state, to_parts

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, dict, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(
    model: SplitModel,
    apply: Callable[..., tuple[TrainState, jax.Array, jax.Array]],
    loss: Callable[..., tuple[jax.Array, Metrics]],
    *,
    accumulate: int = 1,
    frozen: Collection[str] = (),
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> TrainStep:
    """One optimizer step, to be compiled by the caller.

    Args:
      model: the split model.
      apply: does what follows from the gradient, see `apply_gradient`.
      loss: see `vssd_jax.tasks.protocol.Task.loss`.
      accumulate: micro-batches whose gradients one step averages.
      frozen: names of parameters that have no gradient.
      dtype: in which the model computes.

    Returns:
      `step(state, batch, key) -> (state, metrics)`. A step whose loss or gradient is not finite
      changes nothing but the counters.
    """

    def micro_batch_gradient(
        params: Arrays, batch_stats: Arrays, state: TrainState, batch: dict, key: jax.Array
    ) -> tuple[Arrays, Arrays, Metrics]:
        def loss_fn(params: Arrays) -> tuple[jax.Array, tuple[Metrics, Arrays]]:
            params = {
                name: jax.lax.stop_gradient(value) if name in frozen else value
                for name, value in params.items()
            }
            params = cast_together(params, dtype)
            module = model.merge({**params, **batch_stats}, training=True)
            teacher = model.merge(cast_together(state.ema, dtype), training=False)
            value, metrics = loss(
                module, batch, step=state.step, rngs=nnx.Rngs(key), teacher=teacher
            )
            return value, ({"loss": value, **metrics}, model.batch_stats(module))

        gradient, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(params)
        return gradient, batch_stats, metrics

    def gradient_of(
        state: TrainState, batch: dict, key: jax.Array
    ) -> tuple[Arrays, Arrays, Metrics]:
        if accumulate == 1:
            return micro_batch_gradient(state.params, state.batch_stats, state, batch, key)

        # Every accumulate-th sample: each device keeps its own rows.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch
        )

        def add(
            carry: tuple[Arrays, Arrays], inputs: tuple[dict, jax.Array]
        ) -> tuple[tuple[Arrays, Arrays], Metrics]:
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

    def train_step(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        gradient, batch_stats, metrics = gradient_of(state, batch, key)
        state, norm, finite = apply(state, gradient, batch_stats, metrics["loss"])
        skipped = 1 - finite.astype(jnp.float32)
        return state, {**metrics, "grad_norm": norm, "skipped": skipped}

    return train_step


class Trainer:
    """A task's model, optimizer and devices, and its step compiled for them.

    Args:
      task: what is trained.
      config: of the run.
      plan: of the run.

    Attributes:
      model: the task's model.
      mesh: the devices.
      learning_rate: the schedule, by the number of steps done.
      frozen: names of the parameters that stay as they are.
      abstract: the state's shapes, dtypes and shardings.
      named: the same, with the moments by name as in a checkpoint.
      evaluate: the `Evaluator` of the task and model.
      function: the step before it is compiled, see `make_train_step`.
      apply: its last part: what a gradient does to the state, see `apply_gradient`.

    Raises:
      UserError: a batch that does not divide over the devices, or another invalid field.
    """

    def __init__(self, task: Task, config: ml_collections.ConfigDict, plan: Plan) -> None:
        self.mesh = make_mesh(config.mesh)
        check_batch("batch_size", config.batch_size, self.mesh.size, config.accumulate)
        check_groups(config.batch_norm_images, config.batch_size, config.accumulate)
        self.model = SplitModel(task.build, frozen_parts(config))
        self.evaluate = Evaluator(task, self.model, self.mesh)
        self.learning_rate = make_schedule(config, plan.steps_per_epoch)
        rates = layer_rates(config, self.model.parameter_shapes)
        self.frozen = {name for name, rate in (rates or {}).items() if rate == 0}
        # Moments in one vector could not be split over devices as the parameters are.
        packed = self.mesh.shape.get("fsdp", 1) == 1
        fields = (config, self.learning_rate, decayed(self.model, config.no_decay), rates)
        self._optimizer = make_optimizer(*fields, packed=packed)
        if self.frozen:
            say(f"{len(self.frozen)} of {len(self.model.parameter_shapes)} tensors are frozen")
        self._init_key, self._step_key = jax.random.split(jax.random.key(config.seed))
        abstract = jax.eval_shape(lambda: init_state(self.model, self._optimizer, self._init_key))
        self._shardings = state_shardings(abstract, self.mesh)
        self.abstract: TrainState = with_shardings(abstract, self._shardings)
        named = jax.eval_shape(unpack_all, abstract)
        shardings = state_shardings(named, self.mesh)
        self.named: TrainState = with_shardings(named, shardings)
        self._unpack = jax.jit(unpack_all, out_shardings=shardings.opt_state)
        self._pack = jax.jit(
            lambda named: pack_all(named, abstract.opt_state),
            out_shardings=self._shardings.opt_state,
        )
        split = make_split(*fields) if packed else None
        self.apply = functools.partial(apply_gradient, self._optimizer, split, config.ema_decay)
        self.function = make_train_step(
            self.model,
            self.apply,
            task.loss,
            accumulate=config.accumulate,
            frozen=self.frozen,
            dtype=config.dtype,
        )
        self._step = jax.jit(
            self.function,
            donate_argnums=0,
            out_shardings=(self._shardings, NamedSharding(self.mesh, PartitionSpec())),
            compiler_options=compiler_options(),
        )
        # By the shapes of the batch: detection has a few.
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    def fresh_state(self, weights: Mapping[str, np.ndarray] | None = None) -> TrainState:
        """The state before the first step, on the devices; see `init_state`."""
        state = init_state(self.model, self._optimizer, self._init_key, weights)
        return jax.device_put(state, self._shardings)

    def to_parts(self, state: TrainState) -> dict[str, dict[str, Any]]:
        """The parts of a checkpoint, see `vssd_jax.training.state.to_parts`."""
        moments = self._unpack(state.opt_state)
        return to_parts(dataclasses.replace(state, opt_state=moments))

    def from_parts(self, parts: Mapping[str, dict[str, Any]]) -> TrainState:
        """The inverse of `to_parts`."""
        state = from_parts(parts, self.named)
        return dataclasses.replace(state, opt_state=self._pack(state.opt_state))

    def device_batches(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Batches on the devices, a few ahead."""
        return device_batches(batches, self.mesh)

    def program(self, state: TrainState, batch: dict) -> jax.stages.Compiled:
        """The step compiled for batches of these shapes: `(state, batch, key)`; donates `state`."""
        # Kernels read from the mesh in the context how the batch is sharded.
        with jax.set_mesh(self.mesh):
            return self._step.lower(state, batch, self._step_key).compile()

    def step(self, state: TrainState, batch: dict, clock: Clock) -> tuple[TrainState, Metrics]:
        """One step; `state` is donated. `clock` is paused while a program is compiled.

        Raises:
          UserError: the program needs more memory than a device has.
        """
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._programs:
            with clock.paused():
                program = self.program(state, batch)
            report.announce(program)
            self._programs[shapes] = program
        return self._programs[shapes](state, batch, self._step_key)
