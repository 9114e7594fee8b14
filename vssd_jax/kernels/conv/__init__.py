from vssd_jax.kernels.conv.api import OPERATION, conv

__all__ = ["OPERATION", "conv"]
