"""The first two convolutions of a downsampling by oneDNN, for inference: no ReLU is a pass."""

from jax import Array

from vssd_jax.kernels import onednn

supports = onednn.supports


def expand_depthwise(x: Array, w1: Array, b1: Array, kernel: Array, bias: Array) -> Array:
    """See `vssd_jax.kernels.expand_depthwise.api.expand_depthwise`."""
    rows = x.reshape(-1, x.shape[-1])
    hidden = onednn.matmul(rows, w1.astype(x.dtype), b1, activation="relu")
    hidden = hidden.reshape(*x.shape[:-1], -1)
    taps = kernel[:, :, None].astype(x.dtype)
    return onednn.convolution(
        hidden, taps, bias, stride=2, padding=1, groups=hidden.shape[-1], activation="relu"
    )
