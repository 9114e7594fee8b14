from vssd_jax.kernels.layer_norm.xla import layer_norm

__all__ = ["layer_norm"]
