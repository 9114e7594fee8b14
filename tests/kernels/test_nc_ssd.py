"""NC-SSD: every implementation against the formula in float64."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import rows
from vssd_jax.kernels import nc_ssd as operation
from vssd_jax.kernels.nc_ssd import GATED_OPERATION, OPERATION, specs, xla

NAMES = tuple(inspect.signature(operation.nc_ssd_gated).parameters)[:6]
EPSILON = 1e-5


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def formula(xbc, token_weights, d, z, scale, bias, *, spec, silu=False):
    """The definition, head by head."""
    xbc = jax.nn.silu(xbc) if silu else xbc
    x, b, c = jnp.split(xbc, (spec.inner, spec.inner + spec.groups * spec.state), axis=-1)
    heads = []
    for head in range(spec.heads):
        xh = x[..., head * spec.head_dim :][..., : spec.head_dim]
        start = (head % spec.groups) * spec.state
        bh, ch = (t[..., start : start + spec.state] for t in (b, c))
        state = jnp.einsum("bln,blp->bnp", bh, xh * token_weights[..., head, None])
        heads.append(jnp.einsum("bln,bnp->blp", ch, state) + d[head] * xh)
    y = jnp.concatenate(heads, axis=-1)
    y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + EPSILON)
    return (y * scale + bias) * z


def value_and_gradients(f, arguments):
    @jax.jit
    def run(values):
        y, vjp = jax.vjp(f, *values)
        dy = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)
        return y, *vjp(dy)

    return run([arguments[name] for name in NAMES])


def compare(f, spec, batch, dtype, tolerance, silu=False):
    arguments = spec.arguments(batch, dtype)
    expected = value_and_gradients(
        functools.partial(formula, spec=spec, silu=silu),
        {name: value.astype(jnp.float64) for name, value in arguments.items()},
    )
    f = functools.partial(f, inner=spec.inner, groups=spec.groups, epsilon=EPSILON, silu=silu)
    actual = value_and_gradients(f, arguments)
    for name, a, b in zip(("y", *NAMES), actual, expected, strict=True):
        error = jnp.linalg.norm(a.astype(jnp.float64) - b) / jnp.linalg.norm(b)
        assert error < tolerance, f"{name}: {error}"


def interpreted(*args, **kwargs):
    return rows.pallas(GATED_OPERATION).nc_ssd_gated(*args, **kwargs)


def by_name(spec):
    return spec.name.replace(" ", "-")


@pytest.mark.parametrize("spec", specs.EDGES, ids=by_name)
def test_xla_float64(spec):
    compare(xla.nc_ssd_gated, spec, 2, jnp.float64, 1e-12)


# Rounding in float32: of sums over up to 3136 tokens, and of the norm's small differences.
@pytest.mark.parametrize("spec", specs.EDGES, ids=by_name)
def test_pallas_float32(spec, poisoned_tails):
    compare(interpreted, spec, 2, jnp.float32, 1e-5)


@pytest.mark.parametrize("spec", specs.EDGES[2:4], ids=by_name)
def test_silu_while_reading(spec, poisoned_tails):
    compare(interpreted, spec, 2, jnp.float32, 1e-5, silu=True)
    compare(interpreted, spec, 2, jnp.bfloat16, 1e-2, silu=True)
    compare(xla.nc_ssd_gated, spec, 2, jnp.float64, 1e-12, silu=True)


# Heads, P and N of the network; fewer tokens, as interpret mode takes minutes for 3136.
@pytest.mark.slow
@pytest.mark.parametrize("spec", specs.NETWORK, ids=by_name)
def test_pallas_on_the_heads_of_the_network(spec, poisoned_tails):
    spec = dataclasses.replace(spec, length=min(spec.length, 67))
    compare(interpreted, spec, 1, jnp.float32, 1e-5)


# Inputs are exact; rounded are the weighted tokens, the state, y and every gradient.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 1.5e-3)])
@pytest.mark.parametrize("f", [xla.nc_ssd_gated, interpreted], ids=["xla", "pallas"])
def test_narrow_types(f, dtype, tolerance):
    compare(f, specs.EDGES[0], 2, dtype, tolerance)


def test_without_norm_and_under_transformations():
    spec = specs.Spec("small", 20, 2, 16, 16)
    arguments = spec.arguments(2)
    xbc, weights, d = (arguments[name] for name in NAMES[:3])
    options = {"inner": spec.inner, "groups": 1}
    kernel = functools.partial(rows.pallas(OPERATION).nc_ssd, **options)
    reference = functools.partial(xla.nc_ssd, **options)

    np.testing.assert_allclose(kernel(xbc, weights, d), reference(xbc, weights, d), atol=2e-5)

    def gradient(f):
        def loss(x, w, d):
            return jnp.square(jax.checkpoint(f)(x, w, d)).sum()

        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(0, 0, None)))

    stacked = (jnp.stack([xbc, -xbc]), jnp.stack([weights, weights]), d)
    for a, b in zip(gradient(kernel)(*stacked), gradient(reference)(*stacked), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_what_the_kernels_cannot_do():
    a, supports = specs.EDGES[0].arguments(1, jnp.float64), rows.pallas(OPERATION).supports
    assert "float64" in supports(a["xbc"], a["token_weights"], inner=128, groups=1)
    wide = jnp.zeros((1, 3, 64 + 2 * 300)), jnp.zeros((1, 3, 1))
    assert "a state of 300 x 64" in supports(*wide, inner=64, groups=1)


@pytest.mark.parametrize(
    ("dtype", "implementation", "expected"),
    [
        (jnp.bfloat16, None, True),
        (jnp.bfloat16, "pallas", True),
        (jnp.bfloat16, "xla", False),
        (jnp.float64, None, False),
    ],
)
def test_silu_goes_with_the_implementation(dtype, implementation, expected):
    pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)
    a = specs.EDGES[0].arguments(1, dtype)
    f = functools.partial(
        operation.applies_silu_on_load, a["xbc"], a["token_weights"], inner=128, groups=1
    )
    with rows.on_a_gpu():
        assert f(implementation=implementation) == expected
    assert not f(implementation=None) or jax.default_backend() == "gpu"


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["xla", "pallas", "triton"])
@pytest.mark.parametrize("spec", specs.EDGES + specs.NETWORK, ids=by_name)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2), (jnp.float16, 1.5e-3)]
)
def test_gpu(spec, implementation, dtype, tolerance):
    f = functools.partial(operation.nc_ssd_gated, implementation=implementation)
    with jax.default_matmul_precision("highest"):
        compare(f, spec, 4, dtype, tolerance, silu=spec in specs.NETWORK)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["pallas", "triton"])
def test_gpu_results_repeat_bit_for_bit(implementation):
    spec = specs.EDGES[0]
    f = functools.partial(
        operation.nc_ssd_gated, implementation=implementation, inner=spec.inner, groups=1
    )
    first, second = (value_and_gradients(f, spec.arguments(8, jnp.bfloat16)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a == b).all()
