"""LayerNorm and linear layers put together from other operations."""

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
) -> tuple[Array, ...]:
    """See `vssd_jax.kernels.norm_linear.api.norm_linear`; `implementation` is LayerNorm's."""
    normed = layer_norm(x, scale, bias, epsilon=epsilon, implementation=implementation)
    # As a matrix: with more leading axes, the gradient of the kernel transposes an activation on
    # a CPU.
    rows = normed.reshape(-1, x.shape[-1])
    parts = kernel_parts(kernel.astype(x.dtype), widths)
    return tuple(
        products.matmul(rows, part, dtype=dtype).reshape(*x.shape[:-1], -1)
        for part, dtype in zip(parts, dtypes, strict=True)
    )


def kernel_parts(kernel: Array, widths: tuple[int, ...]) -> list[Array]:
    """The columns of `kernel` for each result."""
    return jnp.split(kernel, np.cumsum(widths)[:-1], axis=1)
