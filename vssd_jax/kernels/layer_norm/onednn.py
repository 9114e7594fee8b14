"""LayerNorm by oneDNN for inference; where it is differentiated, that of `cpu`."""

import functools

import jax
from jax import Array

from vssd_jax.kernels import dispatch, onednn
from vssd_jax.kernels.layer_norm import cpu


def supports(x: Array, gate: Array | None, **_: object) -> str | None:
    # With a gate it would be a pass over the memory more.
    return "a gate" if gate is not None else dispatch.wrong_dtype(x, *onednn.DTYPES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def layer_norm(x: Array, scale: Array, bias: Array, gate: None, epsilon: float) -> Array:
    """See `vssd_jax.kernels.layer_norm.api.layer_norm`."""
    return onednn.layer_norm(x.reshape(-1, x.shape[-1]), scale, bias, epsilon).reshape(x.shape)


layer_norm.defvjp(cpu.forward, cpu.backward)
