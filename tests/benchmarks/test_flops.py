"""The compiled detector computes little beside the multiply-adds of its layers."""

import jax
import pytest

from benchmarks import flops


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="for a CPU")
def test_flops_of_the_compiled_detector():
    # Measured: 1.003. With the whole canvas for each region it would be 1.8.
    assert 0.9 < flops.figures()["ratio"] < 1.1


def test_regions_take_a_hundredth_of_the_detector():
    """Measured: 4.2e9 and 1.9e9, of 559e9."""
    for count in (flops.window_flops, flops.kernel_flops):
        assert 1e9 < count(1000, 7) < 6e9
