"""Temporary: the data helper writes it."""
from typing import Any

Task = Any
Loss = Any
