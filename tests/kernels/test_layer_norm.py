"""LayerNorm and its own gradient against the automatic one of the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssd_jax.kernels.layer_norm import layer_norm


def reference(x, scale, bias, gate):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias
    return y if gate is None else y * gate


def inputs(shape, *, gated):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) + 2
    scale, bias = rng.standard_normal((2, shape[-1]))
    gate = rng.standard_normal(shape) if gated else None
    return (x, scale, bias, gate), rng.standard_normal(shape)


def value_and_gradients(f, arguments, dy):
    y, vjp = jax.vjp(f, *arguments)
    return y, *jax.tree.leaves(vjp(dy))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (7, 3)])
def test_float64(shape, gated):
    with jax.enable_x64(True):
        arguments, dy = jax.tree.map(jnp.asarray, inputs(shape, gated=gated))
        expected = value_and_gradients(reference, arguments, dy)
        found = value_and_gradients(layer_norm, arguments, dy)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_bfloat16(gated):
    """Statistics and sums are in float32; gradients come in the types of the arguments."""
    arguments, dy = inputs((2, 40, 16), gated=gated)
    x, scale, bias, gate = arguments
    narrow = [None if t is None else jnp.asarray(t, jnp.bfloat16) for t in (x, gate, dy)]
    wide = [None if t is None else t.astype(jnp.float32) for t in narrow]
    scale, bias = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    expected = value_and_gradients(reference, (wide[0], scale, bias, wide[1]), wide[2])
    found = value_and_gradients(layer_norm, (narrow[0], scale, bias, narrow[1]), narrow[2])
    kinds = [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16]
    for a, b, kind in zip(found, expected, kinds, strict=False):
        assert a.dtype == kind
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=1e-2 * float(jnp.abs(b).max()))
