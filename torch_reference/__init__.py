"""VSSD in plain PyTorch: the reference of the parity tests and the baseline of the benchmarks."""

from .vssd import VARIANTS, VSSD, VSSDConfig, create_model

__all__ = ["VARIANTS", "VSSD", "VSSDConfig", "create_model"]
