"""LayerNorm and linear layers one by one: reference, fallback, and the way of training."""

import jax.numpy as jnp
import numpy as np

from vssd_jax.kernels.layer_norm import layer_norm


def norm_linear(x, scale, bias, kernel, *, widths, dtypes, epsilon, implementation=None):
    """See `vssd_jax.kernels.norm_linear.api.norm_linear`; `implementation` is LayerNorm's."""
    # Rows: over more leading axes, the weights' gradient transposes an activation on a CPU.
    rows = layer_norm(x, scale, bias, epsilon=epsilon, implementation=implementation)
    rows = rows.reshape(-1, x.shape[-1])
    parts = jnp.split(kernel.astype(x.dtype), np.cumsum(widths)[:-1], axis=1)
    return tuple(
        jnp.matmul(rows, part, preferred_element_type=dtype).reshape(*x.shape[:-1], -1)
        for part, dtype in zip(parts, dtypes, strict=True)
    )
