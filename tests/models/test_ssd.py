"""The scans in chunks against their recurrence, token by token."""

import jax
import numpy as np
import pytest

from vssd_jax.models.ssd import CHUNK, bidirectional_ssd, causal_ssd

HEADS = 4


def inputs(length, groups):
    rng = np.random.default_rng(length)
    x = rng.standard_normal((2, length, HEADS * 5))
    dt = np.log1p(np.exp(rng.standard_normal((2, length, HEADS)) - 3))
    a = -np.exp(rng.standard_normal(HEADS))
    b, c = rng.standard_normal((2, 2, length, groups, 3))
    return x, dt, a, b, c, rng.standard_normal(HEADS)


def recurrence(x, dt, a, b, c, d):
    batch, length, heads = dt.shape
    group = np.arange(heads) // (heads // b.shape[2])
    tokens, b, c = x.reshape(batch, length, heads, -1), b[:, :, group], c[:, :, group]
    state, outputs = 0, []
    for t in range(length):
        added = b[:, t, :, :, None] * (dt[:, t, :, None] * tokens[:, t])[:, :, None]
        state = np.exp(dt[:, t] * a)[..., None, None] * state + added
        outputs.append(np.einsum("bhn,bhnp->bhp", c[:, t], state) + d[:, None] * tokens[:, t])
    return np.stack(outputs, 1).reshape(x.shape)


@pytest.mark.parametrize("length", [1, 7, CHUNK, 2 * CHUNK + 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_causal(length, groups, x64):
    arguments = inputs(length, groups)
    result = jax.jit(causal_ssd)(*arguments)
    np.testing.assert_allclose(result, recurrence(*arguments), rtol=1e-10, atol=1e-12)


def test_half_of_the_heads_scan_backward(x64):
    x, dt, a, b, c, d = inputs(CHUNK + 9, 2)
    result = jax.jit(bidirectional_ssd)(x, dt, a, b, c, d)
    forward = recurrence(x[..., :10], dt[..., :2], a[:2], b[:, :, :1], c[:, :, :1], d[:2])
    backward = recurrence(
        *(t[:, ::-1] for t in (x[..., 10:], dt[..., 2:])), a[2:],
        *(t[:, ::-1, 1:] for t in (b, c)), d[2:],
    )  # fmt: skip
    expected = np.concatenate([forward, backward[:, ::-1]], axis=-1)
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-12)
