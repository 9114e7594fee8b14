"""LayerNorm and linear layers put together from other operations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vssd_jax.kernels import products
from vssd_jax.kernels.layer_norm import layer_norm


def norm_linear(
    x: Array,
    scale: Array,
    bias: Array,
    kernel: Array,
    *,
    widths: tuple[int, ...],
    dtypes: tuple[jax.typing.DTypeLike, ...],
    epsilon: float,
    implementation: str | None = None,
    matmul: Callable[..., Array] = products.matmul,
) -> tuple[Array, ...]:
    """See `vssd_jax.kernels.norm_linear.api.norm_linear`; `implementation` is LayerNorm's,
    `matmul` as that of `products`.
    """
    normed = layer_norm(x, scale, bias, epsilon=epsilon, implementation=implementation)
    # As a matrix: with more leading axes, the gradient of the kernel transposes an activation on
    # a CPU.
    rows = normed.reshape(-1, x.shape[-1])
    parts = jnp.split(kernel.astype(x.dtype), np.cumsum(widths)[:-1], axis=1)
    return tuple(
        matmul(rows, part, dtype=dtype).reshape(*x.shape[:-1], -1)
        for part, dtype in zip(parts, dtypes, strict=True)
    )
