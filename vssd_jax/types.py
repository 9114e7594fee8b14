"""Shapes in annotations: `Float[Array, "B H W C"]`.

Letters: B batch, H and W height and width, L tokens, C channels, N state, `heads`, P head
dimension. jaxtyping gives them a meaning, which the tests check at run time; it is no dependency:
without it the annotations stand for `jax.Array` alone.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from jax import Array

__all__ = ["Array", "Bool", "Dimension", "Float", "Int", "Num", "UInt8"]

# The length of an axis: an int, or a symbol in a program that jax.export traces for any length.
Dimension = Any

if TYPE_CHECKING or importlib.util.find_spec("jaxtyping") is not None:
    from jaxtyping import Bool, Float, Int, Num, UInt8
else:

    class _AnyArray:
        def __class_getitem__(cls, item: Any) -> type[Array]:
            return Array

    Bool = Float = Int = Num = UInt8 = _AnyArray
