"""Self-attention over few tokens as Pallas kernels for NVIDIA GPUs (Triton backend).

One program holds one head of one image: at 224 pixels the last stage has 49 tokens, too few for
the tiles of a general attention kernel. q, k and v are read where the projection leaves them, so
that nothing is transposed; the backward pass computes the weights again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

f32 = jnp.float32
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
MAX_LENGTH = 128
MAX_HEAD_DIM = 64


def supports(qkv: jax.Array, *, heads: int) -> str | None:
    """Why this argument is out of reach, or None."""
    _, length, width = qkv.shape
    head_dim = width // (3 * heads)
    if qkv.dtype not in DTYPES:
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


def _padded(size):
    return max(16, pl.next_power_of_2(size))


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == f32 else None
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=f32)


def _place(part, length, width, heads):
    """Indices and mask of q, k or v (`part` 0, 1, 2) in the program's head and image."""
    head, batch = pl.program_id(0), pl.program_id(1)
    head_dim = width // heads
    token = jnp.arange(_padded(length))[:, None]
    p = jnp.arange(_padded(head_dim))[None, :]
    index = (batch, token, part * width + head * head_dim + p)
    return index, jnp.broadcast_to((token < length) & (p < head_dim), (token.size, p.size))


def _load(ref, part, *sizes):
    index, mask = _place(part, *sizes)
    return plgpu.load(ref.at[index], mask=mask, other=0.0)


def _store(ref, value, part, *sizes):
    index, mask = _place(part, *sizes)
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _weights(q, k, length, scale):
    valid = (jnp.arange(k.shape[0]) < length)[None, :]
    scores = jnp.where(valid, _dot(q, k.T) * scale, -jnp.inf)
    exp = jnp.exp(scores - jnp.max(scores, axis=1)[:, None])
    return exp / jnp.sum(exp, axis=1)[:, None]


def _forward_kernel(qkv_ref, out_ref, *, sizes):
    length, width, heads = sizes
    q, k, v = (_load(qkv_ref, part, *sizes) for part in range(3))
    weights = _weights(q, k, length, (width // heads) ** -0.5)
    _store(out_ref, _dot(weights.astype(v.dtype), v), 0, *sizes)


def _backward_kernel(qkv_ref, dout_ref, dqkv_ref, *, sizes):
    length, width, heads = sizes
    scale = (width // heads) ** -0.5
    q, k, v = (_load(qkv_ref, part, *sizes) for part in range(3))
    dout = _load(dout_ref, 0, *sizes)
    weights = _weights(q, k, length, scale)
    _store(dqkv_ref, _dot(weights.astype(v.dtype).T, dout), 2, *sizes)
    dweights = _dot(dout, v.T)
    dscores = weights * (dweights - jnp.sum(weights * dweights, axis=1)[:, None]) * scale
    dscores = dscores.astype(q.dtype)
    _store(dqkv_ref, _dot(dscores, k), 0, *sizes)
    _store(dqkv_ref, _dot(dscores.T, q), 1, *sizes)


def _call(kernel, name, args, width, heads, interpret):
    batch, length, _ = args[0].shape
    sizes = (length, args[0].shape[-1] // 3, heads)
    params = plgpu.CompilerParams(num_warps=4 if length <= 64 else 8, num_stages=1)
    return pl.pallas_call(
        functools.partial(kernel, sizes=sizes),
        grid=(heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, length, width), args[0].dtype),
        compiler_params=None if interpret else params,
        interpret=interpret,
        name=name,
    )(*args)


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
