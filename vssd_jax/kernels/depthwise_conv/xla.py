"""3x3 depthwise convolution as nine shifted multiply-adds, with its own gradient.

XLA fuses the nine terms, bias, activation and residual into one loop. On a CPU that is some
thirty times faster than XLA's grouped convolution; on a GPU it saves the copies that cuDNN's path
makes around the convolution. The gradient is written out because the derivative of nine slices is
nine padded arrays, and because a CPU needs another order of sums for the weights.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vssd_jax.kernels import dispatch


@jax.custom_jvp
def _silu(x):
    # With a division at the end: XLA's CPU compiler holds a product for cheap, and would compute
    # it, with the whole convolution before it, in each of its consumers anew.
    return x / (1 + jnp.exp(-x))


_silu.defjvp(lambda primals, tangents: jax.jvp(jax.nn.silu, primals, tangents))
ACTIVATIONS = {None: lambda y: y, "silu": _silu, "relu": jax.nn.relu}


def gradients(x, dy, kernel, stride, relu_input):
    """The gradients of the convolution alone, from that of its result.

    Args:
      x: (B, H, W, C).
      dy: (B, ceil(H / stride), ceil(W / stride), C).
      kernel: (3, 3, C).
      stride: 1 or 2.
      relu_input: whether max(x, 0) was convolved.

    Returns:
      Those of `x`, of `kernel` and of the bias, (C,); in float32 at least, but a kernel rounds
      that of `x` to the dtype of `x`.
    """
    dx = _input_gradient(dy, kernel, stride, x.shape)
    if relu_input:
        dx = jnp.where(x > 0, dx, 0)
    dkernel = jax.lax.platform_dependent(
        _convolved(x, relu_input),
        dy,
        cpu=functools.partial(_kernel_gradient_by_rows, stride=stride),
        default=functools.partial(_kernel_gradient, stride=stride),
    )
    return dx, dkernel, dy.astype(_acc(x)).sum((0, 1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    stride: int = 1,
    activation: str | None = None,
    residual: bool = False,
    relu_input: bool = False,
    gradients: Callable = gradients,
) -> jax.Array:
    """See `vssd_jax.kernels.depthwise_conv.api.depthwise_conv`; `gradients` as in this module."""
    y = ACTIVATIONS[activation](_convolve(_convolved(x, relu_input), kernel, bias, stride))
    if residual:
        y = y + x
    # The barrier keeps a consumer in float32 (a norm) from asking for a second, wide copy.
    return jax.lax.optimization_barrier(y.astype(x.dtype))


def _forward(x, kernel, bias, stride, activation, residual, *options):
    x = _written(x)  # not a copy for the gradient besides
    y = depthwise_conv(x, kernel, bias, stride, activation, residual, *options)
    tells = activation == "relu" and not residual  # its derivative
    return y, (x, kernel, bias, y if tells else None)


def _backward(stride, activation, residual, relu_input, gradients, saved, dy):
    x, kernel, bias, y = saved
    dconv = dy
    if y is not None:
        dconv = jnp.where(y > 0, dy, 0)
    elif activation is not None:
        # Nine multiply-adds again cost less than keeping the values before the activation; the
        # compiler must not find them, or parts of the activation, in the forward pass.
        x = jax.lax.optimization_barrier(x)
        again = _convolve(_convolved(x, relu_input), kernel, bias, stride)
        _, activation_vjp = jax.vjp(ACTIVATIONS[activation], again)
        (dconv,) = activation_vjp(dy.astype(_acc(x)))
        # All taps of both gradients read it: compute it once.
        dconv = jax.lax.optimization_barrier(dconv.astype(x.dtype))
    if residual and activation is None:  # it adds one to the tap in the middle
        wide = kernel.astype(_acc(x)).at[1, 1].add(1)
        dx, dkernel, dbias = gradients(x, dconv, wide, stride, relu_input)
    else:
        dx, dkernel, dbias = gradients(x, dconv, kernel, stride, relu_input)
        dx = dx.astype(_acc(x)) + dy if residual else dx
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype), dbias.astype(bias.dtype)


depthwise_conv.defvjp(_forward, _backward)


def _written(x):
    """Keeps a GPU's compiler from computing `x` inside its consumers, or a wide copy of it."""
    return jax.lax.optimization_barrier(x) if dispatch.target().platform == "gpu" else x


