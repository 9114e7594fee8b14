from vssd_jax.kernels.layer_norm.api import layer_norm

__all__ = ["layer_norm"]
