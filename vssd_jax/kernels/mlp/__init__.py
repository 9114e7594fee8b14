from vssd_jax.kernels.mlp.api import OPERATION, MLPParams, mlp

__all__ = ["OPERATION", "MLPParams", "mlp"]
