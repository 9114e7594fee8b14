"""The MLP branch as one Pallas kernel for NVIDIA GPUs (Triton backend), for inference.

A program holds a block of tokens from the first read to the last write: LayerNorm, then for each
tile of the hidden layer the first product, GELU and the second product. The hidden layer, four
times as wide as the tokens, is never written to memory.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import dispatch, mesh, tiles
from vssd_jax.kernels.mlp.api import MLPParams
from vssd_jax.kernels.tiles import f32

# With more, reading both kernels for every block of tokens costs more than the hidden layer saves.
MAX_CHANNELS = 256


def supports(x: Array, branch_scale: Array | None, **_: Any) -> str | None:
    """Why these arguments are out of reach, or None."""
    if branch_scale is not None:
        return "stochastic depth (the kernel is for inference)"
    if x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels (at most {MAX_CHANNELS})"
    return dispatch.wrong_dtype(x, jnp.bfloat16, jnp.float16) or mesh.too_large(x)


def gelu(x: Array) -> Array:
    """Exact GELU; the normal distribution's tail as Abramowitz and Stegun 7.1.26 (to 1e-7)."""
    u = jnp.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * u)
    poly: Array | float = 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = poly * t + coefficient
    tail = 0.5 * poly * t * jnp.exp(-u * u)
    return x * jnp.where(x > 0, 1 - tail, tail)


def _kernel(
    x_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    w1_ref: Any,
    b1_ref: Any,
    w2_ref: Any,
    b2_ref: Any,
    out_ref: Any,
    *,
    block: int,
    tile: int,
    epsilon: float,
) -> None:
    length, channels = x_ref.shape
    hidden = w1_ref.shape[1]
    rows = tiles.span(pl.program_id(0) * block, block, length)
    columns = tiles.span(0, tiles.padded(channels), channels)
    x = tiles.load(x_ref, rows, columns)
    normed = tiles.layer_norm(x, scale_ref, bias_ref, columns, epsilon)

    def body(i: Array, acc: Array) -> Array:
        part = tiles.span(i * tile, tile, hidden)
        h = tiles.dot(normed, tiles.load(w1_ref, columns, part))
        h = gelu(h + tiles.load(b1_ref, part)[None, :])
        return acc + tiles.dot(h.astype(x.dtype), tiles.load(w2_ref, part, columns))

    acc = jnp.zeros((block, columns[0].size), f32)
    y = jax.lax.fori_loop(0, pl.cdiv(hidden, tile), body, acc)
    y = y + tiles.load(b2_ref, columns)[None, :]
    tiles.store(out_ref, x.astype(f32) + y, rows, columns)


def mlp(x: Array, branch_scale: None, params: MLPParams, *, epsilon: float) -> Array:
    """See `vssd_jax.kernels.mlp.api.mlp`."""
    rows = x.reshape(-1, x.shape[-1])
    block = 128 if x.shape[-1] <= 128 else 64
    params = params._replace(w1=params.w1.astype(x.dtype), w2=params.w2.astype(x.dtype))
    y = tiles.call(
        functools.partial(_kernel, block=block, tile=32, epsilon=epsilon),
        "mlp",
        (pl.cdiv(rows.shape[0], block),),
        jax.ShapeDtypeStruct(rows.shape, x.dtype),
        (rows, *params),
        num_warps=8,
    )
    return y.reshape(x.shape)
