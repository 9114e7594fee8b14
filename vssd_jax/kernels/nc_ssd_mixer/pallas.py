"""The NC-SSD mixer after its input projection as two Pallas kernels (Triton), for inference.

The first convolves x and B and sums up the state. The second convolves x and C and computes all
the rest up to the residual sum, without writing anything in between. Both convolve x: nine
multiply-adds cost less than to write xbc to memory and to read it again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import dispatch, tiles
from vssd_jax.kernels.nc_ssd import pallas as nc_ssd
from vssd_jax.kernels.nc_ssd_mixer.api import MixerParams
from vssd_jax.kernels.tiles import Span, f32

MAX_CHANNELS = 512


def supports(
    x: Array,
    xbc: Array,
    token_weights: Array,
    z: Array,
    branch_scale: Array | None,
    groups: int,
    **_: Any,
) -> str | None:
    """Why these arguments are out of reach, or None."""
    if branch_scale is not None:
        return "stochastic depth (the kernels are for inference)"
    if x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels (at most {MAX_CHANNELS})"
    return dispatch.wrong_dtype(x, jnp.bfloat16, jnp.float16) or nc_ssd.supports(
        xbc, token_weights, inner=z.shape[-1], groups=groups
    )


def _convolved(
    ref: Any,
    kernel_ref: Any,
    bias_ref: Any,
    batch: Array,
    token: Array,
    columns: Span,
    picture: tuple[int, ...],
) -> Array:
    """SiLU of the 3x3 convolution at the tokens `token`, in the columns `columns`."""
    height, width = picture
    row, column = jax.lax.div(token, width), jax.lax.rem(token, width)
    acc = tiles.load(bias_ref, columns)[None, :]
    for i in range(3):
        for j in range(3):
            y, x = row + (i - 1), column + (j - 1)
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            pixels = tiles.load(ref, batch, (y * width + x, inside), columns)
            acc += pixels.astype(f32) * tiles.load(kernel_ref, i, j, columns)[None, :]
    return jax.nn.silu(acc).astype(ref.dtype)


def _state_kernel(
    xbc_ref: Any,
    w_ref: Any,
    kernel_ref: Any,
    bias_ref: Any,
    out_ref: Any,
    *,
    sizes: nc_ssd.Sizes,
    picture: tuple[int, ...],
) -> None:
    head, chunk, batch = (pl.program_id(axis) for axis in range(3))
    x_columns, b_columns = sizes.x_columns(head), sizes.b_columns(head)
    block = sizes.halved().tokens  # the convolution takes registers: with more they would spill
    steps = sizes.chunk // block

    def body(i: Array, acc: Array) -> Array:
        rows = tiles.span((chunk * steps + i) * block, block, sizes.length)
        b = _convolved(xbc_ref, kernel_ref, bias_ref, batch, rows[0], b_columns, picture).T
        x = _convolved(xbc_ref, kernel_ref, bias_ref, batch, rows[0], x_columns, picture)
        # The token weights are zero beyond the last token; the convolution is not.
        w = tiles.load(w_ref, batch, rows, head)
        return acc + tiles.dot(b, (x.astype(f32) * w[:, None]).astype(x.dtype))

    shape = (sizes.padded_state, sizes.padded_head_dim)
    state = jax.lax.fori_loop(0, steps, body, jnp.zeros(shape, f32))
    tiles.store(out_ref, state, batch, chunk, head, *sizes.state_axes())


def _output_kernel(
    residual_ref: Any,
    xbc_ref: Any,
    z_ref: Any,
    state_ref: Any,
    kernel_ref: Any,
    conv_bias_ref: Any,
    d_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    out_kernel_ref: Any,
    out_ref: Any,
    *,
    sizes: nc_ssd.Sizes,
    picture: tuple[int, ...],
    block: int,
    epsilon: float,
) -> None:
    batch = pl.program_id(1)
    rows = tiles.span(pl.program_id(0) * block, block, sizes.length)
    channels = tiles.span(0, tiles.padded(out_ref.shape[-1]), out_ref.shape[-1])

    def convolved(columns: Span) -> Array:
        return _convolved(xbc_ref, kernel_ref, conv_bias_ref, batch, rows[0], columns, picture)

    # With one group, C is the same for all heads.
    shared_c = convolved(sizes.c_columns(0)) if sizes.groups == 1 else None

    def head_output(head: Array) -> Array:
        x = convolved(sizes.x_columns(head))
        c = convolved(sizes.c_columns(head)) if shared_c is None else shared_c
        y = tiles.dot(c, nc_ssd.load_state(state_ref, sizes, batch, head))
        return (y + d_ref[head].astype(f32) * x.astype(f32)).astype(out_ref.dtype)

    def project(head: Array, normed: Array, out: Array) -> Array:
        columns = sizes.x_columns(head)
        gated = normed.astype(out_ref.dtype) * tiles.load(z_ref, batch, rows, columns)
        return out + tiles.dot(gated, tiles.load(out_kernel_ref, columns, channels))

    out = jnp.zeros((block, channels[0].size), f32)
    out = nc_ssd.fold_normed(
        project, out, head_output, scale_ref, bias_ref, sizes, block, epsilon
    )
    residual = tiles.load(residual_ref, batch, rows, channels)
    tiles.store(out_ref, residual.astype(f32) + out, batch, rows, channels)


def nc_ssd_mixer(
    x: Array,
    xbc: Array,
    token_weights: Array,
    z: Array,
    branch_scale: None,
    params: MixerParams,
    *,
    groups: int,
    epsilon: float,
) -> Array:
    """See `vssd_jax.kernels.nc_ssd_mixer.api.nc_ssd_mixer`."""
    batch, *picture, channels = x.shape
    inner = z.shape[-1]
    xbc, token_weights, z = (t.reshape(batch, -1, t.shape[-1]) for t in (xbc, token_weights, z))
    sizes = nc_ssd.Sizes.of(xbc, token_weights, inner, groups)
    state = nc_ssd.states(
        functools.partial(_state_kernel, picture=tuple(picture)),
        "mixer_state",
        (xbc, token_weights, params.conv_kernel, params.conv_bias),
        sizes,
        dtype=xbc.dtype,
        num_warps=8,
        num_stages=1,  # nine loads a tile: more would not fit into the shared memory
    )
    block = 64 if channels <= 128 else 32
    y = tiles.call(
        functools.partial(
            _output_kernel, sizes=sizes, picture=tuple(picture), block=block, epsilon=epsilon
        ),
        "mixer_output",
        (pl.cdiv(sizes.length, block), batch),
        jax.ShapeDtypeStruct((batch, sizes.length, channels), x.dtype),
        (
            x.reshape(batch, -1, channels),
            xbc,
            z,
            state,
            params.conv_kernel,
            params.conv_bias,
            params.d,
            params.scale,
            params.bias,
            params.out_kernel.astype(x.dtype),
        ),
        num_warps=8,
        num_stages=1,
    )
    return y.reshape(x.shape)
