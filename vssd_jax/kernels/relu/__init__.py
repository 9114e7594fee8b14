from vssd_jax.kernels.relu.api import OPERATION, relu

__all__ = ["OPERATION", "relu"]
