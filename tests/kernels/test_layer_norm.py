"""LayerNorm and its own gradient against the automatic one of the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import rows
from vssd_jax.kernels.layer_norm import OPERATION, cpu, layer_norm, xla


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


GATED = pytest.mark.parametrize("gated", [False, True])
# Tails of rows and channels, a row of one, many rows in a program, none of a power of two.
SHAPES = [(2, 3, 5, 8), (7, 3), (1, 1, 20), (3, 211, 48), (2, 130, 384)]


@GATED
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("run", [layer_norm, xla.layer_norm, cpu.layer_norm])
def test_float64(shape, gated, run):
    with jax.enable_x64(True):
        arguments, dy = jax.tree.map(jnp.asarray, inputs(shape, gated=gated))
        expected = value_and_gradients(reference, arguments, dy)
        found = value_and_gradients(lambda *a: run(*a, 1e-5), arguments, dy)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def compare(run, shape, gated, dtype):
    """Statistics and sums are in float32; gradients come in the types of the arguments."""
    with jax.enable_x64(True):
        arguments, dy = inputs(shape, gated=gated)
        x, scale, bias, gate = arguments
        narrow = [None if t is None else jnp.asarray(t, dtype) for t in (x, gate, dy)]
        wide = [None if t is None else t.astype(jnp.float64) for t in narrow]
        scale, bias = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
        weights = [t.astype(jnp.float64) for t in (scale, bias)]
        expected = value_and_gradients(reference, (wide[0], *weights, wide[1]), wide[2])
        found = value_and_gradients(run, (narrow[0], scale, bias, narrow[1]), narrow[2])
        # A few roundings of the largest value; float32 loses some bits in the moments and sums.
        tolerance = 4 * float(jnp.finfo(dtype).eps) + 2e-6
        for a, b, kind in zip(found, expected, [dtype, dtype, "f4", "f4", dtype], strict=False):
            assert a.dtype == kind
            bound = tolerance * float(jnp.abs(b).max())
            np.testing.assert_allclose(a.astype(jnp.float64), b, rtol=0, atol=bound)


@GATED
@pytest.mark.parametrize("run", [layer_norm, xla.layer_norm])
def test_bfloat16(gated, run):
    compare(lambda *a: run(*a, 1e-5), (2, 40, 16), gated, jnp.bfloat16)


@GATED
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, jnp.float32) for shape in SHAPES]
    + [(SHAPES[0], jnp.bfloat16), (SHAPES[-1], jnp.float16)],
)
def test_the_kernel(shape, gated, dtype, poisoned_tails):
    interpreted = functools.partial(rows.pallas(OPERATION).layer_norm, epsilon=1e-5)
    compare(interpreted, shape, gated, dtype)


def test_what_the_kernel_cannot_do(x64):
    supports = rows.pallas(OPERATION).supports
    assert "float64" in supports(jnp.zeros((3, 4), jnp.float64))
    assert "4096 channels" in supports(jnp.zeros((3, 4096), jnp.float32))


@pytest.mark.gpu
@GATED
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 3136, 128), (4, 56, 56, 64), (4, 49, 2048)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gpu(shape, gated, implementation, dtype):
    compare(functools.partial(layer_norm, implementation=implementation), shape, gated, dtype)
