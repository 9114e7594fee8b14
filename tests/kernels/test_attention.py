"""Attention against the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import rows
from vssd_jax.kernels.attention import OPERATION, attention, xla

CASES = [(49, 4, 32), (49, 2, 24), (17, 3, 5), (1, 1, 16)]  # tokens, heads, P


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def formula(qkv, *, heads):
    width = qkv.shape[-1] // 3
    outputs = []
    for head in range(heads):
        size = width // heads
        q, k, v = (qkv[..., i * width + head * size :][..., :size] for i in range(3))
        outputs.append(jax.nn.softmax(q @ k.mT / np.sqrt(size)) @ v)
    return jnp.concatenate(outputs, axis=-1)


def compare(f, case, dtype, tolerance):
    length, heads, head_dim = case
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((2, length, 3 * heads * head_dim)), dtype)
    dy = jnp.asarray(rng.standard_normal((2, length, heads * head_dim)), dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, qkv, dy):
        y, vjp = jax.vjp(f, qkv)
        return y, *vjp(dy)

    wide = (qkv.astype(jnp.float64), dy.astype(jnp.float64))
    expected = run(functools.partial(formula, heads=heads), *wide)
    actual = run(functools.partial(f, heads=heads), qkv, dy)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert jnp.linalg.norm(a.astype(jnp.float64) - b) < tolerance * jnp.linalg.norm(b)


@pytest.mark.parametrize("case", CASES)
def test_xla_float64(case):
    compare(xla.attention, case, jnp.float64, 1e-13)


@pytest.mark.parametrize("case", CASES)
def test_pallas_float32(case, poisoned_tails):
    compare(rows.pallas(OPERATION).attention, case, jnp.float32, 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 1.5e-3)])
def test_pallas_narrow(dtype, tolerance):
    compare(rows.pallas(OPERATION).attention, CASES[0], dtype, tolerance)


def test_what_the_kernel_cannot_do():
    supports = rows.pallas(OPERATION).supports
    assert "200 tokens" in supports(jnp.zeros((1, 200, 3 * 32), jnp.float32), heads=1)
    assert "float64" in supports(jnp.zeros((1, 49, 3 * 32), jnp.float64), heads=1)


@pytest.mark.parametrize(
    ("length", "dtype", "chosen"),
    [
        (49, jnp.bfloat16, "pallas"),
        (49, jnp.float32, "pallas"),
        (49, jnp.float64, "xla"),
        (196, jnp.bfloat16, "cudnn"),
        (196, jnp.float32, "xla"),
    ],
)
def test_the_choice_on_a_gpu(length, dtype, chosen):
    pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)
    with rows.on_a_gpu():
        assert OPERATION.choose(None, qkv=jnp.zeros((1, length, 96), dtype), heads=1) == chosen


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [None, "pallas", "xla"])
@pytest.mark.parametrize("case", CASES)
def test_gpu(case, implementation):
    f = functools.partial(attention, implementation=implementation)
    compare(f, case, jnp.bfloat16, 1e-2)


@pytest.mark.gpu
def test_gpu_many_tokens():
    compare(attention, (196, 4, 32), jnp.bfloat16, 1e-2)
