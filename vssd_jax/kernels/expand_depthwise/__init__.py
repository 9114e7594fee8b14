from vssd_jax.kernels.expand_depthwise.api import OPERATION, expand_depthwise

__all__ = ["OPERATION", "expand_depthwise"]
