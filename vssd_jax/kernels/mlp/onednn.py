"""The MLP branch by oneDNN, for inference: GELU and residual sum are part of the products."""

from jax import Array

from vssd_jax.kernels import onednn
from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.mlp.api import MLPParams

supports = onednn.supports


def mlp(x: Array, branch_scale: None, params: MLPParams, *, epsilon: float) -> Array:
    """See `vssd_jax.kernels.mlp.api.mlp`."""
    scale, bias, w1, b1, w2, b2 = params
    rows = x.reshape(-1, x.shape[-1])
    normed = layer_norm(rows, scale, bias, epsilon=epsilon)
    hidden = onednn.matmul(normed, w1.astype(x.dtype), b1, activation="gelu")
    return onednn.matmul(hidden, w2.astype(x.dtype), b2, rows).reshape(x.shape)
