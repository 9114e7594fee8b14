"""Named arrays as a few long vectors.

An optimizer that updates hundreds of parameters one by one launches some hundred kernels on a GPU,
most of them shorter than a launch. In a training state the parameters that are updated alike lie
one behind the other in one vector, and so do the moments and the average; models, checkpoints and
pages see arrays by name.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """The arrays of one vector, in order.

    Attributes:
      names, shapes: of the arrays.
      size: of the vector; what is behind the last array is zero.
      key: what the arrays have in common.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    size: int
    key: Hashable

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)


def groups_of(
    arrays: Arrays, key: Callable[[str], Any] = lambda name: 0, *, multiple: int = 1
) -> tuple[Group, ...]:
    """The groups of arrays, or of their shapes, that have one `key(name)` and one dtype.

    Args:
      arrays: by name.
      key: by name; to be sorted.
      multiple: of which the sizes of the vectors are multiples, for the devices that share them.
    """

    def rank(name: str) -> tuple[Any, str]:
        return key(name), str(arrays[name].dtype)

    groups = []
    for (common, _), members in itertools.groupby(sorted(arrays, key=rank), rank):
        names = tuple(members)
        shapes = tuple(tuple(arrays[name].shape) for name in names)
        size = sum(math.prod(shape) for shape in shapes)
        groups.append(Group(names, shapes, -(-size // multiple) * multiple, common))
    return tuple(groups)


@jax.tree_util.register_pytree_node_class
class Packed:
    """Named arrays as a vector for each group; a pytree whose leaves are the vectors.

    Attributes:
      groups: what lies where.
      vectors: a leaf for each group.
    """

    def __init__(self, groups: tuple[Group, ...], vectors: Iterable[Any]) -> None:
        self.groups, self.vectors = groups, tuple(vectors)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Group, ...]]:
        return self.vectors, self.groups

    @classmethod
    def tree_unflatten(cls, groups: tuple[Group, ...], vectors: Iterable[Any]) -> "Packed":
        return cls(groups, vectors)


def per_group(groups: tuple[Group, ...], value: Callable[[Any], Any]) -> Packed:
    """`value(key)` of each group, as a tree like the vectors: a mask or rates of an optimizer."""
    return Packed(groups, (value(group.key) for group in groups))


def pack(arrays: Arrays, groups: tuple[Group, ...]) -> Packed:
    """The vectors of arrays, which are those of the groups."""

    def vector(group: Group) -> jax.Array:
        parts = [jnp.ravel(arrays[name]) for name in group.names]
        if rest := group.size - sum(group.sizes):
            parts.append(jnp.zeros((rest,), parts[0].dtype))
        return jnp.concatenate(parts)

    return Packed(groups, map(vector, groups))


def unpack(tree: Packed | Arrays) -> dict[str, jax.Array]:
    """The arrays by name; their gradient is packed at once."""
    if not isinstance(tree, Packed):
        return dict(tree)
    return _unpack(tree.groups, tree.vectors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpack(groups: tuple[Group, ...], vectors: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
    arrays = {}
    for group, vector in zip(groups, map(_everywhere, vectors), strict=True):
        start = 0
        for name, shape, size in zip(group.names, group.shapes, group.sizes, strict=True):
            arrays[name] = jax.lax.slice(vector, (start,), (start + size,)).reshape(shape)
            start += size
    return arrays


_unpack.defvjp(
    lambda groups, vectors: (_unpack(groups, vectors), None),
    lambda groups, _, gradients: (pack(gradients, groups).vectors,),
)


def _everywhere(vector: jax.Array) -> jax.Array:
    """`vector`, whole on each device: gathered once, not array by array."""
    if jax.sharding.get_abstract_mesh().size > 1:
        return jax.lax.with_sharding_constraint(vector, jax.sharding.PartitionSpec())
    return vector


def join(one: Any, other: Any) -> Any:
    """The arrays of both, which are packed both or neither."""
    if isinstance(one, Packed):
        return Packed(one.groups + other.groups, one.vectors + other.vectors)
    return {**one, **other}


def like(arrays: Arrays, tree: Any) -> Any:
    """Arrays by name in the form of `tree`, packed or by name."""
    return pack(arrays, tree.groups) if isinstance(tree, Packed) else arrays


def unpack_all(tree: Any) -> Any:
    """A pytree with named arrays in place of each `Packed` in it."""
    return jax.tree.map(lambda x: unpack(x) if _is_packed(x) else x, tree, is_leaf=_is_packed)


def pack_all(tree: Any, structure: Any) -> Any:
    """The inverse of `unpack_all`: a pytree in the form of `structure`."""
    return jax.tree.map(lambda x, part: like(part, x), structure, tree, is_leaf=_is_packed)


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)
