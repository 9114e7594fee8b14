"""RoIAlign in plain JAX.

The value of a bin is the mean of bilinear samples on a regular grid. Its weights are therefore a
product of one row of weights for the height and one for the width, and the features of a region
are `Wy @ map @ Wx^T`: two matrix products, any number of samples, fixed shapes. On a CPU, where
each product with the whole map would take its time, only the cells are read that a region covers.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vssd_jax.kernels import mesh
from vssd_jax.kernels.dispatch import differentiable
from vssd_jax.kernels.roi_align.sampling import bin_weights, on_levels

# Sides in cells of the parts of a map that regions are cut from, on a CPU: of its level of the
# pyramid a region covers 14 to 28 cells, and more only if it is very long or very large.
_WINDOWS = (16, 32, 64)
# Bytes of intermediate results (bins, W, C) in memory at a time; more regions than fit take turns.
_CHUNK_BYTES = 1 << 27

Sizes = tuple[tuple[int, ...], ...]  # height and width of each map


def roi_align(
    maps: Sequence[Array], boxes: Array, *, strides: tuple[int, ...], bins: int
) -> Array:
    """See `vssd_jax.kernels.roi_align.api.roi_align`.

    The maps are laid out on one canvas, the finest above and the others side by side below it, so
    that one pair of matrix products serves all of them.
    """
    height, sizes = maps[0].shape[1], tuple(x.shape[1:3] for x in maps)
    (canvas_height, canvas_width), _ = _layout(sizes)
    rows = [_pad(maps[0], height, canvas_width)]
    if len(maps) > 1:
        row = jnp.concatenate(
            [_pad(x, canvas_height - height, x.shape[2]) for x in maps[1:]], axis=2
        )
        rows.append(_pad(row, canvas_height - height, canvas_width))
    canvas = jnp.concatenate(rows, axis=1)
    return _weigh(canvas, *canvas_weights(sizes, boxes.reshape(-1, 4), strides, bins))


def _layout(sizes: Sizes) -> tuple[tuple[int, int], np.ndarray]:
    """Height and width of the canvas, and where each map begins on it: (levels, 2)."""
    (height, width), rest = sizes[0], np.array(sizes[1:], int).reshape(-1, 2)
    canvas = height + int(rest[:, 0].max(initial=0)), max(width, int(rest[:, 1].sum()))
    beside = np.cumsum(rest[:, 1]) - rest[:, 1]
    return canvas, np.array([(0, 0), *((height, x) for x in beside)])


def canvas_weights(
    sizes: Sizes, boxes: Array, strides: tuple[int, ...], bins: int
) -> tuple[Array, Array]:
    """Of the rows (N, bins, canvas's height) and columns of the canvas, for boxes (N, 4)."""
    level, corners = on_levels(boxes, strides)
    canvas, origins = _layout(sizes)
    lengths, origin = jnp.asarray(sizes)[level], jnp.asarray(origins)[level]
    y, x = (
        bin_weights(
            corners[:, 1 - axis], corners[:, 3 - axis], bins, lengths[:, axis],
            origin=origin[:, axis], total=canvas[axis],
        )
        for axis in range(2)
    )  # fmt: skip
    return y, x


def _pad(x: Array, height: int, width: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)])


def _weigh(features: Array, wy: Array, wx: Array) -> Array:
    """Features of regions from (B, H, W, C) and weights (B * R, bins, H) and (B * R, bins, W)."""
    batch = features.shape[0]
    wy, wx = (
        w.astype(features.dtype).reshape(batch, -1, *w.shape[1:]) for w in (wy, wx)
    )
    with jax.named_scope("interpolation"):  # `models.count` does not count such products
        return jax.lax.platform_dependent(
            features, wy, wx, cpu=differentiable(_by_windows), default=_by_products
        )


def _by_products(features: Array, wy: Array, wx: Array) -> Array:
    """Two products with the whole map for each region: (B, R, bins, H), (B, R, bins, W)."""
    batch, _, width, channels = features.shape
    bins = wy.shape[2]
    # The regions are on the first axis, which a scan takes one chunk at a time; the images are
    # vectorised, so that they stay where they are when the batch is sharded.
    wy, wx = (jnp.moveaxis(w, 1, 0) for w in (wy, wx))

    def align(weights: tuple[Array, Array]) -> Array:
        y, x = weights
        rows = jnp.einsum("bph,bhwc->bpwc", y, features, precision="highest")
        return jnp.einsum("bqw,bpwc->bpqc", x, rows, precision="highest")

    # A program for any batch takes as many at a time as it would for a single image.
    images = batch if isinstance(batch, int) else 1
    one = images * bins * width * channels * np.dtype(features.dtype).itemsize
    chunk = max(1, min(len(wy), _CHUNK_BYTES // one))
    return jnp.moveaxis(jax.lax.map(align, (wy, wx), batch_size=chunk), 0, 1)


@jax.custom_vjp
def _by_windows(features: Array, wy: Array, wx: Array) -> Array:
    """The same, region by region from the cells that it covers; its gradient is the products'."""
    return mesh.over_batch(lambda arrays, _: _region_by_region(*arrays), (features, wy, wx), ())


def _region_by_region(features: Array, wy: Array, wx: Array) -> Array:
    batch, *size, channels = features.shape
    regions, bins = wy.shape[1:3]
    image = jnp.repeat(jnp.arange(batch), regions)
    weights = [w.reshape(batch * regions, bins, -1) for w in (wy, wx)]
    firsts, extents = zip(*map(covered, weights), strict=True)

    def one(region: tuple[Array, ...]) -> Array:
        image, y, x, first_y, first_x, extent = region

        def window(side: int) -> Callable[[], Array]:
            height, width = (min(side, length) for length in size)

            def align() -> Array:
                # XLA moves a window that would stick out of the map.
                cells = jax.lax.dynamic_slice(
                    features, (image, first_y, first_x, 0), (1, height, width, channels)
                )
                y_part = jax.lax.dynamic_slice(y, (0, first_y), (bins, height))
                x_part = jax.lax.dynamic_slice(x, (0, first_x), (bins, width))
                rows = jnp.einsum("ph,hwc->pwc", y_part, cells[0], precision="highest")
                return jnp.einsum("qw,pwc->pqc", x_part, rows, precision="highest")

            return align

        *smaller, largest = window_sides(*size)
        larger = sum((extent > side).astype(jnp.int32) for side in smaller)
        return jax.lax.switch(larger, [window(side) for side in (*smaller, largest)])

    result = jax.lax.map(one, (image, *weights, *firsts, jnp.maximum(*extents)))
    return result.reshape(batch, regions, *result.shape[1:])


def window_sides(height: int, width: int) -> list[int]:
    """Sides of the windows of a map of this size; the last one is the whole map."""
    largest = max(height, width)
    return [*(side for side in _WINDOWS if side < largest), largest]


def covered(weights: Array) -> tuple[Array, Array]:
    """The first cell with a weight, and how many there are from it to the last: (N, bins, L)."""
    used = (weights != 0).any(1)
    first, behind = (jnp.argmax(x, axis=1) for x in (used, used[:, ::-1]))
    return first, jnp.where(used.any(1), weights.shape[-1] - behind - first, 0)


def _gradients(saved: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    return jax.vjp(_by_products, *saved)[1](dy)


_by_windows.defvjp(lambda *arrays: (_by_windows(*arrays), arrays), _gradients)
