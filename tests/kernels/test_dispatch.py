"""The choice of an implementation."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.kernels import examples, rows
from vssd_jax.errors import UserError
from vssd_jax.kernels import (
    depthwise_conv,
    dispatch,
    gelu,
    layer_norm,
    mlp,
    nc_ssd,
    nc_ssd_mixer,
    relu,
)
from vssd_jax.models.vssd import VSSD, VSSDConfig


def choose(operation, implementation, dtype, **changes):
    arrays, options = examples.arguments(operation.name, dtype)
    return operation.choose(implementation, **(arrays | options | changes))


def nano(implementation):
    model = VSSD(VSSDConfig.nano(), num_classes=2, implementation=implementation, rngs=nnx.Rngs(0))
    model.eval()
    return model


@pytest.fixture
def messages(caplog):
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def gpu():
    pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)
    with rows.on_a_gpu():
        yield


@pytest.fixture
def registered(monkeypatch, tmp_path):
    """A function that registers a module of this text as "mine", until the end of the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def register(operation, text, **row):
        monkeypatch.setattr(operation, "table", operation.table)
        module = f"my_{operation.name}_{tmp_path.name}"
        (tmp_path / f"{module}.py").write_text(text)
        operation.register("mine", dispatch.Implementation(module, **row))

    return register


def test_a_cpu_takes_plain_jax_and_says_nothing(messages):
    if jax.default_backend() != "cpu":
        pytest.skip("for a CPU")
    assert choose(nc_ssd.OPERATION, None, jnp.float32) == "xla"
    assert choose(layer_norm.OPERATION, None, jnp.float32) == "cpu"
    assert choose(layer_norm.OPERATION, "xla", jnp.float32) == "cpu"
    assert not messages()


def test_an_unknown_name_is_refused_by_the_model_too():
    with pytest.raises(UserError, match="unknown implementation 'xlaa'; did you mean 'xla'"):
        VSSD(VSSDConfig.nano(), implementation="xlaa", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"choose from xla, .*pallas.*triton"):
        dispatch.check_name("?")


@pytest.mark.parametrize("name", ["pallas", "triton"])
def test_a_model_whose_implementation_the_device_cannot_run(name):
    if jax.default_backend() != "cpu":
        pytest.skip("for a CPU")
    model = nano(name)
    with pytest.raises(UserError, match=f"cannot run as '{name}': it needs an NVIDIA GPU"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))


def test_the_choice_on_a_gpu(gpu, messages):
    assert choose(nc_ssd.OPERATION, None, jnp.float32) == "pallas"
    assert choose(nc_ssd.OPERATION, "xla", jnp.float32) == "xla"
    assert choose(layer_norm.OPERATION, None, jnp.bfloat16) == "pallas"
    assert choose(layer_norm.OPERATION, "xla", jnp.bfloat16) == "xla"
    # Kernels for 16 bits and few channels: that other programs go without them is nothing to say.
    assert choose(mlp.OPERATION, None, jnp.bfloat16) == "pallas"
    assert choose(mlp.OPERATION, None, jnp.float32) == "xla"
    assert choose(mlp.OPERATION, None, jnp.bfloat16, branch_scale=None) == "pallas"
    assert not messages()


def test_a_gpu_falls_back_and_says_so_once(gpu, messages):
    with jax.enable_x64(True):
        for _ in range(2):
            assert choose(nc_ssd.OPERATION, None, jnp.float64) == "xla"
    expected = "nc_ssd falls back to XLA: 'pallas' cannot run, dtype float64"
    assert [message.startswith(expected) for message in messages()] == [True]


def test_arguments_that_the_named_kernel_cannot_take(gpu, messages):
    for _ in range(2):
        assert choose(mlp.OPERATION, "pallas", jnp.float32) == "xla"
    assert [message.count("mlp cannot run as 'pallas' with") for message in messages()] == [1]


def test_a_name_that_only_a_part_knows_reaches_it(gpu):
    assert choose(nc_ssd_mixer.OPERATION, None, jnp.bfloat16) == "pallas"
    assert choose(nc_ssd_mixer.OPERATION, "pallas", jnp.bfloat16) == "pallas"
    assert choose(nc_ssd_mixer.OPERATION, "triton", jnp.bfloat16) == "xla"  # of its NC-SSD
    assert choose(mlp.OPERATION, "triton", jnp.bfloat16) == "pallas"  # no part has a row "triton"


def test_a_model_with_a_named_kernel_in_float32(gpu):
    """Some operations have no such kernel for float32, or none at all."""
    model = nano("pallas")
    jax.eval_shape(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))


MY_GELU = """
def gelu(x):
    return 7 * x
"""
MY_LAYER_NORM = """
import jax.numpy as jnp

def supports(x, **_):
    return "less than 100 channels" if x.shape[-1] < 100 else None

def layer_norm(x, scale, bias, gate, epsilon):
    return 0 * x
"""


