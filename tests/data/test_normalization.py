"""Normalisation on the host and on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssd_jax.data.normalization import normalize


@pytest.mark.parametrize("function", [normalize, jax.jit(normalize)])
def test_normalize(function):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    result = function(images)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (images / 255 - mean) / std, rtol=0, atol=1e-6)

    assert isinstance(result, np.ndarray if function is normalize else jax.Array)
