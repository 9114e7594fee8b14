"""What the Pallas kernels share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)

from vssd_jax.kernels import tiles

# Few and many rows and columns, none and all of them in one step, no power of two.
SHAPES = [(1, 1), (7, 3), (1100, 2), (530, 2, 33), (5, 3000), (600, 8)]


@pytest.mark.parametrize("shapes", [[shape] for shape in SHAPES] + [SHAPES])
def test_sums_of_parts(shapes, poisoned_tails):
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(shape) for shape in shapes]
    sums = jax.jit(tiles.sum_parts)(*(jnp.asarray(part, jnp.float32) for part in parts))
    for total, part in zip(sums, parts, strict=True):
        assert total.dtype == jnp.float32
        bound = 1e-6 * len(part) ** 0.5 * np.abs(part).max()
        np.testing.assert_allclose(total, part.sum(0), rtol=0, atol=bound)


@pytest.mark.parametrize("blocks", [1, 1024, 1025, 6272])
def test_programs_are_not_too_many(blocks):
    steps = tiles.steps(blocks)
    assert -(-blocks // steps) <= tiles.PROGRAMS
    assert steps == 1 or -(-blocks // (steps - 1)) > tiles.PROGRAMS


@pytest.mark.gpu
def test_gpu_sums_of_parts():
    parts = [jnp.asarray(np.random.default_rng(0).standard_normal(s), jnp.float32) for s in SHAPES]
    first, second = (jax.jit(tiles.sum_parts)(*parts) for _ in range(2))
    for a, b, part in zip(first, second, parts, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, np.asarray(part, np.float64).sum(0), atol=1e-4)