def test_another_implementation_is_a_file_and_a_line(registered):
    registered(gelu.OPERATION, MY_GELU, automatic=False)
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(gelu.gelu(x, implementation="mine"), 7 * x)
    assert (gelu.gelu(x) != 7 * x).any()
    # It is known everywhere, and reaches the operation inside of others.
    assert choose(nc_ssd.OPERATION, "mine", jnp.float32) == choose(
        nc_ssd.OPERATION, None, jnp.float32
    )
    f, arrays = examples.call("mlp", "mine")
    params = arrays["params"]
    normed = layer_norm.layer_norm(arrays["x"], params.scale, params.bias)
    branch = 7 * (normed @ params.w1 + params.b1) @ params.w2 + params.b2
    expected = arrays["x"] + arrays["branch_scale"][:, None, None] * branch
    np.testing.assert_allclose(f(arrays), expected, rtol=1e-4, atol=1e-4)


def test_a_registered_implementation_is_tried_first(registered, messages):
    registered(layer_norm.OPERATION, MY_LAYER_NORM, plain=True)
    assert (layer_norm.layer_norm(jnp.ones((2, 128)), jnp.ones(128), jnp.ones(128)) == 0).all()
    assert (layer_norm.layer_norm(jnp.ones((2, 16)), jnp.ones(16), jnp.ones(16)) == 1).all()
    assert not messages()
    named = functools.partial(layer_norm.layer_norm, implementation="mine")
    assert (named(jnp.ones((2, 16)), jnp.ones(16), jnp.ones(16)) == 1).all()
    assert [message.count("less than 100 channels") for message in messages()] == [1]


def test_an_operation_needs_plain_jax():
    with pytest.raises(ValueError, match="'xla'"):
        dispatch.Operation("nothing", {"mine": dispatch.Implementation("mine")})


def test_export():
    f, arrays = examples.call("nc_ssd")
    arguments = tuple(arrays.values())
    exported = jax.export.export(jax.jit(lambda *a: f(dict(zip(arrays, a, strict=True)))))
    y = exported(*arguments).call(*arguments)
    np.testing.assert_allclose(y, f(arrays), rtol=1e-5, atol=1e-5)


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


def test_automatic_gradients_are_those_of_the_operations_own():
    zeros = jnp.zeros((1, 4, 4, 2))
    kernel, bias = jnp.ones((3, 3, 2)), jnp.zeros(2)
    functions = {
        "relu": relu.relu,
        "gelu": gelu.gelu,
        "relu_input": lambda x: depthwise_conv.depthwise_conv(x, kernel, bias, relu_input=True),
        "relu_output": lambda x: depthwise_conv.depthwise_conv(x, kernel, bias, activation="relu"),
    }
    for name, function in functions.items():
        for x in (zeros, jax.random.normal(jax.random.key(0), zeros.shape)):

            def loss(x, function=function):
                return (function(x) * jnp.arange(zeros.size).reshape(zeros.shape)).sum()

            own = jax.grad(loss)(x)
            with dispatch.automatic_gradients():
                np.testing.assert_allclose(
                    jax.grad(loss)(x), own, rtol=1e-4, atol=1e-4, err_msg=name
                )
                _, slope = jax.jvp(loss, (x,), (jnp.ones_like(x),))
            np.testing.assert_allclose(slope, own.sum(), rtol=1e-4, atol=1e-3, err_msg=name)


# Outside of a trace


def compiled_programs(call):
    """How many programs a call compiles, and its result."""
    count = []

    def listen(event, *_, **__):
        count.extend([event] * event.endswith("backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        return call(), len(count)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_an_operation_is_one_program_outside_of_a_trace():
    arrays, options = examples.arguments("mlp", jnp.float32)
    x = jnp.concatenate([arrays.pop("x")] * 3)  # of a shape that no other test has
    arrays["branch_scale"] = None

    def call(x):
        return mlp.mlp(x, **arrays, **options)

    eager, count = compiled_programs(lambda: call(x))
    assert count == 1
    again, count = compiled_programs(lambda: call(x + 0))
    assert count <= 1  # the sum
    np.testing.assert_array_equal(eager, again)
    np.testing.assert_allclose(eager, jax.jit(call)(x), rtol=1e-6, atol=1e-6)
    with jax.disable_jit():
        np.testing.assert_allclose(call(x), eager, rtol=1e-5, atol=1e-6)


def test_a_unit_is_differentiated_mapped_and_traced_as_its_function():
    @dispatch.unit
    def cube(x, *, factor):
        return factor * x**3

    def call(x):
        return cube(x, factor=2.0)

    x = jnp.arange(3.0)
    assert call(1.0) == 2
    np.testing.assert_array_equal(jax.grad(lambda x: call(x).sum())(x), 6 * x**2)
    np.testing.assert_array_equal(jax.jvp(call, (x,), (x,))[1], 6 * x**3)
    np.testing.assert_array_equal(jax.vmap(call)(x), 2 * x**3)
    np.testing.assert_array_equal(jax.jit(call)(x), 2 * x**3)
    assert "jit" not in str(jax.make_jaxpr(call)(x))
    assert not dispatch.in_trace()


def test_what_an_operation_ran_as_before_does_not_stay(registered):
    x = jnp.arange(3.0)
    before = gelu.gelu(x)
    registered(gelu.OPERATION, MY_GELU)
    np.testing.assert_array_equal(gelu.gelu(x), 7 * x)
    with dispatch.automatic_gradients():
        np.testing.assert_array_equal(gelu.gelu(x), before)
    np.testing.assert_array_equal(gelu.gelu(x), 7 * x)
