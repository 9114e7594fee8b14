"""Named arrays as a few long vectors.

An optimizer that treats hundreds of gradients one by one launches some hundred kernels on a GPU,
most of them shorter than a launch. Clipping and moments take them as one vector instead, and the
moments stay one; checkpoints and readers see arrays by name.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """The arrays of one vector, in order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def groups_of(arrays: Arrays) -> tuple[Group, ...]:
    """A group for each dtype of arrays, or of their shapes."""

    def dtype(name: str) -> str:
        return str(arrays[name].dtype)

    # Sorted, as JAX sorts dictionaries: the order in which one was filled must not matter.
    names = sorted(sorted(arrays), key=dtype)
    members = [tuple(group) for _, group in itertools.groupby(names, dtype)]
    return tuple(
        Group(names, tuple(tuple(arrays[name].shape) for name in names)) for names in members
    )


@jax.tree_util.register_pytree_node_class
class Packed:
    """Named arrays as a vector for each group; a pytree whose leaves are the vectors.

    Attributes:
      groups: what lies where.
      vectors: one for each group.
    """

    def __init__(self, groups: tuple[Group, ...], vectors: Iterable[Any]) -> None:
        self.groups, self.vectors = groups, tuple(vectors)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Group, ...]]:
        return self.vectors, self.groups

    @classmethod
    def tree_unflatten(cls, groups: tuple[Group, ...], vectors: Iterable[Any]) -> "Packed":
        return cls(groups, vectors)


def pack(arrays: Arrays) -> Packed:
    """The vectors of named arrays."""
    groups = groups_of(arrays)
    return Packed(
        groups,
        (jnp.concatenate([jnp.ravel(arrays[name]) for name in group.names]) for group in groups),
    )


def unpack(packed: Packed) -> dict[str, jax.Array]:
    """The arrays by name."""
    arrays = {}
    for group, vector in zip(packed.groups, packed.vectors, strict=True):
        start = 0
        for name, shape in zip(group.names, group.shapes, strict=True):
            size = math.prod(shape)
            arrays[name] = jax.lax.slice(vector, (start,), (start + size,)).reshape(shape)
            start += size
    return arrays


def unpack_all(tree: Any) -> Any:
    """A pytree with named arrays in place of each `Packed` in it."""
    return jax.tree.map(lambda x: unpack(x) if _is_packed(x) else x, tree, is_leaf=_is_packed)


def pack_all(tree: Any, structure: Any) -> Any:
    """The inverse of `unpack_all`: a pytree in the form of `structure`."""
    return jax.tree.map(
        lambda like, part: pack(part) if _is_packed(like) else part,
        structure,
        tree,
        is_leaf=_is_packed,
    )


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)
