"""NC-SSD as Pallas kernels for NVIDIA GPUs (Triton backend).

Forward: partial states of chunks of tokens, `B^T (m * x)`; their sum; then `C state + D x`, on
request with the LayerNorm over all heads and the gate in the same kernel. Backward: the partial
gradients of the state, `C^T dy`, by the first kernel again; their sum; then all other gradients
in one kernel. Programs share nothing but their inputs, so that results repeat bit for bit.

Every array is read and written where it lies, x|B|C packed as the convolution leaves them, on
request before its SiLU; masks cover what lies beyond L, N and P.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from vssd_jax.kernels import tiles
from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.tiles import f32


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static in a call: L, heads, groups, N, P, and how a kernel goes about them."""

    length: int
    heads: int
    groups: int
    state: int
    head_dim: int
    tokens: int  # of one step of a kernel
    warps: int
    silu: bool  # whether x|B|C are to go through SiLU

    @classmethod
    def of(cls, xbc, token_weights, inner, groups, silu=False):
        _, length, width = xbc.shape
        heads = token_weights.shape[-1]
        state, head_dim = (width - inner) // (2 * groups), inner // heads
        # Matrix units want 16 tokens at least; more than these would spill registers. Float32
        # takes more of them: matrix units have no exact products for it.
        tokens, warps = 64 if max(tiles.padded(state), tiles.padded(head_dim)) <= 64 else 32, 4
        if xbc.dtype == f32:
            tokens, warps = tokens // 2, 8
        return cls(length, heads, groups, state, head_dim, tokens, warps, silu)

    def halved(self):
        """For a kernel with more arrays in registers."""
        return dataclasses.replace(self, tokens=max(16, self.tokens // 2))

    @property
    def inner(self):
        return self.heads * self.head_dim

    @property
    def chunk(self):
        """Tokens of one partial state: enough programs for the GPU, few partial states."""
        return self.tokens * pl.cdiv(pl.cdiv(self.length, self.tokens), self.chunks)

    @property
    def chunks(self):
        return max(1, min(8, self.length // 384))

    @property
    def padded_state(self):
        return tiles.padded(self.state)

    @property
    def padded_head_dim(self):
        return tiles.padded(self.head_dim)

    def state_axes(self):
        """The rows and columns of a head's state, with their masks."""
        return (
            tiles.span(0, self.padded_state, self.state),
            tiles.span(0, self.padded_head_dim, self.head_dim),
        )

    def tile(self, head):
        """Columns of x in head `head`, with their mask."""
        _, (p, valid) = self.state_axes()
        return head * self.head_dim + p, valid

    def group_tile(self, head, *, second):
        """Columns of B (or of C, the second) in the group of head `head`, with their mask."""
        (n, valid), _ = self.state_axes()
        start = self.inner + (self.groups * self.state if second else 0)
        # Not `%`: the sign of Python's remainder is more than Triton's lowering can take.
        group = jax.lax.rem(jnp.int32(head), jnp.int32(self.groups))
        return start + group * self.state + n, valid


def supports(xbc, token_weights, *, inner, groups) -> str | None:
    """Why these arguments are out of reach, or None."""
    if xbc.dtype not in tiles.DTYPES:
        return f"dtype {xbc.dtype} (it knows float32, bfloat16 and float16)"
    sizes = Sizes.of(xbc, token_weights, inner, groups)
    if sizes.padded_state * sizes.padded_head_dim > 128 * 128:
        return f"a state of {sizes.state} x {sizes.head_dim} (at most 128 x 128)"
    if xbc.size >= 2**31:
        return f"{xbc.size} elements (below 2^31)"
    return None


# --- Inside the kernels -----------------------------------------------------------------------


def _tokens(sizes, block):
    return tiles.span(block * sizes.tokens, sizes.tokens, sizes.length)


def _load_xbc(ref, sizes, *place):
    values = tiles.load(ref, *place)
    return jax.nn.silu(values.astype(f32)).astype(values.dtype) if sizes.silu else values


def _before_silu(gradient, ref, sizes, *place):
    """The gradient of what lies in `ref`, from that of what `_load_xbc` makes of it."""
    if not sizes.silu:
        return gradient
    values = tiles.load(ref, *place).astype(f32)
    sigmoid = jax.nn.sigmoid(values)
    return gradient * (sigmoid * (1 + values * (1 - sigmoid)))


def _state_kernel(xbc_ref, w_ref, out_ref, *, sizes):
    _partial_state(xbc_ref, xbc_ref, w_ref, out_ref, sizes, second=False)


def _state_gradient_kernel(dy_ref, xbc_ref, out_ref, *, sizes):
    _partial_state(dy_ref, xbc_ref, None, out_ref, sizes, second=True)


def _partial_state(x_ref, bc_ref, w_ref, out_ref, sizes, *, second):
    """B^T (w * x) over a chunk; or C^T x (`second`, without weights)."""
    head, chunk, batch = (pl.program_id(axis) for axis in range(3))
    columns, states = sizes.tile(head), sizes.group_tile(head, second=second)
    steps = sizes.chunk // sizes.tokens

    def body(i, acc):
        rows = _tokens(sizes, chunk * steps + i)
        place = batch, rows, columns
        x = tiles.load(x_ref, *place) if second else _load_xbc(x_ref, sizes, *place)
        b = _load_xbc(bc_ref, sizes, batch, rows, states)
        if w_ref is not None:
            x = (x.astype(f32) * tiles.load(w_ref, batch, rows, head)[:, None]).astype(x.dtype)
        return acc + tiles.dot(b.T, x)

    shape = (sizes.padded_state, sizes.padded_head_dim)
    state = jax.lax.fori_loop(0, steps, body, jnp.zeros(shape, f32))
    tiles.store(out_ref, state, batch, chunk, head, *sizes.state_axes())


def state_tile(ref, sizes, batch, head):
    return tiles.load(ref, batch, head, *sizes.state_axes())


def _head_output(xbc_ref, d_ref, state_ref, sizes, batch, rows, head):
    x = _load_xbc(xbc_ref, sizes, batch, rows, sizes.tile(head))
    c = _load_xbc(xbc_ref, sizes, batch, rows, sizes.group_tile(head, second=True))
    state = state_tile(state_ref, sizes, batch, head)
    return tiles.dot(c, state) + d_ref[head].astype(f32) * x.astype(f32)


def _output_kernel(xbc_ref, d_ref, state_ref, y_ref, *, sizes):
    head, block, batch = (pl.program_id(axis) for axis in range(3))
    rows = _tokens(sizes, block)
    y = _head_output(xbc_ref, d_ref, state_ref, sizes, batch, rows, head)
    tiles.store(y_ref, y, batch, rows, sizes.tile(head))


def _gated_output_kernel(
    xbc_ref, d_ref, state_ref, z_ref, scale_ref, bias_ref, out_ref, *, sizes, epsilon
):
    block, batch = pl.program_id(0), pl.program_id(1)
    rows = _tokens(sizes, block)

    def head_output(head):
        y = _head_output(xbc_ref, d_ref, state_ref, sizes, batch, rows, head)
        return y.astype(out_ref.dtype)

    def write(head, normed, _):
        columns = sizes.tile(head)
        z = tiles.load(z_ref, batch, rows, columns).astype(f32)
        tiles.store(out_ref, normed.astype(out_ref.dtype) * z, batch, rows, columns)

    fold_normed(write, None, head_output, scale_ref, bias_ref, sizes, rows[0].size, epsilon)


def fold_normed(f, carry, head_output, scale_ref, bias_ref, sizes, tokens, epsilon):
    """`carry = f(head, normed, carry)` for each head, normalised over all heads.

    The heads do not fit into the registers together: each is computed twice.
    """

    def moments(head, carry):
        # Two passes within a head, and Chan's formula between heads: no cancellation.
        mean, squares = carry
        y, valid = head_output(head).astype(f32), sizes.tile(head)[1][None, :]
        head_mean = jnp.sum(y, axis=1) / sizes.head_dim
        centred = jnp.where(valid, y - head_mean[:, None], 0.0)
        delta = head_mean - mean
        share = 1.0 / (head + 1).astype(f32)
        between = delta * delta * (sizes.head_dim * head.astype(f32) * share)
        return mean + delta * share, squares + jnp.sum(centred * centred, axis=1) + between

    zero = jnp.zeros((tokens,), f32)
    mean, squares = jax.lax.fori_loop(0, sizes.heads, moments, (zero, zero))
    inverse = jax.lax.rsqrt(squares / sizes.inner + epsilon)

    def normed(head, carry):
        scale, bias = (
            tiles.load(ref, sizes.tile(head)).astype(f32)[None, :] for ref in (scale_ref, bias_ref)
        )
        y = head_output(head).astype(f32)
        return f(head, (y - mean[:, None]) * inverse[:, None] * scale + bias, carry)

    return jax.lax.fori_loop(0, sizes.heads, normed, carry)


def _gradient_kernel(
    xbc_ref, w_ref, d_ref, state_ref, dstate_ref, dy_ref, dxbc_ref, dw_ref, dd_ref, *, sizes
):
    """All gradients but the state's for a block of tokens and the heads of one group."""
    block, group, batch = (pl.program_id(axis) for axis in range(3))
    rows = _tokens(sizes, block)
    b_columns = sizes.group_tile(group, second=False)
    c_columns = sizes.group_tile(group, second=True)
    b = _load_xbc(xbc_ref, sizes, batch, rows, b_columns)

    def body(i, carry):
        db, dc = carry
        head = i * sizes.groups + group
        columns = sizes.tile(head)
        x = _load_xbc(xbc_ref, sizes, batch, rows, columns)
        dy = tiles.load(dy_ref, batch, rows, columns)
        state = state_tile(state_ref, sizes, batch, head)
        dstate = state_tile(dstate_ref, sizes, batch, head)
        w, wide_x, wide_dy = tiles.load(w_ref, batch, rows, head), x.astype(f32), dy.astype(f32)
        dweighted = tiles.dot(b, dstate)
        dx = w[:, None] * dweighted + d_ref[head].astype(f32) * wide_dy
        dx = _before_silu(dx, xbc_ref, sizes, batch, rows, columns)
        tiles.store(dxbc_ref, dx, batch, rows, columns)
        tiles.store(dw_ref, jnp.sum(wide_x * dweighted, axis=1), batch, rows, head)
        dd_ref[batch, block, head] = jnp.sum(jnp.sum(wide_x * wide_dy, axis=1), axis=0)
        db = db + tiles.dot((w[:, None] * wide_x).astype(x.dtype), dstate.T)
        return db, dc + tiles.dot(dy, state.T)

    zero = jnp.zeros((sizes.tokens, sizes.padded_state), f32)
    db, dc = jax.lax.fori_loop(0, sizes.heads // sizes.groups, body, (zero, zero))
    for gradient, columns in ((db, b_columns), (dc, c_columns)):
        gradient = _before_silu(gradient, xbc_ref, sizes, batch, rows, columns)
        tiles.store(dxbc_ref, gradient, batch, rows, columns)


# --- Calls ------------------------------------------------------------------------------------


def states(kernel, name, args, sizes, *, dtype, interpret, **options):
    """Sums over the tokens: (B, heads, N, P) in `dtype`, accumulated in float32."""
    batch, chunks = args[0].shape[0], pl.cdiv(sizes.length, sizes.chunk)
    shape = (batch, chunks, sizes.heads, sizes.state, sizes.head_dim)
    # Heads on the first, fastest axis: they read the same B and C at the same time.
    parts = tiles.call(
        functools.partial(kernel, sizes=sizes),
        name,
        (sizes.heads, chunks, batch),
        jax.ShapeDtypeStruct(shape, f32),
        args,
        interpret=interpret,
        **{"num_warps": sizes.warps, **options},
    )
    return parts.sum(1).astype(dtype)


def _state(xbc, token_weights, sizes, *, interpret):
    args = (xbc, token_weights)
    return states(
        _state_kernel, "nc_ssd_state", args, sizes, dtype=xbc.dtype, interpret=interpret
    )


def _output(xbc, d, state, sizes, *, interpret):
    batch, blocks = xbc.shape[0], pl.cdiv(sizes.length, sizes.tokens)
    return tiles.call(
        functools.partial(_output_kernel, sizes=sizes),
        "nc_ssd_output",
        (sizes.heads, blocks, batch),
        jax.ShapeDtypeStruct((batch, sizes.length, sizes.inner), xbc.dtype),
        (xbc, d, state),
        interpret=interpret,
        num_warps=sizes.warps,
    )


def _gradients(xbc, token_weights, d, state, dy, sizes, *, interpret):
    dstate = states(
        _state_gradient_kernel,
        "nc_ssd_state_gradient",
        (dy, xbc),
        sizes,
        dtype=xbc.dtype,
        interpret=interpret,
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
        interpret=interpret,
        num_warps=8,  # four would spill registers
    )
    return dxbc, dw.astype(token_weights.dtype), dd.sum((0, 1)).astype(d.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _nc_ssd(xbc, token_weights, d, inner, groups, interpret):
    return _nc_ssd_forward(xbc, token_weights, d, inner, groups, interpret)[0]


def _nc_ssd_forward(xbc, token_weights, d, inner, groups, interpret):
    sizes = Sizes.of(xbc, token_weights, inner, groups)
    state = _state(xbc, token_weights, sizes, interpret=interpret)
    y = _output(xbc, d, state, sizes, interpret=interpret)
    return y, (xbc, token_weights, d, state)


def _nc_ssd_backward(inner, groups, interpret, saved, dy):
    xbc, token_weights, d, state = saved
    sizes = Sizes.of(xbc, token_weights, inner, groups)
    return _gradients(xbc, token_weights, d, state, dy, sizes, interpret=interpret)


_nc_ssd.defvjp(_nc_ssd_forward, _nc_ssd_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9, 10))
def _nc_ssd_gated(
    xbc, token_weights, d, z, scale, bias, inner, groups, epsilon, silu, interpret
):
    args = (xbc, token_weights, d, z, scale, bias)
    return _gated_forward(*args, inner, groups, epsilon, silu, interpret)[0]


def _gated_forward(
    xbc, token_weights, d, z, scale, bias, inner, groups, epsilon, silu, interpret
):
    sizes = Sizes.of(xbc, token_weights, inner, groups, silu)
    state = _state(xbc, token_weights, sizes, interpret=interpret)
    out = tiles.call(
        functools.partial(_gated_output_kernel, sizes=sizes, epsilon=epsilon),
        "nc_ssd_gated_output",
        (pl.cdiv(sizes.length, sizes.tokens), xbc.shape[0]),
        jax.ShapeDtypeStruct(z.shape, z.dtype),
        (xbc, d, state, z, scale, bias),
        interpret=interpret,
        num_warps=sizes.warps,
    )
    return out, (xbc, token_weights, d, z, scale, bias, state)


def _gated_backward(inner, groups, epsilon, silu, interpret, saved, dout):
    xbc, token_weights, d, z, scale, bias, state = saved
    sizes = Sizes.of(xbc, token_weights, inner, groups, silu)
    # y again from the state: one kernel, and no array of y kept from the forward pass.
    y = _output(xbc, d, state, sizes, interpret=interpret)
    _, norm_vjp = jax.vjp(functools.partial(layer_norm, epsilon=epsilon), y, scale, bias, z)
    dy, dscale, dbias, dz = norm_vjp(dout)
    grads = _gradients(xbc, token_weights, d, state, dy, sizes, interpret=interpret)
    return *grads, dz, dscale, dbias


_nc_ssd_gated.defvjp(_gated_forward, _gated_backward)


def nc_ssd(xbc, token_weights, d, *, inner, groups, interpret=False):
    """See `vssd_jax.kernels.nc_ssd.api.nc_ssd`. `interpret` runs the kernels on a CPU."""
    return _nc_ssd(xbc, token_weights, d, inner, groups, interpret)


def nc_ssd_gated(
    xbc, token_weights, d, z, scale, bias,
    *, inner, groups, epsilon, silu=False, interpret=False,
):  # fmt: skip
    """See `vssd_jax.kernels.nc_ssd.api.nc_ssd_gated`. `interpret` runs the kernels on a CPU."""
    return _nc_ssd_gated(
        xbc, token_weights, d, z, scale, bias, inner, groups, epsilon, silu, interpret
    )
