from vssd_jax.kernels.batch_norm.api import OPERATION, batch_norm

__all__ = ["OPERATION", "batch_norm"]
