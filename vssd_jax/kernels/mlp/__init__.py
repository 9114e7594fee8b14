from vssd_jax.kernels.mlp.api import mlp

__all__ = ["mlp"]
