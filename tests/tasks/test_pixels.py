"""Normalisation of a batch on the device, and what becomes of its padding."""

import jax
import jax.numpy as jnp
import numpy as np

from vssd_jax.data.normalization import normalize
from vssd_jax.tasks.pixels import normalized


def test_images_are_normalised_and_their_padding_is_zero():
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    shapes = [(6, 5), (4, 2), (0, 5)]
    expected = np.zeros(images.shape, np.float32)
    for image, (height, width), out in zip(images, shapes, expected, strict=True):
        out[:height, :width] = normalize(image[:height, :width])
    found = jax.jit(normalized)(jnp.asarray(images), jnp.array(shapes, jnp.int32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found == 0, expected == 0)

    whole = jax.jit(normalized)(jnp.asarray(images))
    np.testing.assert_allclose(whole, normalize(images), rtol=0, atol=1e-6)
