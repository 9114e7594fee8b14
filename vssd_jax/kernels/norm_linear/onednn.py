"""LayerNorm, and linear layers by oneDNN."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vssd_jax.kernels import dispatch, onednn
from vssd_jax.kernels.layer_norm import layer_norm


def supports(x: Array, dtypes: tuple[jax.typing.DTypeLike, ...], **_: object) -> str | None:
    wide = [dtype for dtype in dtypes if jnp.dtype(dtype) not in map(jnp.dtype, onednn.DTYPES)]
    return f"a result in {wide[0]}" if wide else dispatch.wrong_dtype(x, *onednn.DTYPES)


def norm_linear(
    x: Array,
    scale: Array,
    bias: Array,
    kernel: Array,
    *,
    widths: tuple[int, ...],
    dtypes: tuple[jax.typing.DTypeLike, ...],
    epsilon: float,
) -> tuple[Array, ...]:
    """See `vssd_jax.kernels.norm_linear.api.norm_linear`."""
    normed = layer_norm(x, scale, bias, epsilon=epsilon)
    rows = normed.reshape(-1, x.shape[-1])
    parts = jnp.split(kernel.astype(x.dtype), np.cumsum(widths)[:-1], axis=1)
    return tuple(
        onednn.product(rows, part, None, dtype).reshape(*x.shape[:-1], -1)
        for part, dtype in zip(parts, dtypes, strict=True)
    )