def _acc(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _convolved(x, relu_input):
    return jnp.maximum(x, 0) if relu_input else x


def _pad(x):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _window(padded, i, j, stride, height, width):
    """What tap (i, j) of the kernel meets: (B, height, width, C)."""
    batch, _, _, channels = padded.shape
    limit = (batch, i + stride * (height - 1) + 1, j + stride * (width - 1) + 1, channels)
    return jax.lax.slice(padded, (0, i, j, 0), limit, (1, stride, stride, 1))


# The name of the scope in which the taps are multiplied, for counting multiply-adds.
TAPS = "depthwise_taps"


@jax.named_scope(TAPS)
def _taps(padded, kernel, stride, height, width):
    acc = _acc(padded)
    terms = (
        _window(padded, i, j, stride, height, width).astype(acc) * kernel[i, j].astype(acc)
        for i in range(3)
        for j in range(3)
    )
    return sum(terms, start=jnp.zeros((), acc))


def _convolve(x, kernel, bias, stride):
    height, width = (-(-size // stride) for size in x.shape[1:3])
    return _taps(_pad(x), kernel, stride, height, width) + bias.astype(_acc(x))


def _input_gradient(dy, kernel, stride, shape):
    flipped = kernel[::-1, ::-1]
    if stride == 1:
        return _taps(_pad(dy), flipped, 1, *shape[1:3])
    # A stride's gradient is a convolution of the output gradient spread out with zeros. Each of
    # the four parities of a pixel meets other taps, so that no zero is multiplied.
    batch, out_h, out_w, channels = dy.shape
    acc = _acc(dy)
    padded = jnp.pad(dy, ((0, 0), (0, 1), (0, 1), (0, 0))).astype(acc)

    def parity(rows, columns):
        return sum(
            padded[:, down : down + out_h, right : right + out_w] * kernel[i, j].astype(acc)
            for i, down in rows
            for j, right in columns
        )

    even, odd = ((1, 0),), ((2, 0), (0, 1))  # (tap, offset of the output pixel)
    rows = [
        jnp.stack([parity(r, even), parity(r, odd)], axis=3).reshape(batch, out_h, -1, channels)
        for r in (even, odd)
    ]
    dx = jnp.stack(rows, axis=2).reshape(batch, 2 * out_h, 2 * out_w, channels)
    return dx[:, : shape[1], : shape[2]]


def _kernel_gradient(x, dy, *, stride):
    padded, acc = _pad(x), _acc(x)
    height, width = dy.shape[1:3]
    taps = [
        (_window(padded, i, j, stride, height, width).astype(acc) * dy.astype(acc)).sum((0, 1, 2))
        for i in range(3)
        for j in range(3)
    ]
    return jnp.stack(taps).reshape(3, 3, -1)


def _kernel_gradient_by_rows(x, dy, *, stride):
    """Adds up row by row: XLA's reduction over three axes is eight times slower on a CPU."""
    padded, acc = _pad(x), _acc(x)
    batch, height, width, channels = dy.shape
    # Several rows at a time, so that a sum is read and written once for all of them. All rows at
    # once would be no loop any more, and the compiler would reduce again.
    together = max((n for n in range(2, min(height, 8)) if height % n == 0), default=1)

    def add_rows(step, sums):
        sums = list(sums)
        for row in (together * step + n for n in range(together)):
            g = jax.lax.dynamic_slice_in_dim(dy, row, 1, 1).astype(acc)
            for i in range(3):
                pixels = jax.lax.dynamic_slice_in_dim(padded, stride * row + i, 1, 1).astype(acc)
                for j in range(3):
                    last = j + stride * (width - 1) + 1
                    sums[3 * i + j] += pixels[:, :, j:last:stride] * g
        return tuple(sums)

    zero = jnp.zeros((batch, 1, width, channels), acc)
    sums = jax.lax.fori_loop(0, height // together, add_rows, (zero,) * 9)
    return jnp.stack([part.sum((0, 1, 2)) for part in sums]).reshape(3, 3, channels)
