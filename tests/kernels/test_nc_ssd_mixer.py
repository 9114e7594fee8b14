"""The mixer from its projection to the residual sum, against the formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import rows, test_depthwise_conv, test_nc_ssd
from vssd_jax.kernels.nc_ssd.specs import Spec
from vssd_jax.kernels.nc_ssd_mixer import OPERATION, MixerParams, nc_ssd_mixer, xla

EPSILON = test_nc_ssd.EPSILON
CASES = [  # height and width of the picture, channels, heads and their sizes
    (7, 5, 24, Spec("odd", 35, 3, 20, 5)),
    (9, 8, 48, Spec("micro", 72, 2, 48, 48)),
    (3, 23, 16, Spec("two groups", 69, 4, 16, 24, groups=2)),
    (1, 1, 16, Spec("one token", 1, 2, 16, 16)),
]
SIXTEEN_BITS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 1.5e-3)]
)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def by_name(case):
    return case[-1].name.replace(" ", "-")


def arguments(case, batch, dtype):
    """Those of `nc_ssd_mixer`, with a branch scale of ones."""
    height, width, channels, spec = case
    rng = np.random.default_rng(1)
    a = spec.arguments(batch, dtype)
    wide = a["d"].dtype

    def normal(*shape, dtype=wide):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    def picture(t):
        return t.reshape(batch, height, width, -1)

    return [
        normal(batch, height, width, channels, dtype=dtype),
        picture(a["xbc"]),
        picture(a["token_weights"]),
        picture(a["z"]),
        jnp.ones(batch, wide),
        MixerParams(
            normal(3, 3, spec.width) / 3,
            normal(spec.width) / 3,
            a["d"],
            a["scale"],
            a["bias"],
            normal(spec.inner, channels) / spec.inner**0.5,
        ),
    ]


def formula(x, xbc, token_weights, z, branch_scale, params, *, spec):
    conv_kernel, conv_bias, d, scale, bias, out_kernel = params
    xbc = test_depthwise_conv.reference(xbc, conv_kernel, conv_bias, 1, "silu", False)
    xbc, token_weights, z = (t.reshape(len(t), -1, t.shape[-1]) for t in (xbc, token_weights, z))
    y = test_nc_ssd.formula(xbc, token_weights, d, z, scale, bias, spec=spec)
    return x + branch_scale.reshape(-1, 1, 1, 1) * (y @ out_kernel).reshape(x.shape)


def compare(f, case, batch, dtype, tolerance, gradients=True):
    args, spec = arguments(case, batch, dtype), case[-1]
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), args)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, args):
        if not gradients:
            return (f(*args),)
        y, vjp = jax.vjp(f, *args)
        return y, *vjp(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

    expected = run(functools.partial(formula, spec=spec), wide)
    actual = run(functools.partial(f, groups=spec.groups, epsilon=EPSILON), args)
    assert actual[0].dtype == dtype
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        error = jnp.linalg.norm((a.astype(jnp.float64) - b).ravel())
        assert error < tolerance * jnp.linalg.norm(b.ravel())


def interpreted(x, xbc, token_weights, z, branch_scale, params, **options):
    f = rows.pallas(OPERATION).nc_ssd_mixer
    return f(x, xbc, token_weights, z, None, params, **options)


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_xla_float64(case):
    compare(functools.partial(xla.nc_ssd_mixer, implementation="xla"), case, 2, jnp.float64, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_pallas_float32(case, poisoned_tails):
    compare(interpreted, case, 2, jnp.float32, 1e-5, gradients=False)


@SIXTEEN_BITS
def test_pallas_narrow(dtype, tolerance):
    compare(interpreted, CASES[0], 2, dtype, tolerance, gradients=False)


def test_what_the_kernels_cannot_do():
    supports = rows.pallas(OPERATION).supports
    *arrays, branch_scale, _ = arguments(CASES[0], 1, jnp.bfloat16)
    assert supports(*arrays, None, groups=1) is None
    assert "stochastic depth" in supports(*arrays, branch_scale, groups=1)
    arrays[0] = arrays[0].astype(jnp.float32)
    assert "float32" in supports(*arrays, None, groups=1)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [None, "pallas", "triton", "xla"])
@pytest.mark.parametrize(
    "case",
    [
        (56, 56, 64, Spec("tiny stage 1", 3136, 2, 64, 64)),
        (14, 14, 256, Spec("tiny stage 3", 196, 8, 64, 64)),
        (28, 28, 96, Spec("micro stage 2", 784, 4, 48, 48)),
        *CASES,
    ],
    ids=by_name,
)
@SIXTEEN_BITS
def test_gpu(case, implementation, dtype, tolerance):
    def f(x, xbc, token_weights, z, branch_scale, params, **options):
        options["implementation"] = implementation
        return nc_ssd_mixer(x, xbc, token_weights, z, None, params, **options)

    compare(f, case, 4, dtype, tolerance, gradients=False)
