"""VSSD in JAX: Vision Mamba with Non-Causal State Space Duality (arXiv 2407.18559)."""

from vssd_jax.errors import UserError
from vssd_jax.models.registry import create_model, list_models

__all__ = ["UserError", "create_model", "list_models"]
