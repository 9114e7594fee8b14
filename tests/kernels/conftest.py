"""Fixtures of the kernels' tests."""

import pytest

from tests.kernels.poison import poisoned


@pytest.fixture
def poisoned_tails(monkeypatch):
    """Loads and stores of Pallas kernels give NaN for an index that their mask should exclude."""
    plgpu = pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)
    from vssd_jax.kernels import tiles

    monkeypatch.setattr(tiles, "plgpu", poisoned(plgpu))
