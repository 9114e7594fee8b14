"""3x3 depthwise convolution in plain JAX: nine shifted multiply-adds, with their own gradient.

XLA fuses the nine terms, bias, activation and residual into one loop. On a CPU that is some
thirty times faster than XLA's grouped convolution; on a GPU it saves the copies around cuDNN's
convolution. The gradient is written out because the automatic one of nine slices is nine padded
arrays, and because a CPU needs another order of sums in the gradient of the kernel.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.shared_one import shared_one
from vssd_jax.kernels.silu import silu

ACTIVATIONS = {None: lambda y: y, "silu": silu, "relu": jax.nn.relu}
MIDDLE = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0], np.float32).reshape(3, 3, 1)  # its tap
Gradients = Callable[[Array, Array, Array, int, bool], tuple[Array, Array, Array]]


class Options(NamedTuple):
    """The arguments of `depthwise_conv` that are no arrays."""

    stride: int
    activation: str | None
    residual: bool
    relu_input: bool


def gradients(
    x: Array, dy: Array, kernel: Array, stride: int, relu_input: bool
) -> tuple[Array, Array, Array]:
    """The gradients of the convolution alone, without activation and residual.

    Args:
      x: (B, H, W, C).
      dy: (B, ceil(H / stride), ceil(W / stride), C), the gradient of its result.
      kernel: (3, 3, C).
      stride: 1 or 2.
      relu_input: whether max(x, 0) was convolved.

    Returns:
      The gradients of `x`, of `kernel` and of the bias, (C,), in float32 at least. (That of `x`
      may be in the dtype of `x`, to which it is rounded in the end.)
    """
    dx = input_gradient(dy, kernel, stride, x.shape)
    if relu_input:
        dx = jnp.where(x > 0, dx, 0)
    return dx, *weight_gradients(x, dy, stride, relu_input)


def weight_gradients(x: Array, dy: Array, stride: int, relu_input: bool) -> tuple[Array, Array]:
    """Those of `gradients` for the kernel and the bias."""
    return _weight_gradients(x, dy, stride, relu_input, dispatch.target().platform == "cpu")


@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _weight_gradients(
    x: Array, dy: Array, stride: int, relu_input: bool, on_cpu: bool
) -> tuple[Array, Array]:
    # Under `jax.jit`, layers of equal shapes share one trace: hundreds of operations each.
    form = weight_gradients_by_rows if on_cpu else weight_gradients_by_taps
    return form(x, dy, stride=stride, relu_input=relu_input)


def depthwise_conv(
    x: Array,
    kernel: Array,
    bias: Array,
    *,
    stride: int = 1,
    activation: str | None = None,
    residual: bool = False,
    relu_input: bool = False,
    gradients: Gradients = gradients,
) -> Array:
    """See `vssd_jax.kernels.depthwise_conv.api.depthwise_conv`; `gradients` as in this module."""
    options = Options(stride, activation, residual, relu_input)
    return dispatch.differentiable(_depthwise_conv)(x, kernel, bias, options, gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _depthwise_conv(
    x: Array, kernel: Array, bias: Array, options: Options, gradients: Gradients
) -> Array:
    stride, activation, residual, relu_input = options
    y = convolve(activated(x, relu_input), kernel, bias, stride, activation)
    y = ACTIVATIONS[activation](y)
    if residual:
        y = y + x
    # The barrier keeps a consumer in float32 (a norm) from asking for a second, wide copy.
    return jax.lax.optimization_barrier(y.astype(x.dtype))


def _forward(
    x: Array, kernel: Array, bias: Array, options: Options, gradients: Gradients
) -> tuple[Array, tuple]:
    if dispatch.target().platform == "gpu":
        # Keeps a GPU's compiler from computing `x` once in each of its consumers, or from keeping
        # a wide copy of it for the gradient.
        x = jax.lax.optimization_barrier(x)
    y = _depthwise_conv(x, kernel, bias, options, gradients)
    return y, saved(x, kernel, bias, y, options)


def saved(x: Array, kernel: Array, bias: Array, y: Array, options: Options) -> tuple:
    """What the gradient needs."""
    # The result of a ReLU is enough for its derivative.
    keep_result = options.activation == "relu" and not options.residual
    return x, kernel, bias, y if keep_result else None


def before_activation(
    options: Options, saved: tuple, dy: Array, convolve: Callable[..., Array]
) -> Array:
    """The gradient of the convolution's result, from that of all; `convolve` as here."""
    stride, activation, _, relu_input = options
    x, kernel, bias, y = saved
    dconv = dy
    if y is not None:
        dconv = jnp.where(y > 0, dy, 0)
    elif activation is not None:
        # To compute nine multiply-adds again costs less than to keep the values before the
        # activation. The barrier keeps the compiler from sharing them with the forward pass.
        x = jax.lax.optimization_barrier(x)
        again = convolve(activated(x, relu_input), kernel, bias, stride, activation)
        _, activation_vjp = jax.vjp(ACTIVATIONS[activation], again.astype(_acc(x)))
        (dconv,) = activation_vjp(dy.astype(_acc(x)))
        # Compute it once: all taps of both gradients read it.
        dconv = jax.lax.optimization_barrier(dconv.astype(x.dtype))
    return dconv


