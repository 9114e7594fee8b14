import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from vssd_jax.tasks.random_erasing import erase


def test_erase_fills_the_rectangles_only():
    images = jnp.full((4, 20, 30, 3), 7.0)
    boxes = jnp.array([[2, 3, 5, 7], [0, 0, 0, 0], [0, 0, 20, 30], [19, 29, 1, 1]])
    result = np.asarray(jax.jit(erase)(jax.random.key(0), images, boxes))
    expected = np.zeros((4, 20, 30), bool)
    for mask, (top, left, height, width) in zip(expected, boxes, strict=True):
        mask[top : top + height, left : left + width] = True
    np.testing.assert_array_equal((result != 7).all(axis=-1), expected)
    np.testing.assert_array_equal((result != 7).any(axis=-1), expected)


def test_erase_noise_is_standard_normal_per_pixel_and_channel():
    images = jnp.zeros((8, 32, 32, 3))
    boxes = jnp.tile(jnp.array([0, 0, 32, 32]), (8, 1))
    noise = np.asarray(erase(jax.random.key(1), images, boxes))
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert len(np.unique(noise)) > 0.95 * noise.size
    other = erase(jax.random.key(2), images, boxes)
    assert abs(np.corrcoef(noise.ravel(), np.ravel(other))[0, 1]) < 5 / np.sqrt(noise.size)
