"""The NC-SSD mixer after its input projection as two Pallas kernels (Triton), for inference.

The first convolves x and B and adds up the state; the second convolves x and C, multiplies C with
the state and goes on to the residual sum without writing anything in between. The convolution is
done in both: nine multiply-adds cost less than a round trip of x|B|C through the memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from vssd_jax.kernels import tiles
from vssd_jax.kernels.nc_ssd import pallas as nc_ssd
from vssd_jax.kernels.tiles import f32

MAX_CHANNELS = 512


def supports(x, xbc, token_weights, z, branch_weights, *, groups) -> str | None:
    """Why these arguments are out of reach, or None."""
    if branch_weights is not None:
        return "stochastic depth (the kernels are for inference)"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {x.dtype} (they know bfloat16 and float16)"
    if x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels (at most {MAX_CHANNELS})"
    flat = (t.reshape(len(t), -1, t.shape[-1]) for t in (xbc, token_weights))
    return nc_ssd.supports(*flat, inner=z.shape[-1], groups=groups)


def _convolved(ref, kernel_ref, bias_ref, batch, token, columns, picture):
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


def _state_kernel(xbc_ref, w_ref, kernel_ref, bias_ref, out_ref, *, sizes, picture):
    head, chunk, batch = (pl.program_id(axis) for axis in range(3))
    columns, states = sizes.tile(head), sizes.group_tile(head, second=False)
    block = sizes.halved().tokens  # the convolution takes registers: more would spill
    steps = sizes.chunk // block

    def body(i, acc):
        rows = tiles.span((chunk * steps + i) * block, block, sizes.length)
        x, b = (
            _convolved(xbc_ref, kernel_ref, bias_ref, batch, rows[0], part, picture)
            for part in (columns, states)
        )
        # Zero beyond the last token, where the convolution is not.
        w = tiles.load(w_ref, batch, rows, head)
        return acc + tiles.dot(b.T, (x.astype(f32) * w[:, None]).astype(x.dtype))

    shape = (sizes.padded_state, sizes.padded_head_dim)
    state = jax.lax.fori_loop(0, steps, body, jnp.zeros(shape, f32))
    tiles.store(out_ref, state, batch, chunk, head, *sizes.state_axes())


def _output_kernel(
    residual_ref, xbc_ref, z_ref, state_ref, kernel_ref, conv_bias_ref, d_ref, scale_ref, bias_ref,
    out_kernel_ref, out_ref, *, sizes, picture, block, epsilon,
):  # fmt: skip
    batch = pl.program_id(1)
    rows = tiles.span(pl.program_id(0) * block, block, sizes.length)
    channels = tiles.span(0, tiles.padded(out_ref.shape[-1]), out_ref.shape[-1])

    def convolved(columns):
        return _convolved(xbc_ref, kernel_ref, conv_bias_ref, batch, rows[0], columns, picture)

    def c_of(head):
        return convolved(sizes.group_tile(head, second=True))

    shared = c_of(0) if sizes.groups == 1 else None

    def head_output(head):
        x, c = convolved(sizes.tile(head)), c_of(head) if shared is None else shared
        y = tiles.dot(c, nc_ssd.state_tile(state_ref, sizes, batch, head))
        return (y + d_ref[head].astype(f32) * x.astype(f32)).astype(out_ref.dtype)

    def project(head, normed, out):
        columns = sizes.tile(head)
        gated = normed.astype(out_ref.dtype) * tiles.load(z_ref, batch, rows, columns)
        return out + tiles.dot(gated, tiles.load(out_kernel_ref, columns, channels))

    out = jnp.zeros((block, channels[0].size), f32)
    out = nc_ssd.fold_normed(
        project, out, head_output, scale_ref, bias_ref, sizes, block, epsilon
    )
    residual = tiles.load(residual_ref, batch, rows, channels)
    tiles.store(out_ref, residual.astype(f32) + out, batch, rows, channels)


def nc_ssd_mixer(
    x, xbc, token_weights, z, conv_kernel, conv_bias, d, scale, bias, out_kernel,
    *, groups, epsilon, interpret=False,
):  # fmt: skip
    """See `vssd_jax.kernels.mixer.api.nc_ssd_mixer`. `interpret` runs the kernels on a CPU."""
    batch, *picture, channels = x.shape
    inner = z.shape[-1]
    xbc, token_weights, z = (t.reshape(batch, -1, t.shape[-1]) for t in (xbc, token_weights, z))
    sizes = nc_ssd.Sizes.of(xbc, token_weights, inner, groups)
    picture = tuple(picture)
    state = nc_ssd.states(
        functools.partial(_state_kernel, picture=picture),
        "mixer_state",
        (xbc, token_weights, conv_kernel, conv_bias),
        sizes,
        dtype=xbc.dtype,
        interpret=interpret,
        num_warps=8,
        num_stages=1,  # nine loads a tile: more would not fit into the shared memory
    )
    block = 64 if channels <= 128 else 32
    y = tiles.call(
        functools.partial(
            _output_kernel, sizes=sizes, picture=picture, block=block, epsilon=epsilon
        ),
        "mixer_output",
        (pl.cdiv(sizes.length, block), batch),
        jax.ShapeDtypeStruct((batch, sizes.length, channels), x.dtype),
        (
            x.reshape(batch, -1, channels), xbc, z, state, conv_kernel, conv_bias, d, scale, bias,
            out_kernel.astype(x.dtype),
        ),
        interpret=interpret,
        num_warps=8,
        num_stages=1,
    )  # fmt: skip
    return y.reshape(x.shape)
