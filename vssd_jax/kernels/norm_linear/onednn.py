"""LayerNorm, and linear layers by oneDNN."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import dispatch, onednn
from vssd_jax.kernels.norm_linear import xla


def supports(x: Array, dtypes: tuple[jax.typing.DTypeLike, ...], **_: object) -> str | None:
    wide = [dtype for dtype in dtypes if jnp.dtype(dtype) not in map(jnp.dtype, onednn.DTYPES)]
    return f"a result in {wide[0]}" if wide else dispatch.wrong_dtype(x, *onednn.DTYPES)


norm_linear = functools.partial(xla.norm_linear, matmul=onednn.product)