def _backward(
    options: Options, gradients: Gradients, saved: tuple, dy: Array
) -> tuple[Array, Array, Array]:
    stride, activation, residual, relu_input = options
    x, kernel, bias, _ = saved
    dconv = before_activation(options, saved, dy, convolve)
    on_gpu = dispatch.target().platform == "gpu"
    if residual and activation is None and on_gpu:
        # The residual adds one to the tap in the middle.
        wide = kernel.astype(_acc(x)) + MIDDLE * shared_one()
        dx, dkernel, dbias = gradients(x, dconv, wide, stride, relu_input)
    else:
        dx, dkernel, dbias = gradients(x, dconv, kernel, stride, relu_input)
        dx = dx.astype(_acc(x)) + dy if residual else dx
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype), dbias.astype(bias.dtype)


_depthwise_conv.defvjp(_forward, _backward)


def _acc(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def activated(x: Array, relu_input: bool) -> Array:
    """What is convolved."""
    return jax.nn.relu(x) if relu_input else x


def _pad(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _window(padded: Array, i: int, j: int, stride: int, height: int, width: int) -> Array:
    """The pixels that tap (i, j) of the kernel is multiplied with: (B, height, width, C)."""
    batch, _, _, channels = padded.shape
    limit = (batch, i + stride * (height - 1) + 1, j + stride * (width - 1) + 1, channels)
    return jax.lax.slice(padded, (0, i, j, 0), limit, (1, stride, stride, 1))


# Up to so many values of the input, the gradient's loop on a CPU is quick to compile, not to run.
SMALL = 2**17

# The scope in which the taps are added up, by which `models.count` finds their products.
TAPS = "depthwise_taps"


@jax.named_scope(TAPS)
def _taps(
    x: Array, kernel: Array, stride: int, height: int, width: int, activation: str | None = None
) -> Array:
    """The sum of the nine products: (B, height, width, C). `activation` is what follows."""
    acc = _acc(x)

    def product(pixels: Array, i: int, j: int) -> Array:
        return pixels.astype(acc) * kernel[i, j].astype(acc)

    def of_image(i: int, j: int) -> Array:
        (down, top), (right, left) = divmod(i - 1, stride), divmod(j - 1, stride)
        pixels = product(x[:, top::stride, left::stride], i, j)
        # In terms of the shape as it is, so that symbolic sizes cancel.
        edges = (
            (0, 0, 0),
            (-down, height + down - pixels.shape[1], 0),
            (-right, width + right - pixels.shape[2], 0),
            (0, 0, 0),
        )
        return jax.lax.pad(pixels, jnp.zeros((), acc), edges)

    def of_padded(i: int, j: int) -> Array:
        return product(_window(padded, i, j, stride, height, width), i, j)

    # On a CPU, a padded image is a copy, and padded products are not. But they are branches, and
    # with these around them, LLVM leaves a loop scalar.
    scalar = activation == "silu" or (stride > 1 and x.dtype != acc)
    if dispatch.target().platform == "cpu" and not scalar:
        term = of_image
    else:
        padded, term = _pad(x), of_padded
    terms = itertools.starmap(term, itertools.product(range(3), repeat=2))
    return sum(terms, start=jnp.zeros((), acc))


def convolve(
    x: Array, kernel: Array, bias: Array, stride: int, activation: str | None = None
) -> Array:
    """The convolution before its `activation`, in float32 at least."""
    height, width = (-(-size // stride) for size in x.shape[1:3])
    return _taps(x, kernel, stride, height, width, activation) + bias.astype(_acc(x))


def input_gradient(dy: Array, kernel: Array, stride: int, shape: tuple[int, ...]) -> Array:
    """That of `gradients` for an input of this shape."""
    if stride == 1:
        return _taps(dy, kernel[::-1, ::-1], 1, shape[1], shape[2])
    # With a stride it is a convolution of the output's gradient spread out with zeros. Pixels of
    # even and odd rows and columns use different taps; handled apart, no zero is multiplied.
    batch, out_h, out_w, channels = dy.shape
    acc = _acc(dy)
    padded = jnp.pad(dy, ((0, 0), (0, 1), (0, 1), (0, 0))).astype(acc)

    def parity(rows: tuple, columns: tuple) -> Array | int:
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


def weight_gradients_by_taps(
    x: Array, dy: Array, *, stride: int, relu_input: bool
) -> tuple[Array, Array]:
    """A sum over all pixels for each tap, (3, 3, C), and for the bias, (C,)."""
    padded, acc = _pad(activated(x, relu_input)), _acc(x)
    height, width = dy.shape[1:3]
    taps = [
        (_window(padded, i, j, stride, height, width).astype(acc) * dy.astype(acc)).sum((0, 1, 2))
        for i in range(3)
        for j in range(3)
    ]
    return jnp.stack(taps).reshape(3, 3, -1), dy.astype(acc).sum((0, 1, 2))


def weight_gradients_by_rows(
    x: Array, dy: Array, *, stride: int, relu_input: bool
) -> tuple[Array, Array]:
    """As `weight_gradients_by_taps`, a few rows of an image at a time.

    On a CPU, XLA's sum over three axes is several times slower. A few rows fit in its caches, and
    without padding nothing is copied.
    """
    acc = _acc(x)
    batch, height, width, channels = dy.shape
    large = x.size > SMALL
    # As many rows as divide the height: the sums are read and written once for all of them.
    together = max(n for n in range(1, 5 if large else 2) if height % n == 0)
    per_image = height // together
    # The columns of `dy` for which the column of the tap is in the image.
    columns = [(int(j == 0), min(width, (x.shape[2] - j) // stride + 1)) for j in range(3)]

    def add_rows(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        image, first = step // per_image, step % per_image * together

        def gradient(row: int, start: int, end: int) -> Array:
            size = 1, 1, end - start, channels
            return jax.lax.dynamic_slice(dy, (image, first + row, start, 0), size)

        def term(row: int, i: int, j: int) -> Array:
            start, end = columns[j]
            g = gradient(row, start, end)
            above = stride * (first + row) + i - 1
            # Outside of the image, the nearest row is what is read.
            if (row, i) in ((0, 0), (together - 1, 2)):
                g = jnp.where((above >= 0) & (above < x.shape[1]), g, 0)
            size = 1, 1, stride * (end - start - 1) + 1, channels
            pixels = jax.lax.dynamic_slice(x, (image, above, stride * start + j - 1, 0), size)
            return activated(pixels[0, 0, ::stride].astype(acc), relu_input) * g[0, 0].astype(acc)

        *of_taps, of_bias = sums
        rows = range(together)
        return *(
            sum((term(row, *divmod(tap, 3)) for row in rows if len(total)), start=total)
            for tap, total in enumerate(of_taps)
        ), sum((gradient(row, 0, width)[0, 0].astype(acc) for row in rows), start=of_bias)

    zeros = [jnp.zeros((max(end - start, 0), channels), acc) for start, end in columns]
    # Two loops, each on a core of its own: what a step computes is too little to be shared.
    middle = [(batch + 1) // 2 * per_image] if large else []
    parts = [
        jax.lax.fori_loop(*bounds, add_rows, (*zeros * 3, jnp.zeros((width, channels), acc)))
        for bounds in itertools.pairwise([0, *middle, batch * per_image])
    ]
    sums = jax.tree.map(lambda *of_parts: functools.reduce(jnp.add, of_parts), *parts)
    *of_taps, dbias = (total.sum(0) for total in sums)
    return jnp.stack(of_taps).reshape(3, 3, channels), dbias
