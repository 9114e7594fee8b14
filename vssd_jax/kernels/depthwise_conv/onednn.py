"""3x3 depthwise convolution by oneDNN, with bias, activation and residual in the same call.

The gradient of the input is one too; that of the kernel is a sum in plain JAX.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import onednn
from vssd_jax.kernels.depthwise_conv import xla

supports = onednn.supports


def depthwise_conv(
    x: Array,
    kernel: Array,
    bias: Array,
    *,
    stride: int = 1,
    activation: str | None = None,
    residual: bool = False,
    relu_input: bool = False,
) -> Array:
    """See `vssd_jax.kernels.depthwise_conv.api.depthwise_conv`."""
    options = xla.Options(stride, activation, residual, relu_input)
    if x.dtype == jnp.float32 and activation != "silu":
        # As fast there, without a call, and one loop with what is around it.
        return xla.depthwise_conv(x, kernel, bias, **options._asdict())
    return _depthwise_conv(x, kernel, bias, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _depthwise_conv(x: Array, kernel: Array, bias: Array, options: xla.Options) -> Array:
    added = x if options.residual else None
    x = xla.activated(x, options.relu_input)
    return _convolve(x, kernel, bias, options.stride, added, options.activation)


def _convolve(
    x: Array,
    kernel: Array,
    bias: Array,
    stride: int,
    added: Array | None = None,
    activation: str | None = None,
) -> Array:
    taps, groups = kernel[:, :, None].astype(x.dtype), x.shape[-1]
    return onednn.convolution(
        x, taps, bias, added, stride=stride, padding=1, groups=groups, activation=activation
    )


def _forward(x: Array, kernel: Array, bias: Array, options: xla.Options) -> tuple[Array, tuple]:
    y = _depthwise_conv(x, kernel, bias, options)
    return y, xla.saved(x, kernel, bias, y, options)


def _backward(options: xla.Options, saved: tuple, dy: Array) -> tuple[Array, Array, Array]:
    x, kernel, bias, _ = saved
    dconv = xla.before_activation(options, saved, dy, lambda *args: _convolve(*args[:4]))
    if options.stride == 1:
        taps = kernel[::-1, ::-1, None].astype(x.dtype)
        added = dy if options.residual else None
        dx = onednn.convolution(dconv, taps, None, added, padding=1, groups=x.shape[-1])
    else:
        dx = xla.input_gradient(dconv, kernel, options.stride, x.shape)
    if options.relu_input:
        dx = jnp.where(x > 0, dx, 0)
    dkernel, dbias = xla.weight_gradients(x, dconv, options.stride, options.relu_input)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype), dbias.astype(bias.dtype)


_depthwise_conv.defvjp(_forward, _backward)
