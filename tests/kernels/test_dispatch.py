"""The choice of an implementation, and kernels under a sharded jit."""

import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssd_jax.errors import UserError
from vssd_jax.kernels import dispatch
from vssd_jax.kernels.nc_ssd import nc_ssd, specs, xla
from vssd_jax.models.vssd import VSSD

SPEC = specs.Spec("small", 20, 2, 16, 16)


def call(implementation, dtype=jnp.float32):
    a = SPEC.arguments(2, dtype)
    return nc_ssd(
        a["xbc"], a["token_weights"], a["d"], inner=SPEC.inner, implementation=implementation
    )


def test_a_cpu_takes_xla_and_says_nothing(caplog):
    if jax.default_backend() != "cpu":
        pytest.skip("of a CPU")
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(call(None), call("xla"))
    assert not caplog.records


@pytest.mark.parametrize("implementation", ["pallas", "triton"])
def test_a_forced_kernel_that_cannot_run_is_an_error(implementation):
    if jax.default_backend() != "cpu":
        pytest.skip("of a CPU")
    with pytest.raises(UserError, match=f"'{implementation}'.*needs an NVIDIA GPU.*'xla'"):
        call(implementation)


def test_unknown_names():
    with pytest.raises(UserError, match=r"unknown implementation 'cuda'.*xla, pallas, triton"):
        call("cuda")
    with pytest.raises(UserError, match="unknown implementation 'cuda'"):
        VSSD(None, implementation="cuda", rngs=None)


def test_a_gpu_falls_back_once_and_says_so(monkeypatch, caplog):
    gpu = dispatch.Target("gpu", "some GPU")
    monkeypatch.setattr(dispatch, "target", lambda: gpu)
    monkeypatch.setattr(dispatch.Target, "lacks_triton", lambda self: None)
    dispatch._say_once.cache_clear()
    with jax.enable_x64(True), caplog.at_level(logging.WARNING):
        for _ in range(2):
            call(None, jnp.float64)
        with pytest.raises(UserError, match="float64"):
            call("pallas", jnp.float64)
    assert [record.getMessage().count("falls back to XLA") for record in caplog.records] == [1]


def test_export():
    a = SPEC.arguments(2)

    def f(xbc, token_weights, d):
        return nc_ssd(xbc, token_weights, d, inner=SPEC.inner)

    arguments = [a[name] for name in ("xbc", "token_weights", "d")]
    exported = jax.export.export(jax.jit(f))(*arguments)
    expected = xla.nc_ssd(*arguments, inner=SPEC.inner, groups=1)
    np.testing.assert_allclose(exported.call(*arguments), expected, rtol=1e-5, atol=1e-5)


def test_a_kernel_for_inference_has_the_gradient_of_the_plain_function():
    f = dispatch.for_inference(lambda x, none, w: 7 * x, lambda x, none, w: jnp.sin(x) * w)
    x, w = jnp.arange(3.0), jnp.full(3, 2.0)

    def loss(x, w):
        return f(x, None, w).sum()

    np.testing.assert_array_equal(jax.jit(f)(x, None, w), 7 * x)
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(x, w)
    np.testing.assert_allclose(value, 2 * np.sin(x).sum(), rtol=1e-6)
    for wrap in (jax.jit, jax.checkpoint, lambda g: jax.vmap(g, in_axes=0)):
        actual = wrap(jax.grad(lambda x, w: f(x, None, w).sum(), argnums=(0, 1)))(x, w)
        for a, b, expected in zip(actual, gradients, (2 * np.cos(x), np.sin(x)), strict=True):
            np.testing.assert_allclose(a, expected, rtol=1e-6)
            np.testing.assert_allclose(b, expected, rtol=1e-6)


SHARDED = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from vssd_jax.kernels.nc_ssd import api, pallas, specs

spec = specs.Spec("small", 20, 2, 16, 16)
a = spec.arguments(8)
a = [a[n] for n in ("xbc", "token_weights", "d", "z", "scale", "bias")]
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
# The interpreter stands in for the GPU.
kernel = type("kernel", (), {
    "nc_ssd_gated": staticmethod(functools.partial(pallas.nc_ssd_gated, interpret=True))})
api._implementation = lambda *args: kernel

def gradients(*a):
    f = lambda *a: jnp.square(api.nc_ssd_gated(*a, inner=spec.inner)).sum()
    return jax.grad(f, argnums=range(6))(*a)

expected = jax.jit(gradients)(*a)
placed = [jax.device_put(v, NamedSharding(mesh, P("data") if v.ndim > 1 else P())) for v in a]
with jax.set_mesh(mesh):
    compiled = jax.jit(gradients).lower(*placed).compile()
text = compiled.as_text()
assert "all-gather" not in text and "all-to-all" not in text, "gathered"
assert "all-reduce" in text, "the gradients of D and the norm are sums over all devices"
for x, y in zip(compiled(*placed), expected):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * float(jnp.abs(y).max()))
print("sharded", compiled.output_shardings[0].spec)

from vssd_jax.kernels.mlp import api as mlp, pallas as mlp_pallas

mlp.dispatch.choose = lambda *args, **options: "pallas"
mlp_pallas.mlp = functools.partial(mlp_pallas.mlp, interpret=True)
weights = [jnp.ones(s) for s in [(16,), (16,), (16, 64), (64,), (64, 16), (16,)]]
x = jax.device_put(jnp.ones((8, 3, 16), jnp.bfloat16), NamedSharding(mesh, P("data")))
with jax.set_mesh(mesh):
    f = jax.jit(lambda x, *weights: mlp.mlp(x, None, *weights, implementation="pallas"))
    compiled = f.lower(x, *weights).compile()
assert "all-gather" not in compiled.as_text(), "gathered"
assert compiled.output_shardings.spec == P("data")

from vssd_jax.kernels.depthwise_conv import pallas as conv_pallas, xla as conv
from vssd_jax.kernels.layer_norm import pallas as norm

def gradients(x, kernel, bias):
    interpreted = functools.partial(conv_pallas.gradients, interpret=True)
    def f(x, kernel, bias):
        y = conv.depthwise_conv(x, kernel, bias, 1, "silu", False, False, interpreted)
        return jnp.sin(norm.layer_norm(y, bias, bias, x, 1e-5, interpret=True)).sum()
    return jax.grad(f, argnums=range(3))(x, kernel, bias)

key = jax.random.key(0)
values = [jax.random.normal(key, s) for s in [(8, 5, 4, 6), (3, 3, 6), (6,)]]
expected = jax.jit(gradients)(*values)
placed = [jax.device_put(v, NamedSharding(mesh, P("data") if v.ndim > 3 else P())) for v in values]
with jax.set_mesh(mesh):
    compiled = jax.jit(gradients).lower(*placed).compile()
assert "all-gather" not in compiled.as_text(), "gathered"
assert "all-reduce" in compiled.as_text()
assert compiled.output_shardings[0].spec == P("data")
for x, y in zip(compiled(*placed), expected):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * float(jnp.abs(y).max()))
"""


def test_kernels_stay_sharded():
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr
    assert "data" in run.stdout  # the gradient of the activations is split like them
