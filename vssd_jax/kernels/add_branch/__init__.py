from vssd_jax.kernels.add_branch.api import OPERATION, add_branch

__all__ = ["OPERATION", "add_branch"]
