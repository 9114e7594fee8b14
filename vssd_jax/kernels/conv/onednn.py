"""A convolution over all channels by oneDNN; in float32 its gradients are calls and products."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import onednn
from vssd_jax.kernels.conv import xla

supports = onednn.supports


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv(x: Array, kernel: Array, bias: Array | None, stride: int, padding: int) -> Array:
    return onednn.convolution(x, kernel.astype(x.dtype), bias, stride=stride, padding=padding)


def _backward(stride: int, padding: int, saved: tuple, dy: Array) -> tuple:
    x, kernel, bias = saved
    if x.dtype != jnp.float32:  # in bfloat16, XLA widens what is moved here, value by value
        plain = functools.partial(xla.conv, stride=stride, padding=padding)
        return jax.vjp(plain, *saved)[1](dy)  # what it computes forward is not used
    height, width = kernel.shape[:2]
    if stride == 1 and height == width > padding:
        flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3).astype(x.dtype)
        dx = onednn.convolution(dy, flipped, padding=height - 1 - padding)
        dkernel = _kernel_gradient(x, dy, height, padding)
    else:
        dx = _input_gradient(dy, kernel, x.shape, stride, padding)
        dkernel = _kernel_gradient_by_patches(x, dy, kernel.shape, stride, padding)
    dbias = None if bias is None else dy.sum((0, 1, 2)).astype(bias.dtype)
    return dx, dkernel.astype(kernel.dtype), dbias


def _input_gradient(
    dy: Array, kernel: Array, shape: tuple[int, ...], stride: int, padding: int
) -> Array:
    """(B, H, W, C): products with all taps, and a sum of those that meet in a pixel.

    Pixels whose row and column leave the same remainders, divided by the stride, meet the same
    taps; each such group is a sum of its own, so that no zero is multiplied.
    """
    height, width, channels, features = kernel.shape
    batch, dy_rows, dy_columns, _ = dy.shape
    taps = jnp.reshape(kernel, (-1, features)).astype(dy.dtype)
    products = onednn.matmul(dy.reshape(-1, features), taps, transpose="right")
    products = products.reshape(*dy.shape[:3], height, width, channels)
    rows, columns = (-(-length // stride) for length in shape[1:3])
    zero = jnp.zeros((), dy.dtype)

    def group(row: int, column: int) -> Array:
        total = jnp.zeros((batch, rows, columns, channels), dy.dtype)
        for i, j in itertools.product(range(height), range(width)):
            down, down_rest = divmod(row + padding - i, stride)
            right, right_rest = divmod(column + padding - j, stride)
            if down_rest == right_rest == 0:
                moved = (-down, down + rows - dy_rows, 0), (-right, right + columns - dy_columns, 0)
                tap = products[:, :, :, i, j]
                total += jax.lax.pad(tap, zero, ((0, 0, 0), *moved, (0, 0, 0)))
        return total

    groups = [jnp.stack([group(a, b) for b in range(stride)], 3) for a in range(stride)]
    dx = jnp.stack(groups, 2).reshape(batch, rows * stride, columns * stride, channels)
    return dx[:, : shape[1], : shape[2]]


def _kernel_gradient(x: Array, dy: Array, size: int, padding: int) -> Array:
    """(size, size, C, D), for a stride of 1: one product for each image.

    That is of `x` moved by each column of the kernel, the copies beside one another, and `dy` moved
    by each row: half as many copies as of patches.
    """
    rows, columns = x.shape[1], dy.shape[2]
    moved = [(0, j - padding) for j in range(size)], [(padding - i, 0) for i in range(size)]
    a, b = (_beside(t, starts, rows, columns) for t, starts in zip((x, dy), moved, strict=True))
    of_images = onednn.matmul(a, b, transpose="left")
    blocks = of_images.sum(0).reshape(size, x.shape[3], size, dy.shape[3])
    return jnp.transpose(blocks, (2, 0, 1, 3))


def _kernel_gradient_by_patches(
    x: Array, dy: Array, shape: tuple[int, ...], stride: int, padding: int
) -> Array:
    """(h, w, C, D): a product with the patches of `x`."""
    taps = [(i - padding, j - padding) for i in range(shape[0]) for j in range(shape[1])]
    patches = _beside(x, taps, dy.shape[1], dy.shape[2], stride)
    rows = patches.reshape(-1, patches.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return onednn.matmul(*rows, transpose="left").reshape(shape)


def _beside(
    x: Array, starts: list[tuple[int, int]], rows: int, columns: int, stride: int = 1
) -> Array:
    """(B, H, W, C) -> (B, rows * columns, n C), in one loop.

    The n windows of `x` that start at these rows and columns, beside one another; they are zero
    where they are outside of `x`. `jnp.concatenate` takes twice as long.
    """
    batch, height, width, channels = x.shape
    heights, widths = (stride * (length - 1) + 1 for length in (rows, columns))

    def window(place: int, row: int, column: int) -> Array:
        config = (
            (0, 0, 0),
            (-row, row + heights - height, 0),
            (-column, column + widths - width, 0),
            (place * channels, (len(starts) - 1 - place) * channels, 0),
        )
        return jax.lax.pad(x, jnp.zeros((), x.dtype), config)[:, ::stride, ::stride]

    windows = itertools.starmap(window, ((k, *start) for k, start in enumerate(starts)))
    return functools.reduce(jnp.add, windows).reshape(batch, rows * columns, -1)


_conv.defvjp(lambda *args: (_conv(*args), args[:3]), _backward)


def conv(
    x: Array, kernel: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0
) -> Array:
    """See `vssd_jax.kernels.conv.api.conv`."""
    return _conv(x, kernel, bias, stride, padding)
