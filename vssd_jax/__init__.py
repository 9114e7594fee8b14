"""VSSD in JAX: Vision Mamba with Non-Causal State Space Duality (arXiv 2407.18559)."""

from typing import Any

from vssd_jax.errors import UserError

__all__ = ["UserError", "__version__", "create_model", "list_models", "load_predictor"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on use: the input pipeline's worker processes import this package, but not jax.
    if name in ("create_model", "list_models"):
        from vssd_jax import factory

        return getattr(factory, name)
    if name == "load_predictor":
        from vssd_jax.inference.predictor import load_predictor

        return load_predictor
    raise AttributeError(f"module 'vssd_jax' has no attribute {name!r}")
