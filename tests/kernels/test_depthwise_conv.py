"""The depthwise convolution and its gradient against XLA's grouped convolution in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssd_jax.kernels.depthwise_conv import depthwise_conv

CASES = [
    # (B, H, W, C), stride, activation, residual
    ((2, 6, 5, 4), 1, None, True),
    ((2, 5, 7, 3), 1, "silu", False),
    ((1, 1, 1, 3), 1, "silu", True),
    ((2, 6, 8, 4), 2, "relu", False),
    ((2, 7, 5, 3), 2, "silu", False),
    ((1, 1, 2, 2), 2, None, False),
]


def reference(x, kernel, bias, stride, activation, residual):
    y = jax.lax.conv_general_dilated(
        x,
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


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(("shape", "stride", "activation", "residual"), CASES)
def test_float64(x64, shape, stride, activation, residual):
    x, kernel, bias, dy = map(jnp.asarray, inputs(shape, stride))
    expected = value_and_gradients(
        lambda *a: reference(*a, stride, activation, residual), x, kernel, bias, dy
    )

    def ours(x, kernel, bias):
        return depthwise_conv(
            x, kernel, bias, stride=stride, activation=activation, residual=residual
        )

    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        actual = value_and_gradients(wrap(ours), x, kernel, bias, dy)
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("stride", [1, 2])
def test_narrow_types_accumulate_in_float32(x64, dtype, stride):
    x, kernel, bias, dy = inputs((2, 9, 9, 8), stride)
    # The same rounded inputs for both: what remains is the arithmetic and the final rounding.
    x, dy = (jnp.asarray(a, dtype) for a in (x, dy))
    kernel, bias = (jnp.asarray(a, jnp.float32) for a in (kernel, bias))
    wide = [a.astype(jnp.float64) for a in (x, kernel, bias, dy)]
    expected = value_and_gradients(lambda *a: reference(*a, stride, "silu", False), *wide)
    actual = value_and_gradients(
        lambda *a: depthwise_conv(*a, stride=stride, activation="silu"), x, kernel, bias, dy
    )
    assert [a.dtype for a in actual] == [dtype, dtype, jnp.float32, jnp.float32]
    # One rounding of each value, and in the gradients one of the activation's derivative.
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for a, b in zip(actual, expected, strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a.astype(jnp.float64), b, atol=tolerance * scale, rtol=0)


def test_both_orders_of_the_kernel_gradient_agree(x64):
    from vssd_jax.kernels.depthwise_conv import xla

    for stride in (1, 2):
        x, _, _, dy = map(jnp.asarray, inputs((3, 7, 6, 5), stride))
        a = xla._kernel_gradient(x, dy, stride=stride)
        b = xla._kernel_gradient_by_rows(x, dy, stride=stride)
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


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
    x, kernel, bias, _ = inputs((1, 4, 4, 2), 1, np.float32)
    with pytest.raises(ValueError, match="stride 2"):
        depthwise_conv(x, kernel, bias, stride=2, residual=True)
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        depthwise_conv(x, kernel, bias, activation="gelu")
