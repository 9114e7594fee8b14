"""Sampling of positive and negative boxes."""

import jax
import numpy as np

from vssd_jax.models.detection.assigner import IGNORED, NEGATIVE
from vssd_jax.models.detection.sampler import sample


def test_sampling():
    assigned = np.array([3] * 10 + [NEGATIVE] * 50 + [IGNORED] * 40)
    run = jax.jit(sample, static_argnums=(2, 3))
    seen = set()
    for seed in range(20):
        index, used = (np.asarray(x) for x in run(jax.random.key(seed), assigned, 16, 0.25))
        chosen = assigned[index]
        assert used.all()
        assert len(set(index)) == 16
        np.testing.assert_array_equal(chosen, [3] * 4 + [NEGATIVE] * 12)
        seen |= set(index.tolist())
    assert seen >= set(range(10))
    # Too few positives are filled up; too few boxes leave places unused.
    index, used = run(jax.random.key(0), assigned[8:], 16, 0.25)
    np.testing.assert_array_equal(assigned[8:][index], [3] * 2 + [NEGATIVE] * 14)
    index, used = run(jax.random.key(0), assigned[57:], 16, 0.25)
    np.testing.assert_array_equal(used, [True] * 3 + [False] * 13)
