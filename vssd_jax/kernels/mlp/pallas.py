"""The MLP branch as Pallas kernels for NVIDIA GPUs (Triton backend).

The hidden layer, four times as wide as the tokens, is never kept. Forward: a program holds a block
of tokens from the first read to the last write: LayerNorm, then for each tile of the hidden layer
the first product, GELU and the second product. Backward: two kernels that compute the hidden layer
again. The first, for the gradients of the tokens, is laid out as the forward pass. A program of the
second holds the gradients of the weights of some hidden units, while all tokens of its chunk pass
by.

Of many channels the products are XLA's. A kernel in the backward pass computes the hidden layer
again and writes it with its gradient, for the products with them; another has LayerNorm's gradient.

Programs share nothing but their inputs, so that results repeat bit for bit. A last kernel adds up
the sums of the programs.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import dispatch, mesh, tiles
from vssd_jax.kernels.layer_norm import xla as layer_norm
from vssd_jax.kernels.linear import xla as linear
from vssd_jax.kernels.mlp import xla
from vssd_jax.kernels.mlp.api import MLPParams
from vssd_jax.kernels.tiles import Span, f32

MAX_CHANNELS = 2048
# With more, reading both kernels for every block of tokens costs more than the hidden layer saves;
# the forward pass is then that of "xla".
MAX_FORWARD_CHANNELS = 256
# With more, the gradients of the weights of a few hidden units fill the registers, and computing
# the hidden layer in both kernels takes longer.
MAX_GRADIENT_CHANNELS = 128
PROGRAMS = 256  # for the gradients of the weights: a GPU is occupied, and partial sums are few
NORM_TILE = 2048  # values that a step of a program of LayerNorm's gradient holds


def supports(x: Array, **_: Any) -> str | None:
    """Why these arguments are out of reach, or None."""
    if x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels (at most {MAX_CHANNELS})"
    return dispatch.wrong_dtype(x, jnp.bfloat16, jnp.float16) or mesh.too_large(x)


# --- Inside the kernels -----------------------------------------------------------------------


def _normal(x: Array) -> tuple[Array, Array]:
    """Distribution function, to 1e-7 (Abramowitz and Stegun 7.1.26), and density of the normal."""
    u = jnp.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * u)
    poly: Array | float = 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = poly * t + coefficient
    power = jnp.exp(-u * u)
    tail = 0.5 * poly * t * power
    return jnp.where(x > 0, 1 - tail, tail), power / math.sqrt(2 * math.pi)


def gelu(x: Array) -> Array:
    """Exact GELU."""
    return x * _normal(x)[0]


def gelu_and_derivative(x: Array) -> tuple[Array, Array]:
    """Exact GELU and its derivative."""
    cdf, density = _normal(x)
    return x * cdf, cdf + x * density


def _per_row(branch_scale_ref: Any, rows: Span, tokens: int) -> Array:
    """The scale of the sample that each row belongs to."""
    index, valid = rows
    return tiles.load(
        branch_scale_ref, (jax.lax.div(index, jnp.asarray(tokens, index.dtype)), valid)
    )


def _forward_kernel(
    x_ref: Any, *refs: Any, scaled: bool, tokens: int, block: int, tile: int, epsilon: float
) -> None:
    branch_scale_ref, refs = (refs[0], refs[1:]) if scaled else (None, refs)
    scale_ref, bias_ref, w1_ref, b1_ref, w2_ref, b2_ref, out_ref = refs
    length, channels = x_ref.shape
    hidden = w1_ref.shape[1]
    rows = tiles.span(pl.program_id(0) * block, block, length)
    columns = tiles.span(0, tiles.padded(channels), channels)
    x = tiles.load(x_ref, rows, columns)
    normed = tiles.layer_norm(x, scale_ref, bias_ref, columns, epsilon)

    def body(i: Array, acc: Array) -> Array:
        part = tiles.span(i * tile, tile, hidden)
        b1 = tiles.load(b1_ref, part)[None, :]
        h = gelu(tiles.dot(normed, tiles.load(w1_ref, columns, part)) + b1)
        return acc + tiles.dot(h.astype(x.dtype), tiles.load(w2_ref, part, columns))

    acc = jnp.zeros((block, columns[0].size), f32)
    y = jax.lax.fori_loop(0, pl.cdiv(hidden, tile), body, acc)
    y = y + tiles.load(b2_ref, columns)[None, :]
    if scaled:
        y *= _per_row(branch_scale_ref, rows, tokens)[:, None]
    tiles.store(out_ref, x.astype(f32) + y, rows, columns)


def _input_gradient_kernel(
    x_ref: Any,
    dy_ref: Any,
    *refs: Any,
    scaled: bool,
    tokens: int,
    block: int,
    tile: int,
    epsilon: float,
) -> None:
    branch_scale_ref, refs = (refs[0], refs[1:]) if scaled else (None, refs)
    scale_ref, bias_ref, w1_ref, b1_ref, w2_ref, b2_ref, dx_ref, sums_ref, *dots_ref = refs
    length, channels = x_ref.shape
    hidden = w1_ref.shape[1]
    program = pl.program_id(0)
    rows = tiles.span(program * block, block, length)
    columns = tiles.span(0, tiles.padded(channels), channels)
    x, dy = (tiles.load(ref, rows, columns) for ref in (x_ref, dy_ref))
    normed = tiles.layer_norm(x, scale_ref, bias_ref, columns, epsilon)
    factor = _per_row(branch_scale_ref, rows, tokens)[:, None] if scaled else None

    def body(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        part = tiles.span(i * tile, tile, hidden)
        w1 = tiles.load(w1_ref, columns, part)
        h = tiles.dot(normed, w1) + tiles.load(b1_ref, part)[None, :]
        dg = tiles.dot(dy, tiles.load(w2_ref, part, columns).T)
        g, slope = gelu_and_derivative(h)
        dh = dg * slope
        dnormed, *dots = carry
        if factor is not None:
            dh *= factor
            dots = [dots[0] + jnp.sum(g * dg, axis=1)]
        return dnormed + tiles.dot(dh.astype(x.dtype), w1.T), *dots

    carry = jnp.zeros((block, columns[0].size), f32), *[jnp.zeros(block, f32)] * scaled
    dnormed, *dots = jax.lax.fori_loop(0, pl.cdiv(hidden, tile), body, carry)

    # Read again, from a cache: kept until here they would fill the registers.
    x, dy = (tiles.load(ref, rows, columns).astype(f32) for ref in (x_ref, dy_ref))
    unit, _, rstd = tiles.standardised(x, columns, channels, epsilon)
    dunit = dnormed * tiles.load(scale_ref, columns)[None, :]
    tiles.store(dx_ref, dy + tiles.layer_norm_gradient(dunit, unit, rstd, channels), rows, columns)
    if factor is not None:
        b2 = tiles.load(b2_ref, columns)[None, :]
        tiles.store(dots_ref[0], dots[0] + jnp.sum(dy * b2, axis=1), rows)
        dy *= factor
    for place, values in enumerate((dnormed * unit, dnormed, dy)):
        tiles.store(sums_ref, jnp.sum(values, axis=0), program, place, columns)


def _weight_gradient_kernel(
    x_ref: Any,
    dy_ref: Any,
    *refs: Any,
    scaled: bool,
    tokens: int,
    block: int,
    steps: int,
    tile: int,
    epsilon: float,
) -> None:
    branch_scale_ref, refs = (refs[0], refs[1:]) if scaled else (None, refs)
    scale_ref, bias_ref, w1t_ref, b1_ref, w2_ref, dw1t_ref, db1_ref, dw2_ref = refs
    chunk = pl.program_id(1)
    length, channels = x_ref.shape
    columns = tiles.span(0, tiles.padded(channels), channels)
    part = tiles.span(pl.program_id(0) * tile, tile, w1t_ref.shape[0])

    # Hidden units are the rows: so the products that sum over tokens take the hidden layer as it
    # comes from the first two, without a transposition.
    def body(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        rows = tiles.span((chunk * steps + i) * block, block, length)
        x, dy = (tiles.load(ref, rows, columns) for ref in (x_ref, dy_ref))
        if scaled:
            dy = dy.astype(f32) * _per_row(branch_scale_ref, rows, tokens)[:, None]
            dy = dy.astype(x.dtype)
        normed = tiles.layer_norm(x, scale_ref, bias_ref, columns, epsilon)
        h = tiles.dot(tiles.load(w1t_ref, part, columns), normed.T)
        g, slope = gelu_and_derivative(h + tiles.load(b1_ref, part)[:, None])
        dh = tiles.dot(tiles.load(w2_ref, part, columns), dy.T) * slope
        dw1t, db1, dw2 = sums
        dw1t += tiles.dot(dh.astype(x.dtype), normed)
        dw2 += tiles.dot(g.astype(x.dtype), dy)
        return dw1t, db1 + jnp.sum(dh, axis=1), dw2

    zero = jnp.zeros((tile, columns[0].size), f32)
    sums = jax.lax.fori_loop(0, steps, body, (zero, jnp.zeros(tile, f32), zero))
    tiles.store(dw1t_ref, sums[0], chunk, part, columns)
    tiles.store(db1_ref, sums[1], chunk, part)
    tiles.store(dw2_ref, sums[2], chunk, part, columns)


def _hidden_gradient_kernel(
    normed_ref: Any,
    dbranch_ref: Any,
    w1_ref: Any,
    b1_ref: Any,
    w2_ref: Any,
    g_ref: Any,
    dh_ref: Any,
    sums_ref: Any,
    *,
    block: int,
    tile: int,
    step: int,
) -> None:
    length, channels = normed_ref.shape
    program = pl.program_id(1)
    rows = tiles.span(program * block, block, length)
    part = tiles.span(pl.program_id(0) * tile, tile, w1_ref.shape[1])

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        h, dg = carry
        columns = tiles.span(i * step, step, channels)
        normed, dbranch = (tiles.load(ref, rows, columns) for ref in (normed_ref, dbranch_ref))
        h += tiles.dot(normed, tiles.load(w1_ref, columns, part))
        return h, dg + tiles.dot(dbranch, tiles.load(w2_ref, part, columns).T)

    zero = jnp.zeros((block, tile), f32)
    h, dg = jax.lax.fori_loop(0, pl.cdiv(channels, step), body, (zero, zero))
    g, slope = gelu_and_derivative(h + tiles.load(b1_ref, part)[None, :])
    tiles.store(g_ref, g, rows, part)
    dh = dg * slope
    tiles.store(dh_ref, dh, rows, part)
    tiles.store(sums_ref, jnp.sum(dh, axis=0), program, part)


def _norm_gradient_kernel(
    x_ref: Any,
    dnormed_ref: Any,
    dy_ref: Any,
    *refs: Any,
    scaled: bool,
    tokens: int,
    block: int,
    steps: int,
    epsilon: float,
) -> None:
    branch_scale_ref, refs = (refs[0], refs[1:]) if scaled else (None, refs)
    scale_ref, dx_ref, sums_ref = refs
    length, channels = x_ref.shape
    program = pl.program_id(0)
    columns = tiles.span(0, tiles.padded(channels), channels)
    scale = tiles.load(scale_ref, columns)[None, :]

    def body(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        rows = tiles.span((program * steps + i) * block, block, length)
        x, dnormed, dy = (
            tiles.load(ref, rows, columns).astype(f32) for ref in (x_ref, dnormed_ref, dy_ref)
        )
        unit, _, rstd = tiles.standardised(x, columns, channels, epsilon)
        dx = dy + tiles.layer_norm_gradient(dnormed * scale, unit, rstd, channels)
        tiles.store(dx_ref, dx, rows, columns)
        if scaled:
            dy *= _per_row(branch_scale_ref, rows, tokens)[:, None]
        return tuple(a + b for a, b in zip(sums, (dnormed * unit, dnormed, dy), strict=True))

    zero = jnp.zeros((block, columns[0].size), f32)
    sums = jax.lax.fori_loop(0, steps, body, (zero,) * 3)
    for place, values in enumerate(sums):
        tiles.store(sums_ref, jnp.sum(values, axis=0), program, place, columns)


# --- Their calls ------------------------------------------------------------------------------


def _narrow(params: MLPParams, dtype: Any) -> MLPParams:
    """With the matrices in the dtype of the products."""
    return params._replace(w1=params.w1.astype(dtype), w2=params.w2.astype(dtype))


def _sizes(x: Array, branch_scale: Array | None) -> dict[str, Any]:
    return {"scaled": branch_scale is not None, "tokens": math.prod(x.shape[1:-1])}


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _arrays(*arrays: Array | None) -> tuple[Array, ...]:
    return tuple(a for a in arrays if a is not None)


def _input_gradient(
    x: Array, dy: Array, branch_scale: Array | None, params: MLPParams, epsilon: float
) -> tuple[Array, Array | None, Array]:
    """Gradients of x, of branch_scale, and in parts (programs, 3, C) of scale, bias and b2."""
    channels, sizes = x.shape[-1], _sizes(x, branch_scale)
    rows = x.size // channels
    block = 128 if channels <= 64 else 64
    programs = pl.cdiv(rows, block)
    dx, sums, *dots = tiles.call(
        functools.partial(_input_gradient_kernel, block=block, tile=32, epsilon=epsilon, **sizes),
        "mlp_input_gradient",
        (programs,),
        (
            jax.ShapeDtypeStruct((rows, channels), x.dtype),
            jax.ShapeDtypeStruct((programs, 3, channels), f32),
            *[jax.ShapeDtypeStruct((rows,), f32)] * sizes["scaled"],
        ),
        _arrays(_rows(x), _rows(dy), branch_scale, *params),
        num_warps=8,
    )
    dbranch_scale = dots[0].reshape(len(x), -1).sum(1) if dots else None
    return dx.reshape(x.shape), dbranch_scale, sums


def _weight_gradient(
    x: Array, dy: Array, branch_scale: Array | None, params: MLPParams, epsilon: float
) -> tuple[Array, Array, Array]:
    """Gradients of w1 transposed, b1 and w2, in parts (chunks, ...)."""
    scale, bias, w1, b1, w2, _ = params
    channels, hidden = w1.shape
    # The largest sizes whose registers do not spill on any of the GPUs of the tests.
    block, tile, warps, stages = (32, 64, 4, 3) if channels <= 64 else (64, 32, 8, 2)
    parts, blocks = pl.cdiv(hidden, tile), pl.cdiv(x.size // channels, block)
    steps = pl.cdiv(blocks, max(1, PROGRAMS // parts))
    chunks = pl.cdiv(blocks, steps)
    sizes = _sizes(x, branch_scale)
    return tiles.call(
        functools.partial(
            _weight_gradient_kernel, block=block, steps=steps, tile=tile, epsilon=epsilon, **sizes
        ),
        "mlp_weight_gradient",
        (parts, chunks),  # neighbours share the tokens that they read
        tuple(
            jax.ShapeDtypeStruct((chunks, *shape), f32)
            for shape in ((hidden, channels), (hidden,), (hidden, channels))
        ),
        _arrays(_rows(x), _rows(dy), branch_scale, scale, bias, w1.T, b1, w2),
        num_warps=warps,
        num_stages=stages,
    )


def _gradients(
    x: Array, dy: Array, branch_scale: Array | None, params: MLPParams, epsilon: float
) -> tuple[Array, Array | None, MLPParams]:
    args = x, dy, branch_scale, params, epsilon
    dx, dbranch_scale, parts = _input_gradient(*args)
    (dscale, dbias, db2), dw1t, db1, dw2 = tiles.sum_parts(parts, *_weight_gradient(*args))
    return dx, dbranch_scale, MLPParams(dscale, dbias, dw1t.T, db1, dw2, db2)


def _hidden_gradient(
    normed: Array, dbranch: Array, params: MLPParams
) -> tuple[Array, Array, Array]:
    """The hidden layer, its gradient before GELU, and that of b1 in parts (programs, 4 C)."""
    length, hidden = len(normed), params.w1.shape[1]
    block, tile = 128, 64  # with twice as many units registers spill
    programs = pl.cdiv(length, block)
    wide = jax.ShapeDtypeStruct((length, hidden), normed.dtype)
    return tiles.call(
        functools.partial(_hidden_gradient_kernel, block=block, tile=tile, step=32),
        "mlp_hidden_gradient",
        (pl.cdiv(hidden, tile), programs),  # neighbours share the tokens that they read
        (wide, wide, jax.ShapeDtypeStruct((programs, hidden), f32)),
        (normed, dbranch, params.w1, params.b1, params.w2),
        num_warps=8,
        num_stages=3,
    )


def _norm_gradient(
    x: Array,
    dnormed: Array,
    dy: Array,
    branch_scale: Array | None,
    params: MLPParams,
    epsilon: float,
) -> tuple[Array, Array]:
    """Gradients of x, and in parts (programs, 3, C) of scale, bias and b2."""
    rows, channels = dnormed.shape
    block = NORM_TILE // tiles.padded(channels)
    steps = pl.cdiv(pl.cdiv(rows, block), PROGRAMS)
    programs = pl.cdiv(rows, block * steps)
    sizes = _sizes(x, branch_scale)
    dx, sums = tiles.call(
        functools.partial(
            _norm_gradient_kernel, block=block, steps=steps, epsilon=epsilon, **sizes
        ),
        "mlp_norm_gradient",
        (programs,),
        (
            jax.ShapeDtypeStruct((rows, channels), x.dtype),
            jax.ShapeDtypeStruct((programs, 3, channels), f32),
        ),
        _arrays(_rows(x), dnormed, _rows(dy), branch_scale, params.scale),
    )
    return dx.reshape(x.shape), sums


def _wide_gradients(
    x: Array, dy: Array, branch_scale: Array | None, params: MLPParams, epsilon: float
) -> tuple[Array, Array | None, MLPParams]:
    """`_gradients` of many channels."""
    scale, bias, w1, _, w2, b2 = params
    normed = _rows(layer_norm.layer_norm(x, scale, bias, None, epsilon))
    dbranch = dy
    if branch_scale is not None:
        factor = branch_scale.reshape(-1, *(1,) * (x.ndim - 1)).astype(f32)
        dbranch = (dy.astype(f32) * factor).astype(x.dtype)
    dbranch = _rows(dbranch)
    g, dh, db1_parts = _hidden_gradient(normed, dbranch, params)
    dw1 = jnp.matmul(normed.T, dh, preferred_element_type=f32)
    dw2 = jnp.matmul(g.T, dbranch, preferred_element_type=f32)
    dx, norm_parts = _norm_gradient(x, jnp.matmul(dh, w1.T), dy, branch_scale, params, epsilon)
    (dscale, dbias, db2), db1 = tiles.sum_parts(norm_parts, db1_parts)
    dbranch_scale = None
    if branch_scale is not None:  # no work where it is not used
        branch = linear.linear(g, w2, b2).astype(f32) * _rows(dy).astype(f32)
        dbranch_scale = branch.reshape(len(x), -1).sum(1)
    return dx, dbranch_scale, MLPParams(dscale, dbias, dw1, db1, dw2, db2)


def _on_device(x: Array, branch_scale: Array | None, params: MLPParams, epsilon: float) -> Array:
    if x.shape[-1] > MAX_FORWARD_CHANNELS:
        return xla.mlp(x, branch_scale, params, epsilon=epsilon)
    rows = _rows(x)
    block = 128 if x.shape[-1] <= 128 else 64
    sizes = _sizes(x, branch_scale)
    y = tiles.call(
        functools.partial(_forward_kernel, block=block, tile=32, epsilon=epsilon, **sizes),
        "mlp",
        (pl.cdiv(rows.shape[0], block),),
        jax.ShapeDtypeStruct(rows.shape, x.dtype),
        _arrays(rows, branch_scale, *_narrow(params, x.dtype)),
        num_warps=8,
    )
    return y.reshape(x.shape)


_mlp = jax.custom_vjp(_on_device, nondiff_argnums=(3,))


def _forward(
    x: Array, branch_scale: Array | None, params: MLPParams, epsilon: float
) -> tuple[Array, tuple[Array, Array | None, MLPParams]]:
    return _mlp(x, branch_scale, params, epsilon), (x, branch_scale, params)


def _backward(
    epsilon: float, saved: tuple[Array, Array | None, MLPParams], dy: Array
) -> tuple[Array, Array | None, MLPParams]:
    x, branch_scale, params = saved
    gradients = _gradients if x.shape[-1] <= MAX_GRADIENT_CHANNELS else _wide_gradients
    dx, *found = gradients(x, dy, branch_scale, _narrow(params, x.dtype), epsilon)
    return dx, *jax.tree.map(lambda d, p: d.astype(p.dtype), tuple(found), (branch_scale, params))


_mlp.defvjp(_forward, _backward)


def mlp(x: Array, branch_scale: Array | None, params: MLPParams, *, epsilon: float) -> Array:
    """See `vssd_jax.kernels.mlp.api.mlp`."""
    return _mlp(x, branch_scale, params, epsilon)
