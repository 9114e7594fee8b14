from vssd_jax.kernels.silu.api import OPERATION, silu

__all__ = ["OPERATION", "silu"]
