from vssd_jax.kernels.gelu.api import OPERATION, gelu

__all__ = ["OPERATION", "gelu"]
