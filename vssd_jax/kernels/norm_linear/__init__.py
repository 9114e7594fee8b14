from vssd_jax.kernels.norm_linear.api import norm_linear

__all__ = ["norm_linear"]
