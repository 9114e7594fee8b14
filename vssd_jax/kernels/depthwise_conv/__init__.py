from vssd_jax.kernels.depthwise_conv.api import depthwise_conv
from vssd_jax.kernels.depthwise_conv.xla import TAPS

__all__ = ["TAPS", "depthwise_conv"]
