"""Self-attention over few tokens as Pallas kernels for NVIDIA GPUs (Triton backend).

One program holds one head of one image: at 224 pixels the last stage has 49 tokens, too few for
the tiles of a general attention kernel. q, k and v are read where the projection leaves them, so
that nothing is transposed; the backward pass computes the weights again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from vssd_jax.kernels import tiles

MAX_LENGTH = 128
MAX_HEAD_DIM = 64


def supports(qkv: jax.Array, *, heads: int) -> str | None:
    """Why this argument is out of reach, or None."""
    _, length, width = qkv.shape
    head_dim = width // (3 * heads)
    if qkv.dtype not in tiles.DTYPES:
        return f"dtype {qkv.dtype} (it knows float32, bfloat16 and float16)"
    if length > MAX_LENGTH or head_dim > MAX_HEAD_DIM:
        return (
            f"{length} tokens with heads of {head_dim} "
            f"(at most {MAX_LENGTH} tokens and {MAX_HEAD_DIM})"
        )
    if qkv.size >= 2**31:
        return f"{qkv.size} elements (below 2^31)"
    return None


def attention(qkv: jax.Array, *, heads: int, interpret: bool = False) -> jax.Array:
    """See `vssd_jax.kernels.attention.api.attention`. `interpret` runs the kernels on a CPU."""
    return _attention(qkv, heads, interpret)


def _place(part, length, width, heads):
    """Where q, k or v (`part` 0, 1, 2) lies for the program's head and image."""
    head, batch = pl.program_id(0), pl.program_id(1)
    head_dim = width // heads
    p, valid = tiles.span(0, tiles.padded(head_dim), head_dim)
    columns = part * width + head * head_dim + p, valid
    return batch, tiles.span(0, tiles.padded(length), length), columns


def _load(ref, part, *sizes):
    return tiles.load(ref, *_place(part, *sizes))


def _store(ref, value, part, *sizes):
    tiles.store(ref, value, *_place(part, *sizes))


def _weights(q, k, length, scale):
    valid = (jnp.arange(k.shape[0]) < length)[None, :]
    scores = jnp.where(valid, tiles.dot(q, k.T) * scale, -jnp.inf)
    exp = jnp.exp(scores - jnp.max(scores, axis=1)[:, None])
    return exp / jnp.sum(exp, axis=1)[:, None]


def _forward_kernel(qkv_ref, out_ref, *, sizes):
    length, width, heads = sizes
    q, k, v = (_load(qkv_ref, part, *sizes) for part in range(3))
    weights = _weights(q, k, length, (width // heads) ** -0.5)
    _store(out_ref, tiles.dot(weights.astype(v.dtype), v), 0, *sizes)


def _backward_kernel(qkv_ref, dout_ref, dqkv_ref, *, sizes):
    length, width, heads = sizes
    scale = (width // heads) ** -0.5
    q, k, v = (_load(qkv_ref, part, *sizes) for part in range(3))
    dout = _load(dout_ref, 0, *sizes)
    weights = _weights(q, k, length, scale)
    _store(dqkv_ref, tiles.dot(weights.astype(v.dtype).T, dout), 2, *sizes)
    dweights = tiles.dot(dout, v.T)
    dscores = weights * (dweights - jnp.sum(weights * dweights, axis=1)[:, None]) * scale
    dscores = dscores.astype(q.dtype)
    _store(dqkv_ref, tiles.dot(dscores, k), 0, *sizes)
    _store(dqkv_ref, tiles.dot(dscores.T, q), 1, *sizes)


def _call(kernel, name, args, width, heads, interpret):
    batch, length, _ = args[0].shape
    sizes = (length, args[0].shape[-1] // 3, heads)
    return tiles.call(
        functools.partial(kernel, sizes=sizes),
        name,
        (heads, batch),
        jax.ShapeDtypeStruct((batch, length, width), args[0].dtype),
        args,
        interpret=interpret,
        num_warps=4 if length <= 64 else 8,
        num_stages=1,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(qkv, heads, interpret):
    width = qkv.shape[-1] // 3
    return _call(_forward_kernel, "attention", (qkv,), width, heads, interpret)


def _attention_forward(qkv, heads, interpret):
    return _attention(qkv, heads, interpret), qkv


def _attention_backward(heads, interpret, qkv, dout):
    name, width = "attention_gradient", qkv.shape[-1]
    return (_call(_backward_kernel, name, (qkv, dout), width, heads, interpret),)


_attention.defvjp(_attention_forward, _attention_backward)
