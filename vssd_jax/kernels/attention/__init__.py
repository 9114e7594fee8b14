from vssd_jax.kernels.attention.api import OPERATION, attention

__all__ = ["OPERATION", "attention"]
