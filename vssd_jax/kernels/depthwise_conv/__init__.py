from vssd_jax.kernels.depthwise_conv.api import OPERATION, depthwise_conv

__all__ = ["OPERATION", "depthwise_conv"]
