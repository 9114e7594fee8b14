from vssd_jax.kernels.layer_norm.api import OPERATION, layer_norm

__all__ = ["OPERATION", "layer_norm"]
