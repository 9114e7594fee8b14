from vssd_jax.kernels.norm_linear.api import OPERATION, norm_linear

__all__ = ["OPERATION", "norm_linear"]
