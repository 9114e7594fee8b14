"""Mixup and CutMix against their definitions; statistics over seeds."""

import functools
import inspect
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from tests.conftest import flags_for
from vssd_jax.tasks.mixup import mixup_cutmix, soft_targets

N = 2000
SIZE = 24


def test_soft_targets():
    targets = np.asarray(soft_targets(jnp.array([1, 0]), 4, 0.1))
    np.testing.assert_allclose(targets, [[0.025, 0.925, 0.025, 0.025], [0.925] + [0.025] * 3])
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)


@functools.lru_cache
def draws(**settings):
    """N batches of two constant pictures, 1 and 0: a pixel is the share of the first picture."""
    images = jnp.stack([jnp.ones((SIZE, SIZE, 1)), jnp.zeros((SIZE, SIZE, 1))])

    def one(key):
        mixed, targets = mixup_cutmix(
            key, images, jnp.array([0, 1]), num_classes=2, smoothing=0.0, **settings
        )
        return mixed[..., 0], targets

    images, targets = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), N))
    return np.asarray(images), np.asarray(targets)


def close(observed_mean, mean, std, n):
    """Within five standard errors."""
    return abs(observed_mean - mean) < 5 * std / math.sqrt(n)


def test_both_kinds():
    images, targets = draws(switch_prob=0.2)
    share = targets[:, 0, 0]
    np.testing.assert_allclose(images[:, 0].mean(axis=(1, 2)), share, rtol=0, atol=1e-5)
    np.testing.assert_allclose(images[:, 1].mean(axis=(1, 2)), 1 - share, rtol=0, atol=1e-5)
    np.testing.assert_allclose(targets[:, 0, 1], 1 - share, rtol=0, atol=1e-6)
    np.testing.assert_allclose(targets[:, 1], targets[:, 0, ::-1], rtol=0, atol=1e-6)
    cutmix = np.isin(images, (0.0, 1.0)).all(axis=(1, 2, 3))
    assert close(cutmix.mean(), 0.2, 0.4, N)
    assert stats.kstest(share[~cutmix], stats.beta(0.8, 0.8).cdf).pvalue > 1e-3
    # Mixup has one value for the whole picture.
    assert np.ptp(images[~cutmix], axis=(2, 3)).max() < 1e-6


def test_defaults_are_the_recipe():
    settings = inspect.signature(mixup_cutmix).parameters
    defaults = {name: p.default for name, p in settings.items() if p.default is not p.empty}
    assert defaults == {
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "switch_prob": 0.5,
        "smoothing": 0.1,
    }


def test_cutmix_rectangles():
    """Against a simulation of the definition: sides by sqrt(1 - share), centre uniform, cut off."""
    images, targets = draws(mixup_alpha=0.0, cutmix_alpha=1.0)
    inside = images[:, 0] == 0
    area = inside.mean(axis=(1, 2))
    np.testing.assert_allclose(targets[:, 0, 0], 1 - area, rtol=0, atol=1e-6)
    rng = np.random.default_rng(0)
    side = (SIZE * np.sqrt(1 - rng.uniform(size=200_000))).astype(int)
    extents = []
    for _ in range(2):
        start = rng.integers(0, SIZE, side.shape) - side // 2
        extents.append(np.minimum(start + side, SIZE) - np.maximum(start, 0))
    expected = extents[0] * extents[1] / SIZE**2
    assert close(area.mean(), expected.mean(), expected.std(), N)
    assert abs(area.std() / expected.std() - 1) < 0.1
    for mask in inside:
        ys, xs = np.nonzero(mask)
        if len(ys):  # a full rectangle
            assert mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all()
    # Uniform in both directions, by the symmetry of the mean mask.
    mean = inside.mean(axis=0)
    for other in (mean[::-1], mean[:, ::-1], mean.T):
        assert np.abs(mean - other).max() < 5 * 0.5 / math.sqrt(N) * math.sqrt(2)
    assert mean[SIZE // 2, SIZE // 2] > mean[0, 0] + 0.1


def test_partner_is_the_reversed_batch_and_channels_mix_alike():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(6, 8, 8, 3)), jnp.float32)
    labels = jnp.array([0, 1, 2, 3, 4, 5])
    mix = jax.jit(functools.partial(mixup_cutmix, num_classes=6))
    for seed in range(8):
        mixed, targets = mix(jax.random.key(seed), images, labels)
        unsmoothed = (np.asarray(targets) - 0.1 / 6) / 0.9
        share = unsmoothed[0, 0]
        expected = share * np.eye(6) + (1 - share) * np.eye(6)[::-1]
        np.testing.assert_allclose(unsmoothed, expected, atol=1e-6)
        # Weights solved from one picture's first channel explain all of them.
        weight = np.asarray((mixed[0] - images[5]) / (images[0] - images[5]))[..., :1]
        expected = weight * images + (1 - weight) * images[::-1]
        np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-4)


def test_without_mixing_only_the_targets_are_smoothed():
    images = jnp.ones((2, 4, 4, 3))
    mixed, targets = mixup_cutmix(
        jax.random.key(0), images, jnp.array([0, 1]), num_classes=4, mixup_alpha=0, cutmix_alpha=0
    )
    assert mixed is images
    np.testing.assert_allclose(targets, soft_targets(jnp.array([0, 1]), 4, 0.1))


SHARDED = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from vssd_jax.tasks.mixup import mixup_cutmix
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
labels = np.arange(8)
images = np.broadcast_to(labels[:, None, None, None], (8, 4, 4, 3)).astype(jnp.bfloat16)
mix = jax.jit(functools.partial(mixup_cutmix, num_classes=8, cutmix_alpha=0.0, smoothing=0.0))
shares = []
for seed in range(4):
    mixed, targets = mix(jax.random.key(seed), *jax.device_put((images, labels), sharding))
    assert mixed.dtype == jnp.bfloat16 and targets.dtype == jnp.float32
    share = float(targets[0, 0])
    expected = share * np.eye(8) + (1 - share) * np.eye(8)[::-1]
    np.testing.assert_allclose(targets, expected, rtol=0, atol=1e-6)
    values = np.broadcast_to((expected @ labels)[:, None, None, None], mixed.shape)
    np.testing.assert_allclose(np.float32(mixed), values, rtol=0, atol=7 * 3 * 2**-8)
    shares.append(share)
assert len(set(shares)) == 4
"""


def test_sharded_batches_mix_across_devices():
    environment = {**os.environ, "XLA_FLAGS": flags_for(4)}
    environment["JAX_PLATFORMS"] = "cpu"
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=environment)
