"""Batch normalisation and its own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.kernels.test_tables import run_on_cpus
from vssd_jax.errors import UserError
from vssd_jax.kernels.batch_norm import batch_norm


def test_batch_norm_has_the_gradient_of_the_formula(x64):
    rng = np.random.default_rng(0)
    x, dy = map(jnp.asarray, rng.normal(2, 3, (2, 4, 5, 3, 2)))
    scale, bias = map(jnp.asarray, rng.normal(1, 0.2, (2, 2)))

    def formula(x, scale, bias):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    def ours(x, scale, bias):
        return batch_norm(x, scale, bias, 1e-5, x.dtype)[0]

    for f in (ours, jax.checkpoint(ours)):
        for a, b in zip(
            jax.vjp(f, x, scale, bias)[1](dy), jax.vjp(formula, x, scale, bias)[1](dy), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("images", [1, 2, 3, 6])
def test_groups_are_batches_of_pytorch(images, x64):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(2, 3, (2, 6, 5, 4, 3)) * np.arange(1, 7)[:, None, None, None]
    scale, bias = rng.normal(1, 0.2, (2, 3))

    norm = torch.nn.BatchNorm2d(3).double()
    with torch.no_grad():
        norm.weight[:], norm.bias[:] = torch.tensor(scale), torch.tensor(bias)
    theirs = torch.tensor(np.moveaxis(x, -1, 1), requires_grad=True)
    y = torch.cat([norm(group) for group in theirs.split(images)])
    y.backward(torch.tensor(np.moveaxis(dy, -1, 1)))

    def ours(x, scale, bias):
        return batch_norm(x, scale, bias, 1e-5, x.dtype, images=images)

    (found, mean, var), pullback = jax.vjp(ours, *map(jnp.asarray, (x, scale, bias)))
    zeros = jnp.zeros_like(mean)
    pairs = [
        (found, y.detach().movedim(1, -1)),
        *zip(
            pullback((jnp.asarray(dy), zeros, zeros)),
            (theirs.grad.movedim(1, -1), norm.weight.grad, norm.bias.grad),
            strict=True,
        ),
        (mean, x.mean((0, 1, 2))),
        (var, x.reshape(-1, images * 20, 3).var(1).mean(0)),
    ]
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_a_batch_has_whole_groups():
    one = jnp.ones(3)
    with pytest.raises(UserError, match="a batch of 6 has no whole groups of 4 images"):
        batch_norm(jnp.ones((6, 5, 4, 3)), one, one, 1e-5, jnp.float32, images=4)


# Groups within a device's part of the batch, of several devices, and that devices share.
SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from vssd_jax.kernels.batch_norm import batch_norm

jax.config.update("jax_enable_x64", True)
devices = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
for batch, images, alone in ((16, 2, True), (16, 4, True), (16, 8, False), (12, 2, False)):
    x = rng.normal(2, 3, (batch, 4, 5, 3))
    scale, bias = rng.normal(1, 0.2, (2, 3))

    def normalise(x, scale, bias):
        return batch_norm(x, scale, bias, 1e-5, x.dtype, images=images)[0]

    def gradient(x, scale, bias):
        return jax.grad(lambda *a: jnp.square(normalise(*a)).sum(), (0, 1, 2))(x, scale, bias)

    for f in (normalise, gradient):
        expected = f(x, scale, bias)
        with jax.set_mesh(devices):
            placed = jax.device_put(x, NamedSharding(devices, P(("data", "fsdp"))))
            compiled = jax.jit(f).lower(placed, scale, bias).compile()
            found = compiled(placed, scale, bias)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)
        assert jax.tree.leaves(found)[0].sharding.spec[0] == ("data", "fsdp")
        text = compiled.as_text()
        assert "all-to-all" not in text
        for line in text.splitlines():  # of moments, not of activations
            if "all-gather(" in line or "collective-permute(" in line:
                assert ",4,5," not in line, line
        if alone and f is normalise:
            assert "all-" not in text and "collective" not in text, text
    print("groups", batch, images, flush=True)
"""


def test_groups_stay_on_their_devices():
    assert run_on_cpus(SHARDED, devices=4).count("groups") == 4
