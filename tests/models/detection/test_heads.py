"""Shapes of the pyramid and the heads; their values are in models/test_mask_rcnn.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vssd_jax.models.detection.heads import FPN, BoxHead, MaskHead, RPNHead, Upsample
from vssd_jax.models.layers import Precision

HALF = Precision(jnp.bfloat16)


def outputs(make, *shapes):
    """Shapes and dtypes of what a module gives for one array, or one list of several."""

    def forward(*arrays):
        module = make(precision=HALF, rngs=nnx.Rngs(0))
        return module(list(arrays) if len(arrays) > 1 else arrays[0])

    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(forward, *arrays))]


def test_the_pyramid_takes_maps_of_odd_sizes():
    found = outputs(
        lambda **options: FPN((3, 6, 9), 4, **options), (2, 9, 7, 3), (2, 5, 4, 6), (2, 3, 2, 9)
    )
    assert found == [
        (shape, jnp.bfloat16) for shape in ((2, 9, 7, 4), (2, 5, 4, 4), (2, 3, 2, 4), (2, 2, 1, 4))
    ]


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda **o: RPNHead(8, 3, **o), (2, 4, 5, 8), [(2, 60), (2, 60, 4)]),
        (lambda **o: BoxHead(8, 16, 5, **o), (2, 6, 7, 7, 8), [(2, 6, 6), (2, 6, 5, 4)]),
        (lambda **o: MaskHead(8, 5, **o), (2, 6, 14, 14, 8), [(2, 6, 28, 28, 5)]),
    ],
    ids=["rpn", "box", "mask"],
)
def test_results_of_heads_are_float32(make, shape, expected):
    assert outputs(make, shape) == [(shape, jnp.float32) for shape in expected]


def test_upsampling_puts_four_pixels_in_place_of_one():
    layer = Upsample(1, 1, precision=Precision(), rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.arange(4.0).reshape(2, 2, 1, 1)
    layer.bias[...] = jnp.full(1, 0.5)
    result = layer(jnp.array([[[[1.0], [10.0]]]]))
    np.testing.assert_allclose(result[0, :, :, 0], [[0.5, 1.5, 0.5, 10.5], [2.5, 3.5, 20.5, 30.5]])
