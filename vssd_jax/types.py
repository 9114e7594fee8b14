"""Temporary."""
from jaxtyping import Array, Bool, Float, Int, Num, UInt8  # noqa: F401
