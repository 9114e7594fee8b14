"""Modules split into structure and named arrays, the form for `jax.jit` and checkpoints."""

from collections.abc import Callable, Collection, Mapping

import jax
import numpy as np
from flax import nnx

from vssd_jax.models.family import abstract
from vssd_jax.models.layers import norm_parameters

Arrays = dict[str, jax.Array]


class SplitModel:
    """A module split once into structure and arrays; `merge` puts the two together again.

    Training is thus a function of arrays by dotted name, for any Flax NNX module and any sharding.

    Args:
      build: makes the module in training mode from an `nnx.Rngs`.
      frozen: how the names of the modules start that stay in evaluation mode in training, too:
        without drop path, and with the statistics that they have.

    Attributes:
      abstract: the module in evaluation mode, with shapes in place of arrays.
      parameter_shapes: of each parameter.
      norm_parameters: the names of the parameters of norms.
    """

    def __init__(
        self, build: Callable[[nnx.Rngs], nnx.Module], frozen: Collection[str] = ()
    ) -> None:
        self._build = build
        model = abstract(build)
        for path, module in nnx.iter_modules(model):
            if path and f"{'.'.join(map(str, path))}.".startswith(tuple(frozen)):
                module.eval()
        self._train_graph, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
        model.eval()
        self._eval_graph = nnx.graphdef(model)
        self.abstract = model
        self.norm_parameters = norm_parameters(model)
        self._structures = [jax.tree.structure(state) for state in states]
        self._names = [
            [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)] for state in states
        ]
        self.parameter_shapes: dict[str, tuple[int, ...]] = {
            name: leaf.shape
            for name, leaf in zip(self._names[0], jax.tree.leaves(states[0]), strict=True)
        }

    def _arrays(self, module: nnx.Module) -> list[Arrays]:
        """Parameters and BatchNorm statistics by name."""
        states = nnx.split(module, nnx.Param, nnx.BatchStat)[1:]
        return [
            dict(zip(names, jax.tree.leaves(state), strict=True))
            for names, state in zip(self._names, states, strict=True)
        ]

    def init(self, key: jax.Array) -> tuple[Arrays, Arrays]:
        """Fresh parameters and BatchNorm statistics."""
        params, batch_stats = self._arrays(self._build(nnx.Rngs(params=key)))
        return params, batch_stats

    def merge(
        self, arrays: Mapping[str, jax.Array | np.ndarray], *, training: bool
    ) -> nnx.Module:
        """The module with these parameters and statistics."""
        states = [
            jax.tree.unflatten(structure, [arrays[name] for name in names])
            for structure, names in zip(self._structures, self._names, strict=True)
        ]
        graph = self._train_graph if training else self._eval_graph
        return nnx.merge(graph, *states, copy=True)

    def batch_stats(self, module: nnx.Module) -> Arrays:
        """The BatchNorm statistics of a merged module, after its forward pass."""
        return self._arrays(module)[1]
