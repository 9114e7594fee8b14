"""Weights and resampling for rare classes."""

import numpy as np

from vssd_jax.data.balance import LIMIT, Resampled, balanced_weights, resample, sample_weights


def test_every_class_weighs_as_much_in_all():
    counts = np.array([60, 30, 10])
    weights = balanced_weights(counts)
    np.testing.assert_allclose(weights * counts, [100 / 3] * 3, rtol=1e-6)
    np.testing.assert_array_equal(balanced_weights(np.array([10**6, 1, 0]))[1:], [LIMIT, 1])


def test_samples_of_rare_classes_come_more_often():
    present = np.zeros((100, 2), bool)
    present[:, 0] = True
    present[:4, 1] = True
    weights = sample_weights(present)
    np.testing.assert_allclose(weights[4:], 1)
    np.testing.assert_allclose(weights[:4], 5)  # a share of 1 / 25


def test_resampling_keeps_to_the_shares():
    rng = np.random.default_rng(0)
    weights = rng.random(50)
    counts = np.bincount(resample(weights, 400, rng), minlength=50)
    assert counts.sum() == 400
    assert (np.abs(counts - 400 * weights / weights.sum()) <= 1).all()


def test_an_order_is_a_function_of_seed_and_epoch():
    class Numbers:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return {"number": index}

    def read(seed):
        source = Resampled(Numbers(), np.arange(10) + 1.0, 4, seed=seed, steps=6)
        return [source[i]["number"] for i in range(len(source))]

    first = read(1)
    assert len(first) == 24
    assert first == read(1) != read(2)
    assert first[:8] != first[8:16]
    backwards = Resampled(Numbers(), np.arange(10) + 1.0, 4, seed=1, steps=6)
    assert [backwards[i]["number"] for i in reversed(range(24))] == first[::-1]
