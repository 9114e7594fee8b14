"""The depthwise convolution and its gradient against XLA's grouped convolution in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tests.kernels import rows
from vssd_jax.kernels.depthwise_conv import OPERATION, depthwise_conv, xla

CASES = [
    # (B, H, W, C), stride, activation, residual, relu_input
    ((2, 6, 5, 4), 1, None, True, False),
    ((2, 5, 7, 3), 1, "silu", False, False),
    ((1, 1, 1, 3), 1, "silu", True, False),
    ((1, 4, 3, 2), 1, "relu", True, False),
    ((2, 6, 8, 4), 2, "relu", False, True),
    ((2, 7, 5, 3), 2, "silu", False, True),
    ((1, 1, 2, 2), 2, None, False, False),
]
KERNEL_CASES = [
    *CASES,
    ((2, 24, 23, 65), 1, "silu", False, False),  # tails of pixels and of channels, two parts
    ((1, 33, 31, 130), 2, "relu", False, True),
]


def reference(x, kernel, bias, stride, activation, residual, relu_input=False):
    y = jax.lax.conv_general_dilated(
        jnp.maximum(x, 0) if relu_input else x,
        kernel[:, :, None],
        (stride, stride),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    y = y + bias
    y = {None: lambda y: y, "silu": jax.nn.silu, "relu": jax.nn.relu}[activation](y)
    return y + x if residual else y


def inputs(shape, stride, dtype=np.float64):
    rng = np.random.default_rng(0)
    batch, height, width, channels = shape
    out = (batch, -(-height // stride), -(-width // stride), channels)
    shapes = (shape, (3, 3, channels), (channels,), out)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def value_and_gradients(f, x, kernel, bias, dy):
    y, vjp = jax.vjp(f, x, kernel, bias)
    return y, *vjp(dy)


def of_case(stride, activation, residual, relu_input, f=depthwise_conv):
    """Our function and the reference for the options of a case."""
    names = ("stride", "activation", "residual", "relu_input")
    options = dict(zip(names, (stride, activation, residual, relu_input), strict=True))
    return functools.partial(f, **options), functools.partial(reference, **options)


@pytest.mark.parametrize("case", CASES)
def test_float64(x64, case):
    shape, *options = case
    x, kernel, bias, dy = map(jnp.asarray, inputs(shape, options[0]))
    ours, formula = of_case(*options)
    expected = value_and_gradients(formula, x, kernel, bias, dy)

    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        actual = value_and_gradients(wrap(ours), x, kernel, bias, dy)
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("stride", [1, 2])
def test_narrow_types_accumulate_in_float32(x64, dtype, stride):
    compare_narrow(*of_case(stride, "silu", False, False), (2, 9, 9, 8), stride, dtype)


def compare_narrow(ours, formula, shape, stride, dtype):
    x, kernel, bias, dy = inputs(shape, stride)
    # The same rounded inputs for both: what remains is the arithmetic and the final rounding.
    x, dy = (jnp.asarray(a, dtype) for a in (x, dy))
    kernel, bias = (jnp.asarray(a, jnp.float32) for a in (kernel, bias))
    wide = [a.astype(jnp.float64) for a in (x, kernel, bias, dy)]
    expected = value_and_gradients(formula, *wide)
    actual = value_and_gradients(ours, x, kernel, bias, dy)
    assert [a.dtype for a in actual] == [dtype, dtype, jnp.float32, jnp.float32]
    # One rounding of each value, and in the gradients one of the activation's derivative.
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for a, b in zip(actual, expected, strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a.astype(jnp.float64), b, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, jnp.float32) for case in KERNEL_CASES]
    + [(KERNEL_CASES[0], jnp.bfloat16), (KERNEL_CASES[-1], jnp.float16)],
)
def test_the_kernel(x64, case, dtype, poisoned_tails):
    shape, stride, *options = case
    ours, formula = of_case(stride, *options, f=rows.pallas(OPERATION).depthwise_conv)
    compare_narrow(ours, formula, shape, stride, dtype)


def test_the_kernel_under_vmap_and_checkpoint(x64):
    x, kernel, bias, dy = (jnp.asarray(a, jnp.float32) for a in inputs((2, 5, 4, 3), 1))
    kernel_gradient = rows.pallas(OPERATION).depthwise_conv

    def f(x):
        return kernel_gradient(x, kernel, bias, activation="silu")

    expected = jax.vjp(f, x)[1](dy)[0]
    np.testing.assert_array_equal(jax.vjp(jax.checkpoint(f), x)[1](dy)[0], expected)
    each = jax.vmap(lambda x, dy: jax.vjp(f, x)[1](dy)[0])(jnp.stack([x, x]), jnp.stack([dy, -dy]))
    np.testing.assert_allclose(each, jnp.stack([expected, -expected]), rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize(
    "case",
    [
        *KERNEL_CASES,
        ((4, 56, 56, 256), 1, "silu", False, False),
        ((4, 56, 56, 64), 1, None, True, False),
        ((4, 56, 56, 512), 2, "relu", False, True),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gpu(x64, case, implementation, dtype):
    shape, stride, *options = case
    ours, formula = of_case(stride, *options)
    ours = functools.partial(ours, implementation=implementation)
    compare_narrow(ours, formula, shape, stride, dtype)


@pytest.mark.parametrize(("relu_input", "small"), [(False, 0), (True, 0), (True, xla.SMALL)])
@pytest.mark.parametrize("stride", [1, 2])
# Rows in one group and in several, prime numbers of them, and images of one row or column.
@pytest.mark.parametrize("size", [(7, 6), (8, 5), (30, 3), (17, 4), (58, 2), (1, 5), (6, 1)])
def test_both_orders_of_the_weight_gradients_agree(
    x64, size, stride, relu_input, small, monkeypatch
):
    monkeypatch.setattr(xla, "SMALL", small)
    x, _, _, dy = map(jnp.asarray, inputs((3, *size, 5), stride))
    options = {"stride": stride, "relu_input": relu_input}
    by_taps = xla.weight_gradients_by_taps(x, dy, **options)
    by_rows = jax.jit(functools.partial(xla.weight_gradients_by_rows, **options))(x, dy)
    for a, b in zip(by_taps, by_rows, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("stride", "activation"), [(1, None), (1, "silu"), (2, "relu")])
def test_an_exported_program_takes_any_size(stride, activation):
    def f(x, kernel, bias):
        x = depthwise_conv(x, kernel, bias, stride=2)
        return depthwise_conv(x, kernel, bias, stride=stride, activation=activation)

    arrays = [jnp.asarray(a, jnp.float32) for a in inputs((2, 7, 6, 3), 1)[:3]]
    sizes = export.symbolic_shape("b, h, w")
    shapes = [jax.ShapeDtypeStruct((*sizes, 3), jnp.float32), *arrays[1:]]
    exported = export.export(jax.jit(f), platforms=["cpu", "cuda"])(*shapes)
    np.testing.assert_allclose(exported.call(*arrays), f(*arrays), rtol=1e-5, atol=1e-6)


def test_vmap_and_second_derivative(x64):
    x, kernel, bias, _ = map(jnp.asarray, inputs((2, 5, 4, 3), 1))
    xs = jnp.stack([x, 2 * x])

    def f(x):
        return jnp.square(depthwise_conv(x, kernel, bias, activation="silu")).sum()

    np.testing.assert_allclose(
        jax.vmap(jax.grad(f))(xs), jnp.stack([jax.grad(f)(x) for x in xs]), rtol=1e-12
    )
    hvp = jax.grad(lambda x: (jax.grad(f)(x) * x).sum())(x)
    step = 1e-6
    numeric = (f(x + step * x) + f(x - step * x) - 2 * f(x)) / step**2
    np.testing.assert_allclose(
        ((hvp - jax.grad(f)(x)) * x).sum(), numeric, rtol=1e-3
    )


def test_wrong_options():
    x, kernel, bias, _ = map(jnp.asarray, inputs((1, 4, 4, 2), 1, np.float32))
    with pytest.raises(ValueError, match="stride 2"):
        depthwise_conv(x, kernel, bias, stride=2, residual=True)
    with pytest.raises(ValueError, match="residual and relu_input"):
        depthwise_conv(x, kernel, bias, residual=True, relu_input=True)
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        depthwise_conv(x, kernel, bias, activation="gelu")


def test_what_the_kernel_cannot_do(x64):
    assert "float64" in rows.pallas(OPERATION).supports(jnp.zeros((1, 2, 2, 1), jnp.float64))
