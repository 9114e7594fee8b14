"""Operations in the form that converts best to ONNX; for inference in float32 alone."""

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels.silu import silu


def depthwise_conv(
    x: Array,
    kernel: Array,
    bias: Array,
    *,
    stride: int = 1,
    activation: str | None = None,
    residual: bool = False,
    relu_input: bool = False,
) -> Array:
    """See `vssd_jax.kernels.depthwise_conv.api.depthwise_conv`.

    One grouped convolution: XLA prefers nine shifted products, but each becomes a slice of a
    dynamic batch in ONNX, with ten nodes for its bounds.
    """
    y = jax.lax.conv_general_dilated(
        jax.nn.relu(x) if relu_input else x,
        kernel[:, :, None],
        (stride, stride),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    y = y + bias
    if activation is not None:
        y = silu(y, implementation="xla") if activation == "silu" else jax.nn.relu(y)
    return y + x if residual else y


def layer_norm(
    x: Array, scale: Array, bias: Array, gate: Array | None, epsilon: float
) -> Array:
    """See `vssd_jax.kernels.layer_norm.api.layer_norm`.

    In two passes as there; ONNX's own LayerNormalization takes one in onnxruntime, and loses digits
    where the mean is large.
    """
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(centred * centred, -1, keepdims=True)
    y = centred / jnp.sqrt(variance + epsilon) * scale + bias
    return y if gate is None else y * gate
