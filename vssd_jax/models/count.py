"""Parameters and multiply-adds of a model."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from vssd_jax.models.family import abstract
from vssd_jax.models.vssd import VSSD, DepthwiseConv

UNCOUNTED = ("interpolation", "channel_sum")


def count_parameters(model: nnx.Module) -> int:
    """The number of trainable values; BatchNorm's statistics are none."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def count_multiply_adds(model: nnx.Module, image_size: tuple[int, int]) -> int:
    """Multiply-adds of one image's forward pass.

    Counts the matrix products and convolutions of the traced program, and 9 * C for each
    output pixel of a depthwise convolution, which is no convolution in the program. What else
    is multiplied (norms, gates, token weights, interpolation) is left out, as usual; products
    that interpolate or stand for a sum are in a `jax.named_scope` of `UNCOUNTED`.

    Args:
      model: one that `vssd_jax.models.family.build` makes; its arrays are not used.
      image_size: height and width of the image.
    """
    # Kernels would hide their products.
    options = {"num_classes": model.num_classes, "implementation": "xla"}
    plain = abstract(lambda rngs: type(model)(model.config, **options, rngs=rngs))
    plain.eval()
    graph, arrays = nnx.split(plain)
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    program = jax.make_jaxpr(lambda arrays, images: nnx.merge(graph, arrays)(images))
    return _products(program(arrays, images).jaxpr) + _depthwise(plain, images)


def _products(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if any(scope in str(eqn.source_info.name_stack) for scope in UNCOUNTED):
            continue
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += eqn.outvars[0].aval.size * (kernel.size // outputs)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(_products, _inner(eqn.params)))
    return total


def _inner(params):
    """The programs inside an equation: bodies of loops, branches, compiled functions."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _depthwise(model: nnx.Module, images) -> int:
    """Of the backbone's depthwise convolutions, by the sizes of its feature maps."""
    backbone = model if isinstance(model, VSSD) else model.backbone
    graph, arrays = nnx.split(backbone)
    maps = jax.eval_shape(
        lambda arrays, images: nnx.merge(graph, arrays).feature_maps(images), arrays, images
    )
    total = 0
    for path, module in nnx.iter_graph(backbone):
        if isinstance(module, DepthwiseConv):
            stage = path[1] + (module.stride == 2)  # ("stages", stage, ...)
            total += 9 * module.bias.size * math.prod(maps[stage].shape[1:3])
    return total
