"""Every test runs on the CPU, without a network."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported; GPU tests start their own process
os.environ["HF_HUB_OFFLINE"] = "1"

import pathlib

import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def x64():
    """Computes in float64 within a test."""
    import jax

    with jax.enable_x64(True):
        yield
