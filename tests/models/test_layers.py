"""Layers that models share: BatchNorm, drop path, dropout, and which parameters are norms'."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vssd_jax.kernels.add_branch import add_branch
from vssd_jax.models.family import build
from vssd_jax.models.layers import (
    BatchNorm,
    ChannelDropout,
    DropPath,
    Precision,
    batch_norm_groups,
)
from vssd_jax.models.split import SplitModel


def test_batch_norm_keeps_pytorchs_statistics(x64):
    x = np.random.default_rng(0).normal(2, 3, (4, 5, 3, 2))
    norm = BatchNorm(2, precision=Precision(jnp.float64))
    y = norm(jnp.asarray(x))
    np.testing.assert_allclose(np.mean(y, (0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(norm.mean[...], 0.1 * x.mean((0, 1, 2)))
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1))


def test_batch_norm_averages_the_statistics_of_groups(x64):
    x = np.random.default_rng(0).normal(2, 3, (4, 5, 3, 2))
    norm = BatchNorm(2, precision=Precision(jnp.float64))
    batch_norm_groups(norm, 2)
    y = norm(jnp.asarray(x)).reshape(2, 30, 2)
    np.testing.assert_allclose(y.mean(1), 0, atol=1e-12)
    groups = x.reshape(2, 30, 2)
    np.testing.assert_allclose(norm.mean[...], 0.1 * groups.mean(1).mean(0))
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * groups.var(1, ddof=1).mean(0))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop = DropPath([0.0, 0.3])
    first, drawn = drop(4000, nnx.Rngs(dropout=0))
    assert first is None
    scales = np.asarray(drawn)
    assert scales.shape == (2, 4000)
    x, branch = jnp.ones((4000, 2, 2)), jnp.full((4000, 2, 2), 3.0)
    kept = scales > 0
    np.testing.assert_allclose(scales[kept], 1 / 0.7, rtol=1e-6)
    for scale, here in zip(scales, kept, strict=True):
        expected = np.broadcast_to((1 + 3 * scale)[:, None, None], x.shape)
        scaled = add_branch(x, branch, jnp.asarray(scale))
        np.testing.assert_allclose(scaled, expected, rtol=1e-6)
        assert abs(here.mean() - 0.7) < 3 * (0.3 * 0.7 / 4000) ** 0.5
    # A block's branches are dropped independently of each other: both stay with probability 0.49.
    assert abs(kept.all(0).mean() - 0.49) < 3 * (0.49 * 0.51 / 4000) ** 0.5
    with pytest.raises(ValueError, match="rngs"):
        drop(1, None)
    drop.eval()
    assert drop(9, None) == [None, None]
    assert (add_branch(x, branch, None) == 4).all()


def test_dropout_drops_whole_channels_in_training_alone():
    dropout = ChannelDropout(0.25)
    x = jnp.ones((8, 3, 4, 64))
    y = np.asarray(dropout(x, nnx.Rngs(dropout=0)))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert (y == y[:, :1, :1]).all()
    assert 0.15 < (y == 0).mean() < 0.35
    with pytest.raises(ValueError, match="rngs"):
        dropout(x, None)
    dropout.eval()
    assert dropout(x, None) is x


@pytest.mark.parametrize("name", ["vssd_nano", "mask_rcnn_vssd_nano", "upernet_vssd_nano"])
def test_the_norms_of_every_model_are_found(name):
    """By the names that they happen to have, as weight decay was chosen in earlier versions."""
    model = SplitModel(lambda rngs: build(name, rngs=rngs))
    named = {
        name
        for name in model.parameter_shapes
        if {"norm", "norm1", "norm2", "out_norms"} & set(name.split("."))
    }
    assert model.norm_parameters == named
