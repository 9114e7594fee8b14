"""The gradients of LayerNorm as one Pallas kernel for NVIDIA GPUs (Triton backend).

A fusion of XLA's sums over either rows or columns, and the sums over columns need arrays in float32
from memory. Here a program takes some whole rows and sums over the columns in its registers; a
second kernel adds up the sums of the programs. The forward pass is XLA's, which keeps nothing but
the arguments.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import dispatch, mesh, tiles
from vssd_jax.kernels.layer_norm import xla
from vssd_jax.kernels.tiles import f32

MAX_CHANNELS = 2048
TILE = 2048  # values that a step of a program holds
ROWS = 128  # of a program at most
PROGRAMS = 256  # about so many at least, to occupy the GPU


def supports(x: Array, **_: Any) -> str | None:
    """Why these arguments are out of reach, or None."""
    if x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels (at most {MAX_CHANNELS})"
    return dispatch.wrong_dtype(x, *tiles.DTYPES) or mesh.too_large(x)


def _kernel(
    x_ref: Any, dy_ref: Any, *refs: Any, gated: bool, block: int, steps: int, epsilon: float
) -> None:
    gate_ref, refs = (refs[0], refs[1:]) if gated else (None, refs)
    scale_ref, bias_ref, dx_ref, sums_ref, *dgate_ref = refs
    program = pl.program_id(0)
    rows, channels = x_ref.shape
    columns = tiles.span(0, tiles.padded(channels), channels)
    scale, bias = (tiles.load(ref, columns).astype(f32)[None, :] for ref in (scale_ref, bias_ref))

    def body(step: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        place = tiles.span((program * steps + step) * block, block, rows), columns
        x, dy = (tiles.load(ref, *place).astype(f32) for ref in (x_ref, dy_ref))
        normed, _, rstd = tiles.standardised(x, columns, channels, epsilon)
        if gated:
            # Rounded, as the forward pass multiplied it with the gate.
            y = (normed * scale + bias).astype(x_ref.dtype).astype(f32)
            tiles.store(dgate_ref[0], dy * y, *place)
            dy *= tiles.load(gate_ref, *place).astype(f32)
        tiles.store(dx_ref, tiles.layer_norm_gradient(dy * scale, normed, rstd, channels), *place)
        dscale, dbias = sums
        return dscale + dy * normed, dbias + dy

    zero = jnp.zeros((block, columns[0].size), f32)
    sums = jax.lax.fori_loop(0, steps, body, (zero, zero))
    for place, values in enumerate(sums):
        tiles.store(sums_ref, jnp.sum(values, axis=0), program, place, columns)


def gradients_in_parts(
    x: Array, dy: Array, gate: Array | None, scale: Array, bias: Array, epsilon: float
) -> tuple[Array, Array, Array | None]:
    """Gradients of x, of scale and bias in parts (programs, 2, C), and of the gate."""
    channels = x.shape[-1]
    arrays = [t.reshape(-1, channels) for t in (x, dy, gate) if t is not None]
    rows = len(arrays[0])
    block = max(1, TILE // tiles.padded(channels))
    steps = max(1, min(rows // PROGRAMS, ROWS) // block, tiles.steps(pl.cdiv(rows, block)))
    programs = pl.cdiv(rows, block * steps)
    gated = gate is not None
    dx, sums, *dgate = tiles.call(
        functools.partial(_kernel, gated=gated, block=block, steps=steps, epsilon=epsilon),
        "layer_norm_gradient",
        (programs,),
        (
            jax.ShapeDtypeStruct(arrays[0].shape, x.dtype),
            jax.ShapeDtypeStruct((programs, 2, channels), f32),
            *(jax.ShapeDtypeStruct(t.shape, t.dtype) for t in arrays[2:]),
        ),
        (*arrays, scale, bias),
    )
    return dx.reshape(x.shape), sums, dgate[0].reshape(x.shape) if gated else None


def _on_device(
    batched: tuple[Array, Array, Array | None], shared: tuple[Array, Array], *, epsilon: float
) -> tuple[Array, Array, Array | None]:
    """Gradients of x, of scale and bias (1, 2, C), and of the gate."""
    dx, parts, dgate = gradients_in_parts(*batched, *shared, epsilon)
    return dx, tiles.sum_parts(parts)[0][None], dgate


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def layer_norm(
    x: Array, scale: Array, bias: Array, gate: Array | None, epsilon: float
) -> Array:
    """See `vssd_jax.kernels.layer_norm.api.layer_norm`."""
    return xla.layer_norm(x, scale, bias, gate, epsilon)


def _forward(
    x: Array, scale: Array, bias: Array, gate: Array | None, epsilon: float
) -> tuple[Array, tuple]:
    return layer_norm(x, scale, bias, gate, epsilon), (x, scale, bias, gate)


def _backward(
    epsilon: float, saved: tuple, dy: Array
) -> tuple[Array, Array, Array, Array | None]:
    x, scale, bias, gate = saved
    f = functools.partial(_on_device, epsilon=epsilon)
    dx, sums, dgate = mesh.over_batch(f, (x, dy, gate), (scale, bias))
    dscale, dbias = sums.sum(0)
    return dx, dscale.astype(scale.dtype), dbias.astype(bias.dtype), dgate


layer_norm.defvjp(_forward, _backward)
