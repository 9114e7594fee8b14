"""Translates names and layouts of tensors between PyTorch's models and those of this project.

Each model file has a table of rows (PyTorch module, module in this project, kind). `{}` stands for
a number and matches in order. The kind has the names of the module's tensors on both sides, and how
their axes are rearranged. One table serves import and export.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vssd_jax.errors import UserError


class Layout(NamedTuple):
    """How an array is rearranged on import and back on export."""

    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


class Leaf(NamedTuple):
    """A tensor of a module: its name in PyTorch, its name in this project, its layout."""

    torch: str
    ours: str
    layout: Layout


class Row(NamedTuple):
    """A module's name in PyTorch and in this project, and its tensors."""

    torch: str
    ours: str
    kind: tuple[Leaf, ...]


Table = tuple[Row, ...]


def _axes(*axes: int) -> Layout:
    inverse = tuple(int(axis) for axis in np.argsort(axes))
    return Layout(lambda w: w.transpose(axes), lambda w: w.transpose(inverse))


SAME_LAYOUT = Layout(lambda w: w, lambda w: w)
_DEPTHWISE = Layout(  # C1HW -> HWC
    lambda w: w[:, 0].transpose(1, 2, 0), lambda w: w.transpose(2, 0, 1)[:, None]
)
_BIAS = Leaf("bias", "bias", SAME_LAYOUT)

# The kinds of modules that models share; model files define more.
CONV = (Leaf("weight", "kernel", _axes(2, 3, 1, 0)), _BIAS)  # OIHW -> HWIO
DECONV = (Leaf("weight", "kernel", _axes(2, 3, 0, 1)), _BIAS)  # IOHW -> HWIO
DEPTHWISE = (Leaf("weight", "kernel", _DEPTHWISE), _BIAS)
LINEAR = (Leaf("weight", "kernel", _axes(1, 0)), _BIAS)
NORM = (Leaf("weight", "scale", SAME_LAYOUT), _BIAS)
BATCH_NORM = (
    *NORM,
    Leaf("running_mean", "mean", SAME_LAYOUT),
    Leaf("running_var", "var", SAME_LAYOUT),
)

# PyTorch's BatchNorm counts its batches; the count does not affect a model's output.
COUNTER = "num_batches_tracked"


def under(torch_prefix: str, prefix: str, table: Table) -> Table:
    """The rows of `table` with a prefix before their names: a model as part of another."""
    return tuple(Row(torch_prefix + row.torch, prefix + row.ours, row.kind) for row in table)


@functools.cache
def _patterns(table: Table, side: int) -> list[re.Pattern[str]]:
    names = [(row.torch, row.ours)[side] for row in table]
    return [re.compile(re.escape(name).replace(r"\{\}", r"(\d+)")) for name in names]


_TORCH, _OURS = 0, 1  # the two sides


def _match(table: Table, name: str, side: int) -> tuple[str, Layout] | None:
    """The name on the other side and the layout of a tensor."""
    module, _, leaf_name = name.rpartition(".")
    for row, pattern in zip(table, _patterns(table, side), strict=True):
        if found := pattern.fullmatch(module):
            for leaf in row.kind:
                if leaf_name == (leaf.torch, leaf.ours)[side]:
                    other = (row.ours, row.torch)[side].format(*found.groups())
                    return f"{other}.{(leaf.ours, leaf.torch)[side]}", leaf.layout
    return None


def covers(table: Table, names: Mapping[str, object]) -> bool:
    """Whether the table has a row for each of these names of parameters of this project."""
    return all(_match(table, name, _OURS) is not None for name in names)


def from_torch(
    table: Table, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Renames and rearranges PyTorch's tensors, whose shapes must be right.

    Returns:
      The parameters by the names of this project, the tensors that are deliberately ignored, and
      those that no row of the table matches.
    """
    params, ignored, unknown = {}, [], []
    for name, value in tensors.items():
        if name.rpartition(".")[2] == COUNTER:
            ignored.append(name)
        elif (found := _match(table, name, _TORCH)) is None:
            unknown.append(name)
        else:
            params[found[0]] = found[1].from_torch(value)
    return params, ignored, unknown


def to_torch(table: Table, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`; the table must cover every parameter."""
    tensors = {}
    for name, value in params.items():
        found = _match(table, name, _OURS)
        if found is None:
            raise KeyError(f"no row of the name table matches {name}")
        tensors[found[0]] = found[1].to_torch(value)
    return tensors


class TensorShapes:
    """The shapes in a PyTorch state dict, or in its part under a prefix, for `Family.recognise`.

    Names are relative to the prefix.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], prefix: str = "") -> None:
        self._tensors, self._prefix = tensors, prefix

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def __iter__(self) -> Iterator[str]:
        for name in self._tensors:
            if name.startswith(self._prefix):
                yield name[len(self._prefix) :]

    def under(self, prefix: str) -> "TensorShapes":
        return TensorShapes(self._tensors, self._prefix + prefix)

    def any_under(self, *prefixes: str) -> bool:
        """Whether there is a tensor whose name starts with one of `prefixes`."""
        return any(name.startswith(prefixes) for name in self)

    def count(self, prefix: str) -> int:
        """How many different numbers follow `prefix` in the names: the length of a list."""
        return len({n[len(prefix) :].split(".")[0] for n in self if n.startswith(prefix)})

    def size(self, name: str, axis: int = 0) -> int:
        """The length of a tensor's axis; raises a UserError if there is no such tensor or axis."""
        tensor = self._tensors.get(self._prefix + name)
        if tensor is None or tensor.ndim <= axis or tensor.shape[axis] == 0:
            raise UserError(
                f"these are no weights of a known model: there is no usable tensor "
                f"{self._prefix}{name}"
            )
        return tensor.shape[axis]
