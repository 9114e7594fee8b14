"""What is done to each of hundreds of arrays alike, in a few kernels for NVIDIA GPUs (multi-tensor
apply), in Pallas (Triton backend).

XLA has a kernel for each size of array, and most of them are shorter than a launch. Here a program
takes a block of one of many arrays: branches on its number find the array and load the block, the
function is computed outside of them, and other branches store it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import mesh, tiles

BLOCK = 1024  # values of a program
# Arrays of a launch: the pointers of more stay in registers, or spill.
ARRAYS = 48

Constants = tuple[float, ...]


def multi_tensor(
    f: Callable[..., tuple[Array, ...]],
    vector: Array,
    arrays: Sequence[Sequence[Array]],
    constants: Sequence[Constants],
    scalars: Sequence[Array],
) -> list[list[Array]]:
    """`f` of every array's elements, in place where the arrays are donated.

    Args:
      f: elementwise, `(part, *values, *constants, *scalars) -> new values`, as many as `values`.
      vector: (elements of all arrays,), in their order.
      arrays: a list for each of `values`; arrays of equal shapes at a place, and one dtype.
      constants: of each array.
      scalars: () each, the same for all arrays, in their dtype.

    Returns:
      Lists like `arrays`.
    """
    on_device = functools.partial(_on_device, f, tuple(constants))
    return mesh.everywhere(on_device, vector, [list(values) for values in arrays], list(scalars))


def _on_device(
    f: Callable[..., tuple[Array, ...]],
    constants: Sequence[Constants],
    vector: Array,
    arrays: list[list[Array]],
    scalars: list[Array],
) -> list[list[Array]]:
    # In one array: a kernel less than apart.
    packed_scalars = jnp.stack(scalars)
    count, offset = len(constants), 0
    launches = pl.cdiv(count, ARRAYS)
    new: list[list[Array]] = [[] for _ in arrays]
    for launch in range(launches):
        some = slice(launch * count // launches, (launch + 1) * count // launches)
        found = _launch(
            f, vector, offset, packed_scalars, [values[some] for values in arrays], constants[some]
        )
        offset += sum(array.size for array in arrays[0][some])
        for values, more in zip(new, found, strict=True):
            values += more
    return new


def _launch(
    f: Callable[..., tuple[Array, ...]],
    vector: Array,
    offset: int,
    scalars: Array,
    arrays: list[list[Array]],
    constants: Sequence[Constants],
) -> list[list[Array]]:
    """`f` of some arrays, whose part of `vector` starts at `offset`."""
    count, flat = len(constants), [array.reshape(-1) for values in arrays for array in values]
    starts, offsets, programs = [], [], 0
    for array in flat[:count]:
        starts.append(programs)
        offsets.append(offset)
        programs += pl.cdiv(array.size, BLOCK)
        offset += array.size
    kernel = functools.partial(_kernel, f=f, starts=starts, offsets=offsets, constants=constants)
    found = tiles.call(
        kernel,
        "multi_tensor",
        (programs,),
        [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in flat],
        (vector, scalars, *flat),
        aliases={2 + i: i for i in range(len(flat))},
    )
    return [
        [new.reshape(old.shape) for new, old in zip(found[i * count :], values, strict=False)]
        for i, values in enumerate(arrays)
    ]


def _kernel(
    vector_ref: Any,
    scalars_ref: Any,
    *refs: Any,
    f: Callable[..., tuple[Array, ...]],
    starts: Sequence[int],
    offsets: Sequence[int],
    constants: Sequence[Constants],
) -> None:
    # The results alone: they lie where the arrays do, and half as many pointers are enough.
    count, refs = len(starts), refs[len(refs) // 2 :]
    program = pl.program_id(0)

    index = jnp.arange(BLOCK)

    def load(i: int) -> tuple[Array, ...]:
        first = (program - starts[i]) * BLOCK
        size = refs[i].size - first
        block = first + index, index < size
        return first, first + offsets[i], size, *(tiles.load(ref, block) for ref in refs[i::count])

    first, first_of_vector, size, *values = _branch(load, program, starts)
    valid = index < size
    part = tiles.load(vector_ref, (first_of_vector + index, valid))
    dtype = vector_ref.dtype
    chosen = [_choose(kind, program, starts, dtype) for kind in zip(*constants, strict=True)]
    new = f(part, *values, *chosen, *(scalars_ref[i] for i in range(scalars_ref.size)))
    block = first + index, valid

    def store(i: int) -> tuple[()]:
        for ref, value in zip(refs[i::count], new, strict=True):
            tiles.store(ref, value, block)
        return ()

    _branch(store, program, starts)


def _branch(
    f: Callable[[int], tuple[Array, ...]], program: Array, starts: Sequence[int]
) -> tuple[Array, ...]:
    """`f(i)` of the array i whose programs start at `starts[i]`, in halves: a balanced tree."""

    def of(low: int, high: int) -> tuple[Array, ...]:
        if high - low == 1:
            return f(low)
        middle = (low + high) // 2
        return jax.lax.cond(
            program < starts[middle], lambda: of(low, middle), lambda: of(middle, high)
        )

    return of(0, len(starts))


def _choose(
    values: Sequence[float], program: Array, starts: Sequence[int], dtype: jnp.dtype
) -> Array:
    """The value of the program's array. (Branches cannot return constants.)"""
    # With a dtype: Pallas takes weak ones for bool here.
    typed = [jnp.asarray(value, dtype) for value in values]
    chosen = typed[0]
    for i in range(1, len(values)):
        if values[i] != values[i - 1]:
            chosen = jnp.where(program < starts[i], chosen, typed[i])
    return chosen
