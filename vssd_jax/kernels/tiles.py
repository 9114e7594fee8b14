"""What the Pallas kernels for NVIDIA GPUs (Triton backend) have in common.

Sizes inside a kernel are powers of two; masks cover what lies beyond the arrays. (A block's tail
is not masked by Pallas: hence whole arrays as blocks, and masked loads and stores.)
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

f32 = jnp.float32
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def padded(size: int) -> int:
    """The power of two that holds `size` elements; matrix units want 16 at least."""
    return max(16, pl.next_power_of_2(size))


def span(start, size: int, end: int):
    """`size` indices from `start` on, and the mask of those below `end`."""
    index = start + jnp.arange(size)
    return index, index < end


def load(ref, *axes):
    """The elements at the cross product of `axes`, (indices, mask) each; zero beyond the masks."""
    index, mask = _grid(axes)
    return plgpu.load(ref.at[index], mask=mask, other=0.0)


def store(ref, value, *axes):
    """Writes what `load` reads."""
    index, mask = _grid(axes)
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _grid(axes):
    # One index tuple of arrays: chained `.at`s break masked stores in interpret mode.
    vectors = [axis for axis in axes if isinstance(axis, tuple)]
    index, mask, place = [], None, 0
    for axis in axes:
        if not isinstance(axis, tuple):
            index.append(axis)
            continue
        shape = [1] * len(vectors)
        shape[place] = -1
        place += 1
        positions, valid = (part.reshape(shape) for part in axis)
        index.append(positions)
        mask = valid if mask is None else mask & valid
    shape = tuple(axis[0].size for axis in vectors)
    return tuple(index), jnp.broadcast_to(mask, shape)


def dot(a, b):
    """a @ b in float32; products of float32 inputs are full float32, not TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == f32 else None
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=f32)


def layer_norm(x, scale_ref, bias_ref, columns, epsilon):
    """LayerNorm of the rows of x, whose columns are `columns`, in two passes; dtype of x."""
    wide, channels = x.astype(f32), scale_ref.shape[0]
    mean = jnp.sum(wide, axis=1) / channels
    centred = jnp.where(columns[1][None, :], wide - mean[:, None], 0.0)
    variance = jnp.sum(centred * centred, axis=1) / channels
    scale, bias = (load(ref, columns)[None, :] for ref in (scale_ref, bias_ref))
    normed = centred * jax.lax.rsqrt(variance + epsilon)[:, None] * scale + bias
    return normed.astype(x.dtype)


def call(kernel, name, grid, out_shape, args, *, interpret, num_warps=4, num_stages=2):
    """Runs `kernel` on whole arrays; `interpret` runs it on a CPU."""
    # Always name Triton's parameters: without them some versions of JAX choose another backend.
    params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=None if interpret else params,
        interpret=interpret,
        name=name,
    )(*args)
