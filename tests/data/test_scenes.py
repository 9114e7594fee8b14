import numpy as np
import pytest

from vssd_jax.data.scenes import make_scene


def scene(seed, **options):
    return make_scene(np.random.default_rng(seed), **options)


def test_same_seed_same_scene():
    (image, instances), (again, others) = scene(3), scene(3)
    np.testing.assert_array_equal(image, again)
    assert [i.label for i in instances] == [i.label for i in others]
    assert not np.array_equal(image, scene(4)[0])


@pytest.mark.parametrize("seed", range(20))
def test_boxes_and_masks_are_exact_and_disjoint(seed):
    image, instances = scene(seed, size=(96, 140), num_digits=(3, 8))
    assert image.shape == (96, 140, 3)
    assert image.dtype == np.uint8
    assert instances
    total = np.sum([i.mask for i in instances], axis=0)
    assert total.max() == 1
    for instance in instances:
        ys, xs = np.nonzero(instance.mask)
        np.testing.assert_array_equal(
            instance.box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        )
        assert 0 <= instance.label <= 9


def test_digits_occlude_each_other_but_stay_visible():
    # Alone, the digits of a crowded scene would cover more than what is visible of them.
    hidden = 0
    for seed in range(10):
        _, instances = scene(seed, num_digits=(6, 6), min_visible=0.5)
        hidden += sum(
            _boxes_overlap(a.box, b.box) for a in instances for b in instances if a is not b
        )
    assert hidden > 0


def test_a_digit_larger_than_the_scene_is_cut_to_it():
    image, instances = scene(0, size=(32, 32), digit_size=(40, 60), num_digits=(1, 1))
    assert image.shape == (32, 32, 3)
    assert len(instances) == 1


def _boxes_overlap(a, b):
    return bool(np.all(np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])))
