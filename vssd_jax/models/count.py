"""Parameters and multiply-adds of a model."""

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from vssd_jax.kernels.depthwise_conv.xla import TAPS
from vssd_jax.kernels.dispatch import portable
from vssd_jax.models.family import Model, abstract

UNCOUNTED = ("interpolation", "channel_sum")


def count_parameters(model: nnx.Module) -> int:
    """The number of trainable values, which does not include BatchNorm's statistics."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def count_multiply_adds(model: nnx.Module, image_size: tuple[int, int]) -> int:
    """Multiply-adds of one image's forward pass.

    Counts the matrix products and convolutions of the traced program, and the products of the
    taps of depthwise convolutions. As usual, other multiplications (norms, gates, token weights,
    interpolation) are not counted. Matrix products that interpolate, or that are an implementation
    of a sum, are in a `jax.named_scope` of `UNCOUNTED`.

    Args:
      model: made by `vssd_jax.models.family.build`; its arrays are not used.
      image_size: height and width of the image.
    """
    # The products inside a Pallas or Triton kernel cannot be seen.
    config, num_classes = cast(Model, model).config, cast(Model, model).num_classes
    make = cast(Callable[..., nnx.Module], type(model))
    plain = abstract(
        lambda rngs: make(config, num_classes=num_classes, implementation="xla", rngs=rngs)
    )
    plain.eval()
    graph, arrays = nnx.split(plain)
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    with portable():
        program = jax.make_jaxpr(lambda arrays, images: nnx.merge(graph, arrays)(images))
        return _products(program(arrays, images).jaxpr)


def _products(jaxpr: core.Jaxpr, in_taps: bool = False) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        scopes = str(eqn.source_info.name_stack)
        if any(scope in scopes for scope in UNCOUNTED):
            continue
        taps = in_taps or TAPS in scopes
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = _array(eqn.invars[0]).shape
            total += _array(eqn.outvars[0]).size * math.prod(shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = _array(eqn.invars[1])
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += _array(eqn.outvars[0]).size * (kernel.size // outputs)
        elif eqn.primitive.name == "add" and taps:  # one for each tap
            total += _array(eqn.outvars[0]).size
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(_products(inner, taps) for inner in _inner(eqn.params))
    return total


def _array(value: core.Var | core.Literal) -> jax.core.ShapedArray:
    """Shape and dtype of an equation's input or output."""
    return cast(jax.core.ShapedArray, value.aval)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The programs inside an equation: bodies of loops, branches, compiled functions."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
