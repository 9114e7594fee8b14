from vssd_jax.kernels.depthwise_conv.api import depthwise_conv

__all__ = ["depthwise_conv"]
