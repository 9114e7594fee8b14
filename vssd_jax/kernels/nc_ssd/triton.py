# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of its kernels: their pointers have none.)
"""NC-SSD as hand-written Triton kernels, called through jax-triton.

A second implementation for NVIDIA GPUs, in case Pallas loses its Triton backend. It divides the
work as `pallas.py` does. It needs `jax-triton`, which imports only where JAX's CUDA plugin is
installed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jax import Array

from vssd_jax.kernels import dispatch, mesh
from vssd_jax.kernels.layer_norm import layer_norm

TOKENS = 32
GRADIENT_WARPS = 8  # four would spill registers


def supports(
    xbc: Array, token_weights: Array, inner: int, groups: int, **_: Any
) -> str | None:
    """Why these arguments are out of reach, or None."""
    state, head_dim = (xbc.shape[-1] - inner) // (2 * groups), inner // token_weights.shape[-1]
    if _padded(state) * _padded(head_dim) > 128 * 128:
        return f"a state of {state} x {head_dim} (at most 128 x 128)"
    dtypes = (jnp.float32, jnp.bfloat16, jnp.float16)
    return dispatch.wrong_dtype(xbc, *dtypes) or mesh.too_large(xbc)


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


# --- Kernels: x|B|C has rows of WIDTH = HEADS * P + 2 * GROUPS * N --------------------------------


@triton.jit
def partial_state_kernel(
    x_ptr, xbc_ptr, w_ptr, out_ptr,
    L: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, X_WIDTH: tl.constexpr, GRADIENT: tl.constexpr,
    TOKENS: tl.constexpr, NP: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """B^T (w * x) over a chunk of tokens; or with GRADIENT, where x is dy, C^T x."""
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = HEADS * P + 2 * GROUPS * N
    n, p = tl.arange(0, NP), tl.arange(0, PP)
    column = HEADS * P + (GROUPS * N if GRADIENT else 0) + (head % GROUPS) * N + n
    acc = tl.zeros((NP, PP), tl.float32)
    for start in range(0, CHUNK, TOKENS):
        token = chunk * CHUNK + start + tl.arange(0, TOKENS)
        row, valid = batch * L + token, token < L
        x = tl.load(
            x_ptr + row[:, None] * X_WIDTH + head * P + p[None, :],
            mask=valid[:, None] & (p < P)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            xbc_ptr + row[None, :] * width + column[:, None],
            mask=(n < N)[:, None] & valid[None, :], other=0.0,
        )  # fmt: skip
        if not GRADIENT:
            w = tl.load(w_ptr + row * HEADS + head, mask=valid, other=0.0)
            x = (x.to(tl.float32) * w[:, None]).to(x.dtype)
        acc += tl.dot(b, x, input_precision="ieee")
    out = ((batch * tl.num_programs(1) + chunk) * HEADS + head) * N * P
    mask = (n < N)[:, None] & (p < P)[None, :]
    tl.store(out_ptr + out + n[:, None] * P + p[None, :], acc, mask=mask)


@triton.jit
def output_kernel(
    xbc_ptr, d_ptr, state_ptr, y_ptr,
    L: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr,
    TOKENS: tl.constexpr, NP: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """C state + D x for a block of tokens and a head."""
    head, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = HEADS * P + 2 * GROUPS * N
    n, p = tl.arange(0, NP), tl.arange(0, PP)
    token = block * TOKENS + tl.arange(0, TOKENS)
    row, valid = batch * L + token, token < L
    mask = valid[:, None] & (p < P)[None, :]
    x = tl.load(xbc_ptr + row[:, None] * width + head * P + p[None, :], mask=mask, other=0.0)
    column = HEADS * P + GROUPS * N + (head % GROUPS) * N + n
    c = tl.load(
        xbc_ptr + row[:, None] * width + column[None, :],
        mask=valid[:, None] & (n < N)[None, :], other=0.0,
    )  # fmt: skip
    state = tl.load(
        state_ptr + (batch * HEADS + head) * N * P + n[:, None] * P + p[None, :],
        mask=(n < N)[:, None] & (p < P)[None, :], other=0.0,
    )  # fmt: skip
    d = tl.load(d_ptr + head).to(tl.float32)
    y = tl.dot(c, state, input_precision="ieee") + d * x.to(tl.float32)
    tl.store(y_ptr + row[:, None] * (HEADS * P) + head * P + p[None, :], y, mask=mask)


@triton.jit
def gradient_kernel(
    xbc_ptr, w_ptr, d_ptr, state_ptr, dstate_ptr, dy_ptr, dxbc_ptr, dw_ptr, dd_ptr,
    L: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr,
    TOKENS: tl.constexpr, NP: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """All gradients but the state's for a block of tokens and the heads of one group."""
    block, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = HEADS * P + 2 * GROUPS * N
    n, p = tl.arange(0, NP), tl.arange(0, PP)
    token = block * TOKENS + tl.arange(0, TOKENS)
    row, valid = batch * L + token, token < L
    states = row[:, None] * width + HEADS * P + group * N + n[None, :]
    state_mask = valid[:, None] & (n < N)[None, :]
    mask = valid[:, None] & (p < P)[None, :]
    b = tl.load(xbc_ptr + states, mask=state_mask, other=0.0)
    db = tl.zeros((TOKENS, NP), tl.float32)
    dc = tl.zeros((TOKENS, NP), tl.float32)
    for i in range(0, HEADS // GROUPS):
        head = i * GROUPS + group
        columns = row[:, None] * width + head * P + p[None, :]
        x = tl.load(xbc_ptr + columns, mask=mask, other=0.0)
        dy = tl.load(
            dy_ptr + row[:, None] * (HEADS * P) + head * P + p[None, :], mask=mask, other=0.0
        )
        tile = (batch * HEADS + head) * N * P + n[:, None] * P + p[None, :]
        tile_mask = (n < N)[:, None] & (p < P)[None, :]
        state = tl.load(state_ptr + tile, mask=tile_mask, other=0.0)
        dstate = tl.load(dstate_ptr + tile, mask=tile_mask, other=0.0)
        w = tl.load(w_ptr + row * HEADS + head, mask=valid, other=0.0)
        d = tl.load(d_ptr + head).to(tl.float32)
        wide_x, wide_dy = x.to(tl.float32), dy.to(tl.float32)
        dweighted = tl.dot(b, dstate, input_precision="ieee")
        tl.store(dxbc_ptr + columns, w[:, None] * dweighted + d * wide_dy, mask=mask)
        tl.store(dw_ptr + row * HEADS + head, tl.sum(wide_x * dweighted, axis=1), mask=valid)
        dd = tl.sum(tl.sum(wide_x * wide_dy, axis=1), axis=0)
        tl.store(dd_ptr + (batch * tl.num_programs(0) + block) * HEADS + head, dd)
        weighted = (w[:, None] * wide_x).to(x.dtype)
        db += tl.dot(weighted, tl.trans(dstate), input_precision="ieee")
        dc += tl.dot(dy, tl.trans(state), input_precision="ieee")
    tl.store(dxbc_ptr + states, db, mask=state_mask)
    tl.store(dxbc_ptr + states + GROUPS * N, dc, mask=state_mask)


# --- Calls ------------------------------------------------------------------------------------


def _sizes(xbc: Array, heads: int, inner: int, groups: int) -> dict[str, int]:
    state, head_dim = (xbc.shape[-1] - inner) // (2 * groups), inner // heads
    return {
        "L": xbc.shape[1],
        "HEADS": heads,
        "GROUPS": groups,
        "N": state,
        "P": head_dim,
        "TOKENS": TOKENS,
        "NP": _padded(state),
        "PP": _padded(head_dim),
    }


def _blocks(length: int) -> int:
    return -(-length // TOKENS)


def _call(
    kernel: Any,
    args: tuple[Array, ...],
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int = 4,
    **sizes: int,
) -> Any:
    return jax_triton.triton_call(
        *args, kernel=kernel, grid=grid, out_shape=out_shape, num_warps=num_warps, **sizes
    )


def _states(
    x: Array, xbc: Array, token_weights: Array, sizes: dict[str, int], *, gradient: bool
) -> Array:
    batch, length = xbc.shape[:2]
    blocks = _blocks(length)
    chunk = -(-blocks // max(1, min(8, length // 384)))  # in blocks, as in pallas.py
    chunks = -(-blocks // chunk)
    shape = (batch, chunks, sizes["HEADS"], sizes["N"], sizes["P"])
    parts = _call(
        partial_state_kernel,
        (x, xbc, token_weights),
        (sizes["HEADS"], chunks, batch),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        CHUNK=chunk * TOKENS,
        X_WIDTH=x.shape[-1],
        GRADIENT=gradient,
        **sizes,
    )
    return parts.sum(1).astype(xbc.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def nc_ssd(xbc: Array, token_weights: Array, d: Array, inner: int, groups: int) -> Array:
    """See `vssd_jax.kernels.nc_ssd.api.nc_ssd`."""
    return _forward(xbc, token_weights, d, inner, groups)[0]


def _forward(
    xbc: Array, token_weights: Array, d: Array, inner: int, groups: int
) -> tuple[Array, tuple[Array, ...]]:
    sizes = _sizes(xbc, token_weights.shape[-1], inner, groups)
    batch, length = xbc.shape[:2]
    state = _states(xbc, xbc, token_weights, sizes, gradient=False)
    y = _call(
        output_kernel,
        (xbc, d, state),
        (sizes["HEADS"], _blocks(length), batch),
        jax.ShapeDtypeStruct((batch, length, inner), xbc.dtype),
        **sizes,
    )
    return y, (xbc, token_weights, d, state)


def _backward(
    inner: int, groups: int, saved: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    xbc, token_weights, d, state = saved
    sizes = _sizes(xbc, token_weights.shape[-1], inner, groups)
    batch, length = xbc.shape[:2]
    dstate = _states(dy, xbc, token_weights, sizes, gradient=True)
    blocks = _blocks(length)
    dxbc, dw, dd = _call(
        gradient_kernel,
        (xbc, token_weights, d, state, dstate, dy),
        (blocks, groups, batch),
        (
            jax.ShapeDtypeStruct(xbc.shape, xbc.dtype),
            jax.ShapeDtypeStruct(token_weights.shape, jnp.float32),
            jax.ShapeDtypeStruct((batch, blocks, sizes["HEADS"]), jnp.float32),
        ),
        num_warps=GRADIENT_WARPS,
        **sizes,
    )
    return dxbc, dw.astype(token_weights.dtype), dd.sum((0, 1)).astype(d.dtype)


nc_ssd.defvjp(_forward, _backward)


def nc_ssd_gated(
    xbc: Array,
    token_weights: Array,
    d: Array,
    z: Array,
    scale: Array,
    bias: Array,
    *,
    inner: int,
    groups: int,
    epsilon: float,
    silu: bool = False,
) -> Array:
    """See `vssd_jax.kernels.nc_ssd.api.nc_ssd_gated`; SiLU, norm and gate are left to XLA."""
    xbc = jax.nn.silu(xbc) if silu else xbc
    y = nc_ssd(xbc, token_weights, d, inner, groups)
    return layer_norm(y, scale, bias, z, epsilon, implementation="xla")
