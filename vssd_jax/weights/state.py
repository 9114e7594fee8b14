"""The parameters and statistics of a model as a flat dict of arrays, in and out, strictly."""

from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vssd_jax.errors import UserError

_SHOWN = 8


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and BatchNorm statistic by its dotted path."""
    return {name: variable.shape for name, variable in _variables(model).items()}


def get_state(model: nnx.Module) -> dict[str, np.ndarray]:
    """Every parameter and BatchNorm statistic by its dotted path."""
    return {name: np.asarray(variable[...]) for name, variable in _variables(model).items()}


def check(
    expected: Mapping[str, tuple[int, ...]],
    values: Mapping[str, np.ndarray],
    *,
    fresh: Collection[str] = (),
) -> None:
    """Compares tensors with the shapes by name that a model needs.

    Raises:
      UserError: naming the missing, unexpected and misshapen tensors.
    """
    missing = sorted(expected.keys() - values.keys() - set(fresh))
    unexpected = sorted(values.keys() - expected.keys())
    misshapen = [
        f"{name} {values[name].shape} for {shape}"
        for name, shape in expected.items()
        if name in values and name not in fresh and values[name].shape != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for what, names in (
            ("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)
        )
        if names
    ]  # fmt: skip
    if problems:
        raise UserError(f"the weights do not fit the model; {'; '.join(problems)}")


def set_state(
    model: nnx.Module, values: Mapping[str, np.ndarray], *, fresh: Collection[str] = ()
) -> None:
    """Fills a model, in the dtype of its parameters.

    Args:
      model: changed in place, and not at all if there is an error.
      values: arrays by dotted path.
      fresh: names of parameters that keep the model's value where `values` has none that fits.

    Raises:
      UserError: naming the missing, unexpected and misshapen tensors.
    """
    variables = _variables(model)
    check(shapes(model), values, fresh=fresh)
    for name, variable in variables.items():
        if name in values and values[name].shape == variable.shape:
            # NumPy converts: JAX would compile a program for each shape.
            value = np.asarray(values[name], variable.dtype)
            variable.set_value(jnp.asarray(value, variable.dtype))
    nnx.update(model, nnx.from_flat_state(
        [(_path(name), variable) for name, variable in variables.items()]))


def _path(name: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
