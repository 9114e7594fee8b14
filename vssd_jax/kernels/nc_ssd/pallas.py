"""NC-SSD as Pallas kernels for NVIDIA GPUs (Triton backend).

Forward: partial states of chunks of tokens, `B^T (m * x)`; their sum; then `C state + D x`, which
`nc_ssd_gated` does in the same kernel as the LayerNorm over all heads and the gate. Backward: the
partial gradients of the state, `C^T dy`, by a similar kernel; their sum; then all other gradients
in one kernel. Programs share nothing but their inputs, so that results repeat bit for bit; a last
kernel adds up their sums.

No array is copied or transposed: x, B and C are read from the columns of xbc, as the convolution
writes them, with `silu=True` before its SiLU. Masks cover the elements beyond L, N and P.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import dispatch, mesh, tiles
from vssd_jax.kernels.layer_norm import pallas as layer_norm
from vssd_jax.kernels.tiles import Span, f32

SILU_ON_LOAD = True  # see `vssd_jax.kernels.nc_ssd.api.applies_silu_on_load`


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a call, and how its kernels divide the work."""

    length: int
    heads: int
    groups: int
    state: int
    head_dim: int
    tokens: int  # of one step of a kernel
    warps: int
    silu: bool  # whether x, B and C go through SiLU after loading

    @classmethod
    def of(
        cls, xbc: Array, token_weights: Array, inner: int, groups: int, silu: bool = False
    ) -> "Sizes":
        """For xbc (B, ..., width) and token_weights (B, ..., heads)."""
        _, *tokens_axes, width = xbc.shape
        heads = token_weights.shape[-1]
        state, head_dim = (width - inner) // (2 * groups), inner // heads
        # Matrix units want 16 tokens at least; more than these would spill registers. Float32
        # takes more of them: matrix units have no exact products for it.
        tokens, warps = 64 if max(tiles.padded(state), tiles.padded(head_dim)) <= 64 else 32, 4
        if xbc.dtype == f32:
            tokens, warps = tokens // 2, 8
        length = math.prod(tokens_axes)
        return cls(length, heads, groups, state, head_dim, tokens, warps, silu)

    def halved(self) -> "Sizes":
        """With half as many tokens in a step, for a kernel that holds more arrays in registers."""
        return dataclasses.replace(self, tokens=max(16, self.tokens // 2))

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def chunk(self) -> int:
        """Tokens of one partial state: enough programs for the GPU, few partial states."""
        return self.tokens * pl.cdiv(pl.cdiv(self.length, self.tokens), self.chunks)

    @property
    def chunks(self) -> int:
        return max(1, min(8, self.length // 384))

    @property
    def padded_state(self) -> int:
        return tiles.padded(self.state)

    @property
    def padded_head_dim(self) -> int:
        return tiles.padded(self.head_dim)

    def state_axes(self) -> tuple[Span, Span]:
        """The rows and columns of a head's state."""
        return (
            tiles.span(0, self.padded_state, self.state),
            tiles.span(0, self.padded_head_dim, self.head_dim),
        )

    def x_columns(self, head: Array) -> Span:
        """The columns of x of a head."""
        _, (p, valid) = self.state_axes()
        return head * self.head_dim + p, valid

    def b_columns(self, head: Array | int) -> Span:
        """The columns of B of the group of a head."""
        (n, valid), _ = self.state_axes()
        # Not `%`: Triton's lowering does not cover the sign of Python's remainder.
        group = jax.lax.rem(jnp.int32(head), jnp.int32(self.groups))
        return self.inner + group * self.state + n, valid

    def c_columns(self, head: Array | int) -> Span:
        """The columns of C of the group of a head."""
        columns, valid = self.b_columns(head)
        return columns + self.groups * self.state, valid


def supports(
    xbc: Array, token_weights: Array, inner: int, groups: int, **_: Any
) -> str | None:
    """Why these arguments are out of reach, or None."""
    sizes = Sizes.of(xbc, token_weights, inner, groups)
    if sizes.padded_state * sizes.padded_head_dim > 128 * 128:
        return f"a state of {sizes.state} x {sizes.head_dim} (at most 128 x 128)"
    if inner > layer_norm.MAX_CHANNELS:
        return f"{inner} channels (at most {layer_norm.MAX_CHANNELS})"
    return dispatch.wrong_dtype(xbc, *tiles.DTYPES) or mesh.too_large(xbc)


# --- Inside the kernels -----------------------------------------------------------------------


def _tokens(sizes: Sizes, block: Array | int) -> Span:
    return tiles.span(block * sizes.tokens, sizes.tokens, sizes.length)


def _load_xbc(ref: Any, sizes: Sizes, *place: Array | Span) -> Array:
    values = tiles.load(ref, *place)
    return jax.nn.silu(values.astype(f32)).astype(values.dtype) if sizes.silu else values


def _before_silu(gradient: Array, ref: Any, sizes: Sizes, *place: Array | Span) -> Array:
    """From the gradient of the result of `_load_xbc`, the gradient of the array itself."""
    if not sizes.silu:
        return gradient
    values = tiles.load(ref, *place).astype(f32)
    sigmoid = jax.nn.sigmoid(values)
    return gradient * (sigmoid * (1 + values * (1 - sigmoid)))


def _state_kernel(xbc_ref: Any, w_ref: Any, out_ref: Any, *, sizes: Sizes) -> None:
    """B^T (w * x) over a chunk of tokens."""
    head, batch = pl.program_id(0), pl.program_id(2)
    x_columns, b_columns = sizes.x_columns(head), sizes.b_columns(head)

    def product(rows: Span) -> Array:
        x = _load_xbc(xbc_ref, sizes, batch, rows, x_columns)
        b = _load_xbc(xbc_ref, sizes, batch, rows, b_columns)
        w = tiles.load(w_ref, batch, rows, head)
        return tiles.dot(b.T, (x.astype(f32) * w[:, None]).astype(x.dtype))

    _sum_over_chunk(product, out_ref, sizes)


def _state_gradient_kernel(dy_ref: Any, xbc_ref: Any, out_ref: Any, *, sizes: Sizes) -> None:
    """C^T dy over a chunk of tokens."""
    head, batch = pl.program_id(0), pl.program_id(2)
    x_columns, c_columns = sizes.x_columns(head), sizes.c_columns(head)

    def product(rows: Span) -> Array:
        dy = tiles.load(dy_ref, batch, rows, x_columns)
        c = _load_xbc(xbc_ref, sizes, batch, rows, c_columns)
        return tiles.dot(c.T, dy)

    _sum_over_chunk(product, out_ref, sizes)


def _sum_over_chunk(product: Callable[[Span], Array], out_ref: Any, sizes: Sizes) -> None:
    """Stores the sum of `product(tokens)` over the steps of the program's chunk."""
    head, chunk, batch = (pl.program_id(axis) for axis in range(3))
    steps = sizes.chunk // sizes.tokens

    def body(i: Array, acc: Array) -> Array:
        return acc + product(_tokens(sizes, chunk * steps + i))

    shape = (sizes.padded_state, sizes.padded_head_dim)
    state = jax.lax.fori_loop(0, steps, body, jnp.zeros(shape, f32))
    tiles.store(out_ref, state, batch, chunk, head, *sizes.state_axes())


def load_state(ref: Any, sizes: Sizes, batch: Array, head: Array) -> Array:
    """The state of a head (N, P)."""
    return tiles.load(ref, batch, head, *sizes.state_axes())


def _head_output(
    xbc_ref: Any, d_ref: Any, state_ref: Any, sizes: Sizes, batch: Array, rows: Span, head: Array
) -> Array:
    x = _load_xbc(xbc_ref, sizes, batch, rows, sizes.x_columns(head))
    c = _load_xbc(xbc_ref, sizes, batch, rows, sizes.c_columns(head))
    state = load_state(state_ref, sizes, batch, head)
    return tiles.dot(c, state) + d_ref[head].astype(f32) * x.astype(f32)


def _output_kernel(
    xbc_ref: Any, d_ref: Any, state_ref: Any, y_ref: Any, *, sizes: Sizes
) -> None:
    head, block, batch = (pl.program_id(axis) for axis in range(3))
    rows = _tokens(sizes, block)
    y = _head_output(xbc_ref, d_ref, state_ref, sizes, batch, rows, head)
    tiles.store(y_ref, y, batch, rows, sizes.x_columns(head))


def _gated_output_kernel(
    xbc_ref: Any,
    d_ref: Any,
    state_ref: Any,
    z_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    out_ref: Any,
    *,
    sizes: Sizes,
    epsilon: float,
) -> None:
    block, batch = pl.program_id(0), pl.program_id(1)
    rows = _tokens(sizes, block)

    def head_output(head: Array) -> Array:
        y = _head_output(xbc_ref, d_ref, state_ref, sizes, batch, rows, head)
        return y.astype(out_ref.dtype)

    def write(head: Array, normed: Array, _: None) -> None:
        columns = sizes.x_columns(head)
        z = tiles.load(z_ref, batch, rows, columns).astype(f32)
        tiles.store(out_ref, normed.astype(out_ref.dtype) * z, batch, rows, columns)

    fold_normed(write, None, head_output, scale_ref, bias_ref, sizes, rows[0].size, epsilon)


def fold_normed(
    f: Callable[[Array, Array, Any], Any],
    carry: Any,
    head_output: Callable[[Array], Array],
    scale_ref: Any,
    bias_ref: Any,
    sizes: Sizes,
    tokens: int,
    epsilon: float,
) -> Any:
    """`carry = f(head, normed, carry)` for each head; `normed` is the LayerNorm over all heads.

    All heads together do not fit into the registers: each is computed twice, first for the moments.
    """

    def moments(head: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        # Two passes within a head, and Chan's formula between heads: no cancellation.
        mean, squares = carry
        y, valid = head_output(head).astype(f32), sizes.x_columns(head)[1][None, :]
        head_mean = jnp.sum(y, axis=1) / sizes.head_dim
        centred = jnp.where(valid, y - head_mean[:, None], 0.0)
        delta = head_mean - mean
        share = 1.0 / (head + 1).astype(f32)
        between = delta * delta * (sizes.head_dim * head.astype(f32) * share)
        return mean + delta * share, squares + jnp.sum(centred * centred, axis=1) + between

    zero = jnp.zeros((tokens,), f32)
    mean, squares = jax.lax.fori_loop(0, sizes.heads, moments, (zero, zero))
    inverse = jax.lax.rsqrt(squares / sizes.inner + epsilon)

    def normed(head: Array, carry: Any) -> Any:
        columns, y = sizes.x_columns(head), head_output(head).astype(f32)
        scale, bias = (
            tiles.load(ref, columns).astype(f32)[None, :] for ref in (scale_ref, bias_ref)
        )
        return f(head, (y - mean[:, None]) * inverse[:, None] * scale + bias, carry)

    return jax.lax.fori_loop(0, sizes.heads, normed, carry)


def _gradient_kernel(
    xbc_ref: Any,
    w_ref: Any,
    d_ref: Any,
    state_ref: Any,
    dstate_ref: Any,
    dy_ref: Any,
    dxbc_ref: Any,
    dw_ref: Any,
    dd_ref: Any,
    *,
    sizes: Sizes,
) -> None:
    """All gradients but the state's for a block of tokens and the heads of one group."""
    block, group, batch = (pl.program_id(axis) for axis in range(3))
    rows = _tokens(sizes, block)
    b_columns, c_columns = sizes.b_columns(group), sizes.c_columns(group)
    b = _load_xbc(xbc_ref, sizes, batch, rows, b_columns)

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        db, dc = carry
        head = i * sizes.groups + group
        columns = sizes.x_columns(head)
        dy = tiles.load(dy_ref, batch, rows, columns)
        dc = dc + tiles.dot(dy, load_state(state_ref, sizes, batch, head).T)
        x = _load_xbc(xbc_ref, sizes, batch, rows, columns)
        dstate = load_state(dstate_ref, sizes, batch, head)
        w, wide_x, wide_dy = tiles.load(w_ref, batch, rows, head), x.astype(f32), dy.astype(f32)
        db = db + tiles.dot((w[:, None] * wide_x).astype(x.dtype), dstate.T)
        dweighted = tiles.dot(b, dstate)
        tiles.store(dw_ref, jnp.sum(wide_x * dweighted, axis=1), batch, rows, head)
        dx = w[:, None] * dweighted + d_ref[head].astype(f32) * wide_dy
        dx = _before_silu(dx, xbc_ref, sizes, batch, rows, columns)
        tiles.store(dxbc_ref, dx, batch, rows, columns)
        dd_ref[batch, block, head] = jnp.sum(jnp.sum(wide_x * wide_dy, axis=1), axis=0)
        return db, dc

    zero = jnp.zeros((sizes.tokens, sizes.padded_state), f32)
    db, dc = jax.lax.fori_loop(0, sizes.heads // sizes.groups, body, (zero, zero))
    for gradient, columns in ((db, b_columns), (dc, c_columns)):
        gradient = _before_silu(gradient, xbc_ref, sizes, batch, rows, columns)
        tiles.store(dxbc_ref, gradient, batch, rows, columns)


# --- Calls ------------------------------------------------------------------------------------


def states(
    kernel: Callable,
    name: str,
    args: tuple[Array, ...],
    sizes: Sizes,
    *,
    dtype: jnp.dtype,
    **options: Any,
) -> Array:
    """Sums over the tokens: (B, heads, N, P) in `dtype`, accumulated in float32."""
    batch, chunks = args[0].shape[0], pl.cdiv(sizes.length, sizes.chunk)
    shape = (batch, chunks, sizes.heads, sizes.state, sizes.head_dim)
    part_dtype = f32 if chunks > 1 else dtype
    # Heads on the first, fastest axis: they read the same B and C at the same time.
    parts = tiles.call(
        functools.partial(kernel, sizes=sizes),
        name,
        (sizes.heads, chunks, batch),
        jax.ShapeDtypeStruct(shape, part_dtype),
        args,
        **{"num_warps": sizes.warps, **options},
    )
    return parts.sum(1).astype(dtype) if chunks > 1 else parts[:, 0]


def _state(xbc: Array, token_weights: Array, sizes: Sizes) -> Array:
    return states(_state_kernel, "nc_ssd_state", (xbc, token_weights), sizes, dtype=xbc.dtype)


def _output(xbc: Array, d: Array, state: Array, sizes: Sizes) -> Array:
    batch, blocks = xbc.shape[0], pl.cdiv(sizes.length, sizes.tokens)
    return tiles.call(
        functools.partial(_output_kernel, sizes=sizes),
        "nc_ssd_output",
        (sizes.heads, blocks, batch),
        jax.ShapeDtypeStruct((batch, sizes.length, sizes.inner), xbc.dtype),
        (xbc, d, state),
        num_warps=sizes.warps,
    )


def _gradients(
    xbc: Array, token_weights: Array, d: Array, state: Array, dy: Array, sizes: Sizes
) -> tuple[Array, Array, Array]:
    """Gradients of xbc, of the token weights, and of d in parts (programs, heads)."""
    dstate = states(
        _state_gradient_kernel, "nc_ssd_state_gradient", (dy, xbc), sizes, dtype=xbc.dtype
    )
    sizes = sizes.halved()
    batch, blocks = xbc.shape[0], pl.cdiv(sizes.length, sizes.tokens)
    dxbc, dw, dd = tiles.call(
        functools.partial(_gradient_kernel, sizes=sizes),
        "nc_ssd_gradient",
        (blocks, sizes.groups, batch),
        (
            jax.ShapeDtypeStruct(xbc.shape, xbc.dtype),
            jax.ShapeDtypeStruct(token_weights.shape, f32),
            jax.ShapeDtypeStruct((batch, blocks, sizes.heads), f32),
        ),
        (xbc, token_weights, d, state, dstate, dy),
        num_warps=8,  # four would spill registers
    )
    return dxbc, dw.astype(token_weights.dtype), dd.reshape(-1, sizes.heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def nc_ssd(xbc: Array, token_weights: Array, d: Array, inner: int, groups: int) -> Array:
    """See `vssd_jax.kernels.nc_ssd.api.nc_ssd`."""
    return _forward(xbc, token_weights, d, inner, groups)[0]


def _forward(
    xbc: Array, token_weights: Array, d: Array, inner: int, groups: int
) -> tuple[Array, tuple[Array, ...]]:
    sizes = Sizes.of(xbc, token_weights, inner, groups)
    state = _state(xbc, token_weights, sizes)
    return _output(xbc, d, state, sizes), (xbc, token_weights, d, state)


def _backward(
    inner: int, groups: int, saved: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    xbc, token_weights, d, state = saved
    sizes = Sizes.of(xbc, token_weights, inner, groups)
    dxbc, dw, parts = _gradients(xbc, token_weights, d, state, dy, sizes)
    (dd,) = tiles.sum_parts(parts)
    return dxbc, dw, dd.astype(d.dtype)


nc_ssd.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def nc_ssd_gated(
    xbc: Array,
    token_weights: Array,
    d: Array,
    z: Array,
    scale: Array,
    bias: Array,
    inner: int,
    groups: int,
    epsilon: float,
    silu: bool = False,
) -> Array:
    """See `vssd_jax.kernels.nc_ssd.api.nc_ssd_gated`."""
    args = (xbc, token_weights, d, z, scale, bias)
    return _gated_forward(*args, inner, groups, epsilon, silu)[0]


def _gated_forward(
    xbc: Array,
    token_weights: Array,
    d: Array,
    z: Array,
    scale: Array,
    bias: Array,
    inner: int,
    groups: int,
    epsilon: float,
    silu: bool,
) -> tuple[Array, tuple[Array, ...]]:
    sizes = Sizes.of(xbc, token_weights, inner, groups, silu)
    state = _state(xbc, token_weights, sizes)
    out = tiles.call(
        functools.partial(_gated_output_kernel, sizes=sizes, epsilon=epsilon),
        "nc_ssd_gated_output",
        (pl.cdiv(sizes.length, sizes.tokens), xbc.shape[0]),
        jax.ShapeDtypeStruct(z.shape, z.dtype),
        (xbc, d, state, z, scale, bias),
        num_warps=sizes.warps,
    )
    return out, (xbc, token_weights, d, z, scale, bias, state)


def _gated_backward(
    inner: int, groups: int, epsilon: float, silu: bool, saved: tuple[Array, ...], dout: Array
) -> tuple[Array | None, ...]:
    xbc, token_weights, d, z, scale, bias, state = saved
    sizes = Sizes.of(xbc, token_weights, inner, groups, silu)
    # Compute y from the state again: one kernel, instead of an array kept from the forward pass.
    y = _output(xbc, d, state, sizes)
    dy, norm_parts, dz = layer_norm.gradients_in_parts(y, dout, z, scale, bias, epsilon)
    dxbc, dw, d_parts = _gradients(xbc, token_weights, d, state, dy, sizes)
    (dscale, dbias), dd = tiles.sum_parts(norm_parts, d_parts)
    return (
        dxbc,
        dw,
        dd.astype(d.dtype),
        dz,
        dscale.astype(scale.dtype),
        dbias.astype(bias.dtype),
    )


nc_ssd_gated.defvjp(_gated_forward, _gated_backward)
