"""The gradients of LayerNorm as one Pallas kernel for NVIDIA GPUs (Triton backend).

XLA's fusions add up either rows or columns, and write what the columns' sums need in float32. Here
a program takes some rows whole and adds up the columns in its registers; XLA adds up the programs'
sums. The forward pass is XLA's; nothing is kept from it but the arguments.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from vssd_jax.kernels import dispatch, tiles
from vssd_jax.kernels.layer_norm import xla
from vssd_jax.kernels.tiles import f32

MAX_CHANNELS = 2048
TILE = 2048  # values of one step
ROWS, PROGRAMS = 128, 256  # at most so many rows in a program, and about so many programs at least


def supports(x: jax.Array) -> str | None:
    """Why this argument is out of reach, or None."""
    if x.dtype not in tiles.DTYPES:
        return f"dtype {x.dtype} (it knows float32, bfloat16 and float16)"
    if x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels (at most {MAX_CHANNELS})"
    if dispatch.size_on_device(x) >= 2**31:
        return f"{dispatch.size_on_device(x)} elements on a device (below 2^31)"
    return None


def _kernel(x_ref, dy_ref, *refs, gated, block, steps, epsilon):
    gate_ref, refs = (refs[0], refs[1:]) if gated else (None, refs)
    scale_ref, bias_ref, dx_ref, sums_ref, *dgate_ref = refs
    program = pl.program_id(0)
    rows, channels = x_ref.shape
    columns = tiles.span(0, tiles.padded(channels), channels)
    scale, bias = (tiles.load(ref, columns).astype(f32)[None, :] for ref in (scale_ref, bias_ref))

    def body(step, sums):
        place = tiles.span((program * steps + step) * block, block, rows), columns
        x, dy = (tiles.load(ref, *place).astype(f32) for ref in (x_ref, dy_ref))
        mean = jnp.sum(x, axis=1) / channels
        centred = jnp.where(columns[1][None, :], x - mean[:, None], 0.0)
        variance = jnp.sum(centred * centred, axis=1) / channels
        rstd = jax.lax.rsqrt(variance + epsilon)[:, None]
        normed = centred * rstd
        if gated:
            y = (normed * scale + bias).astype(x_ref.dtype).astype(f32)  # as it was multiplied
            tiles.store(dgate_ref[0], dy * y, *place)
            dy *= tiles.load(gate_ref, *place).astype(f32)
        dnormed = dy * scale
        mean_d = jnp.sum(dnormed, axis=1) / channels
        mean_dn = jnp.sum(dnormed * normed, axis=1) / channels
        tiles.store(dx_ref, rstd * (dnormed - mean_d[:, None] - normed * mean_dn[:, None]), *place)
        dscale, dbias = sums
        return dscale + dy * normed, dbias + dy

    zero = jnp.zeros((block, columns[0].size), f32)
    sums = jax.lax.fori_loop(0, steps, body, (zero, zero))
    for place, values in enumerate(sums):
        tiles.store(sums_ref, jnp.sum(values, axis=0), program, place, columns)


def _on_device(x, dy, *args, epsilon, interpret):
    *gate, scale, bias = args
    channels = x.shape[-1]
    arrays = [t.reshape(-1, channels) for t in (x, dy, *gate)]
    rows = len(arrays[0])
    block = max(1, TILE // tiles.padded(channels))
    steps = max(1, min(rows // PROGRAMS, ROWS) // block)
    programs = pl.cdiv(rows, block * steps)
    dx, sums, *dgate = tiles.call(
        functools.partial(_kernel, gated=bool(gate), block=block, steps=steps, epsilon=epsilon),
        "layer_norm_gradient",
        (programs,),
        (
            jax.ShapeDtypeStruct(arrays[0].shape, x.dtype),
            jax.ShapeDtypeStruct((programs, 2, channels), f32),
            *(jax.ShapeDtypeStruct(t.shape, t.dtype) for t in arrays[2:]),
        ),
        (*arrays, scale, bias),
        interpret=interpret,
    )
    return dx.reshape(x.shape), sums, *(t.reshape(x.shape) for t in dgate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _layer_norm(x, scale, bias, gate, epsilon, interpret):
    return xla.layer_norm(x, scale, bias, gate, epsilon)


def _forward(x, scale, bias, gate, epsilon, interpret):
    return _layer_norm(x, scale, bias, gate, epsilon, interpret), (x, scale, bias, gate)


def _backward(epsilon, interpret, saved, dy):
    x, scale, bias, gate = saved
    f = functools.partial(_on_device, epsilon=epsilon, interpret=interpret)
    sharded = (x, dy) if gate is None else (x, dy, gate)
    dx, sums, *dgate = dispatch.over_batch(f, sharded, (scale, bias))
    dscale, dbias = sums.sum(0)
    return dx, dscale.astype(scale.dtype), dbias.astype(bias.dtype), dgate[0] if dgate else None


_layer_norm.defvjp(_forward, _backward)


def layer_norm(x, scale, bias, gate, epsilon, *, interpret=False):
    """See `vssd_jax.kernels.layer_norm.api.layer_norm`. `interpret` runs the kernel on a CPU."""
    return _layer_norm(x, scale, bias, gate, epsilon, interpret)
