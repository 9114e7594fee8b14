from vssd_jax.kernels.linear.api import OPERATION, linear

__all__ = ["OPERATION", "linear"]
