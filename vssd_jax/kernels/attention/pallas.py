"""Self-attention over few tokens as Pallas kernels for NVIDIA GPUs (Triton backend).

One program holds one head of one image: at 224 pixels the last stage has 49 tokens, too few for
the tiles of a general attention kernel. q, k and v are read where the projection has written them,
so that nothing is transposed; the backward pass computes the softmax again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import dispatch, mesh, tiles
from vssd_jax.kernels.attention.api import FEW_TOKENS

MAX_HEAD_DIM = 64


def supports(qkv: Array, heads: int) -> str | None:
    """Why these arguments are out of reach, or None."""
    _, length, width = qkv.shape
    head_dim = width // (3 * heads)
    if length > FEW_TOKENS or head_dim > MAX_HEAD_DIM:
        return (
            f"{length} tokens with heads of {head_dim} "
            f"(at most {FEW_TOKENS} tokens and {MAX_HEAD_DIM})"
        )
    return dispatch.wrong_dtype(qkv, *tiles.DTYPES) or mesh.too_large(qkv)


def attention(qkv: Array, *, heads: int) -> Array:
    """See `vssd_jax.kernels.attention.api.attention`."""
    return _attention(qkv, heads)


def _place(part: int, length: int, width: int, heads: int) -> tuple:
    """The indices of q, k or v (`part` 0, 1, 2) of the program's head and image."""
    head, batch = pl.program_id(0), pl.program_id(1)
    head_dim = width // heads
    p, valid = tiles.span(0, tiles.padded(head_dim), head_dim)
    columns = part * width + head * head_dim + p, valid
    return batch, tiles.span(0, tiles.padded(length), length), columns


def _load(ref: Any, part: int, *sizes: int) -> Array:
    return tiles.load(ref, *_place(part, *sizes))


def _store(ref: Any, value: Array, part: int, *sizes: int) -> None:
    tiles.store(ref, value, *_place(part, *sizes))


def _probabilities(q: Array, k: Array, length: int, scale: float) -> Array:
    valid = (jnp.arange(k.shape[0]) < length)[None, :]
    scores = jnp.where(valid, tiles.dot(q, k.T) * scale, -jnp.inf)
    exp = jnp.exp(scores - jnp.max(scores, axis=1)[:, None])
    return exp / jnp.sum(exp, axis=1)[:, None]


def _forward_kernel(qkv_ref: Any, out_ref: Any, *, sizes: tuple[int, int, int]) -> None:
    length, width, heads = sizes
    q, k, v = (_load(qkv_ref, part, *sizes) for part in range(3))
    probabilities = _probabilities(q, k, length, (width // heads) ** -0.5)
    _store(out_ref, tiles.dot(probabilities.astype(v.dtype), v), 0, *sizes)


def _backward_kernel(
    qkv_ref: Any, dout_ref: Any, dqkv_ref: Any, *, sizes: tuple[int, int, int]
) -> None:
    length, width, heads = sizes
    scale = (width // heads) ** -0.5
    q, k, v = (_load(qkv_ref, part, *sizes) for part in range(3))
    dout = _load(dout_ref, 0, *sizes)
    probabilities = _probabilities(q, k, length, scale)
    _store(dqkv_ref, tiles.dot(probabilities.astype(v.dtype).T, dout), 2, *sizes)
    dprobabilities = tiles.dot(dout, v.T)
    mean = jnp.sum(probabilities * dprobabilities, axis=1)[:, None]
    dscores = (probabilities * (dprobabilities - mean) * scale).astype(q.dtype)
    _store(dqkv_ref, tiles.dot(dscores, k), 0, *sizes)
    _store(dqkv_ref, tiles.dot(dscores.T, q), 1, *sizes)


def _call(
    kernel: Callable, name: str, args: tuple[Array, ...], width: int, heads: int
) -> Array:
    batch, length, _ = args[0].shape
    sizes = (length, args[0].shape[-1] // 3, heads)
    return tiles.call(
        functools.partial(kernel, sizes=sizes),
        name,
        (heads, batch),
        jax.ShapeDtypeStruct((batch, length, width), args[0].dtype),
        args,
        num_warps=4 if length <= 64 else 8,
        num_stages=1,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attention(qkv: Array, heads: int) -> Array:
    return _call(_forward_kernel, "attention", (qkv,), qkv.shape[-1] // 3, heads)


def _attention_forward(qkv: Array, heads: int) -> tuple[Array, Array]:
    return _attention(qkv, heads), qkv


def _attention_backward(heads: int, qkv: Array, dout: Array) -> tuple[Array]:
    name, width = "attention_gradient", qkv.shape[-1]
    return (_call(_backward_kernel, name, (qkv, dout), width, heads),)


_attention.defvjp(_attention_forward, _attention_backward)
