"""The MLP branch put together from other operations."""

from jax import Array

from vssd_jax.kernels.add_branch import add_branch
from vssd_jax.kernels.gelu import gelu
from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.linear import linear
from vssd_jax.kernels.mlp.api import MLPParams


def mlp(
    x: Array,
    branch_scale: Array | None,
    params: MLPParams,
    *,
    epsilon: float,
    implementation: str | None = None,
) -> Array:
    """See `vssd_jax.kernels.mlp.api.mlp`; `implementation` is that of the parts."""
    scale, bias, w1, b1, w2, b2 = params
    normed = layer_norm(x, scale, bias, epsilon=epsilon, implementation=implementation)
    hidden = linear(normed, w1, b1, implementation=implementation)
    hidden = gelu(hidden, implementation=implementation)
    branch = linear(hidden, w2, b2, implementation=implementation)
    return add_branch(x, branch, branch_scale, implementation=implementation)
