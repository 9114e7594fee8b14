"""The MLP branch as one Pallas kernel for NVIDIA GPUs (Triton backend), for inference.

A program holds a block of tokens from the first read to the last write: LayerNorm, then for one
tile of the hidden layer after the other the product, GELU and the product back. The hidden layer,
four times as wide as the tokens, is never written.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from vssd_jax.kernels import tiles
from vssd_jax.kernels.tiles import f32

# Beyond, the weights that every block of tokens reads from the cache are more than is saved.
MAX_CHANNELS = 256


def supports(x, branch_weights) -> str | None:
    """Why these arguments are out of reach, or None."""
    if branch_weights is not None:
        return "stochastic depth (the kernel is for inference)"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {x.dtype} (it knows bfloat16 and float16)"
    if x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels (at most {MAX_CHANNELS})"
    if x.size >= 2**31:
        return f"{x.size} elements (below 2^31)"
    return None


def _gelu(x):
    """Exact GELU; the normal distribution's tail as Abramowitz and Stegun 7.1.26 (to 1e-7)."""
    u = jnp.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * u)
    poly = 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = poly * t + coefficient
    tail = 0.5 * poly * t * jnp.exp(-u * u)
    return x * jnp.where(x > 0, 1 - tail, tail)


def _kernel(
    x_ref, scale_ref, bias_ref, w1_ref, b1_ref, w2_ref, b2_ref, out_ref, *, block, tile, epsilon
):
    length, channels = x_ref.shape
    hidden = w1_ref.shape[1]
    rows = tiles.span(pl.program_id(0) * block, block, length)
    columns = tiles.span(0, tiles.padded(channels), channels)
    x = tiles.load(x_ref, rows, columns)
    normed = tiles.layer_norm(x, scale_ref, bias_ref, columns, epsilon)

    def body(i, acc):
        part = tiles.span(i * tile, tile, hidden)
        h = tiles.dot(normed, tiles.load(w1_ref, columns, part))
        h = _gelu(h + tiles.load(b1_ref, part)[None, :])
        return acc + tiles.dot(h.astype(x.dtype), tiles.load(w2_ref, part, columns))

    acc = jnp.zeros((block, columns[0].size), f32)
    y = jax.lax.fori_loop(0, pl.cdiv(hidden, tile), body, acc)
    y = y + tiles.load(b2_ref, columns)[None, :]
    tiles.store(out_ref, x.astype(f32) + y, rows, columns)


def mlp(x, scale, bias, w1, b1, w2, b2, *, epsilon, interpret=False):
    """See `vssd_jax.kernels.mlp.api.mlp`. `interpret` runs the kernel on a CPU."""
    rows = x.reshape(-1, x.shape[-1])
    block = 128 if x.shape[-1] <= 128 else 64
    w1, w2 = (w.astype(x.dtype) for w in (w1, w2))
    y = tiles.call(
        functools.partial(_kernel, block=block, tile=32, epsilon=epsilon),
        "mlp",
        (pl.cdiv(rows.shape[0], block),),
        jax.ShapeDtypeStruct(rows.shape, x.dtype),
        (rows, scale, bias, w1, b1, w2, b2),
        interpret=interpret,
        num_warps=8,
    )
    return y.reshape(x.shape)
