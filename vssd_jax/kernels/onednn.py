"""Matrix products, convolutions and LayerNorm by oneDNN, which XLA's runtime for CPUs contains.

XLA's compiler leaves it aside, but its runtime runs oneDNN's calls wherever a program has them: one
for a product with its bias, activation and sum, so that none of them is a trip through the memory.
Against XLA's own it is as fast at float32 products and faster at depthwise convolutions with SiLU
or in bfloat16, where it does without the float32 copies between. The form of a call is not
documented and changed once, so a small program is run and compared first (`missing`). XLA cannot
write a program with such calls to disk; exported, it has plain JAX in their place.
"""

import concurrent.futures
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import ad, batching, mlir

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.layer_norm import xla

f32 = jnp.float32
DTYPES = (jnp.float32, jnp.bfloat16)
ACTIVATIONS = {"gelu": "GELU_ERF", "silu": "SWISH", "relu": "RELU"}


def supports(x: Array, branch_scale: Array | None = None, **_: object) -> str | None:
    """Why an operation with these arguments cannot be computed by calls, or None."""
    if branch_scale is not None:
        return "it is for inference, without a scale of the branch"
    return dispatch.wrong_dtype(x, *DTYPES)


def matmul(
    a: Array,
    b: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    transpose: str | None = None,
    activation: str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Array:
    """`activation(a b + bias) + residual`, accumulated in float32 and rounded once.

    Args:
      a: (..., M, K), or (..., K, M) with `transpose="left"`.
      b: (..., K, N), or (..., N, K) with `transpose="right"`; in the dtype of `a`, one of `DTYPES`.
      bias: (N,); for matrices alone.
      residual: (..., M, N).
      transpose: which of the two is transposed, if any.
      activation: a key of `ACTIVATIONS`, or None.
      dtype: of the result; None for that of `a`.

    Returns:
      (..., M, N).
    """
    rows, columns = -1 if transpose == "left" else -2, -2 if transpose == "right" else -1
    shape = *a.shape[:-2], a.shape[rows], b.shape[columns]
    config = {"transpose_a": transpose == "left", "transpose_b": transpose == "right"}
    row = None if bias is None else bias[None]
    return _call("matmul", config, shape, dtype, a, b, row, activation, residual)


def kernel_gradient(x: Array, dy: Array) -> Array:
    """That of a linear layer, in float32: rows (R, C) of its input and (R, D) of dy -> (C, D)."""
    rows, columns = dy.shape
    # Measured: a wide result of very many rows, and a narrow one, are faster as their transpose.
    flat = x.dtype == f32 and x.shape[1] < columns and rows > 48 * columns
    if flat or columns < 16:
        return matmul(dy, x, transpose="left", dtype=f32).T
    return matmul(x, dy, transpose="left", dtype=f32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(
    a: Array, b: Array, transpose: str | None = None, dtype: jax.typing.DTypeLike = f32
) -> Array:
    """`matmul` of two arrays alone, with a gradient of such products.

    That of the result is rounded to the dtype of `a` and `b`.
    """
    return matmul(a, b, transpose=transpose, dtype=dtype)


def _product_gradients(
    transpose: str | None, dtype: jax.typing.DTypeLike, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    a, b = saved
    dy = dy.astype(a.dtype)
    if transpose is None:
        return matmul(dy, b, transpose="right"), matmul(a, dy, transpose="left")
    if transpose == "left":
        return matmul(b, dy, transpose="right"), matmul(a, dy)
    return matmul(dy, b), matmul(dy, a, transpose="left")


product.defvjp(
    lambda a, b, transpose, dtype: (product(a, b, transpose, dtype), (a, b)), _product_gradients
)


def convolution(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    activation: str | None = None,
) -> Array:
    """`activation(convolution of x + bias) + residual`, as `matmul`.

    Args:
      x: (B, H, W, C), in one of `DTYPES`.
      kernel: (h, w, C / groups, D), in the dtype of `x`.
      bias: (D,).
      residual: as the result.
      stride: of rows and columns.
      padding: zeros on each side.
      groups: of channels; C for a depthwise convolution.
      activation: a key of `ACTIVATIONS`, or None.

    Returns:
      (B, (H + 2 padding - h) // stride + 1, (W + 2 padding - w) // stride + 1, D), as `x`.
    """
    sizes = zip(x.shape[1:3], kernel.shape[:2], strict=True)
    height, width = ((size + 2 * padding - taps) // stride + 1 for size, taps in sizes)
    image = {"dims": 4, "data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    taps = {"input_feature_dim": 2, "output_feature_dim": 3, "spatial_dims": [0, 1]}
    config = {
        "dims": 4,
        "input": image,
        "output": image,
        "kernel": {"dims": 4, "filter": taps},
        "window": {
            "pad_left": [padding] * 2,
            "pad_right": [padding] * 2,
            "strides": [stride] * 2,
            "window_dilations": [1, 1],
        },
        "feature_groups": groups,
    }
    shape = x.shape[0], height, width, kernel.shape[3]
    return _call("convolution", config, shape, None, x, kernel, bias, activation, residual)


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """LayerNorm of each row of `x`, (R, C), in one of `DTYPES`; scale and bias: (C,)."""
    # XLA's message has the bits of the number.
    bits = int(np.float32(epsilon).view(np.int32))
    return _primitive.bind(
        x,
        scale.astype(f32),
        bias.astype(f32),
        name="layernorm",
        config=json.dumps({"rescale": "SCALE_AND_SHIFT", "epsilon_typecast": bits}),
        steps=(),
        shape=x.shape,
        dtype=x.dtype,
    )


def _call(
    name: str,
    config: dict,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike | None,
    x: Array,
    weights: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
) -> Array:
    operands = [x, weights]
    steps = []
    if bias is not None:
        operands.append(bias.astype(f32))
        steps.append("BIAS")
    if activation is not None:
        steps.append(ACTIVATIONS[activation])
    if residual is not None:
        operands.append(residual)
        steps.append("BINARY_ADD")
    return _primitive.bind(
        *operands,
        name=name,
        config=json.dumps(config),
        steps=tuple(steps),
        shape=shape,
        dtype=jnp.dtype(dtype or x.dtype),
    )


_primitive = jax.extend.core.Primitive("onednn")
# The fields of XLA's messages.
_MESSAGES = {
    "matmul": "onednn_matmul_config",
    "convolution": "onednn_conv_config",
    "layernorm": "onednn_layer_norm_config",
}


@_primitive.def_abstract_eval
def _abstract(*operands: Any, shape: tuple[int, ...], dtype: jnp.dtype, **_: Any) -> Any:
    return jax.core.ShapedArray(shape, dtype)


def _plain(
    x: Array, weights: Array, *others: Array, name: str, config: str, steps: tuple, **to: Any
) -> Array:
    """What a call computes, in plain JAX."""
    options = json.loads(config)
    if name == "layernorm":
        epsilon = float(np.int32(options["epsilon_typecast"]).view(np.float32))
        return xla.layer_norm(x, weights, others[0], None, epsilon)
    if name == "matmul":
        a = jnp.swapaxes(x, -1, -2) if options["transpose_a"] else x
        b = jnp.swapaxes(weights, -1, -2) if options["transpose_b"] else weights
        y = jnp.matmul(a, b, preferred_element_type=f32)
    else:
        window = options["window"]
        y = jax.lax.conv_general_dilated(
            x,
            weights,
            window["strides"],
            list(zip(window["pad_left"], window["pad_right"], strict=True)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=options["feature_groups"],
            preferred_element_type=f32,
        )
    operands = iter(others)
    for step in steps:
        y = _PLAIN[step](y) if step in _PLAIN else y + next(operands).astype(f32)
    return y.astype(to["dtype"])


_PLAIN: dict[str, Callable[[Array], Array]] = {
    "GELU_ERF": functools.partial(jax.nn.gelu, approximate=False),
    "SWISH": jax.nn.silu,
    "RELU": jax.nn.relu,
}


def _lower(context: mlir.LoweringRuleContext, *operands: Any, **parameters: Any) -> Any:
    # Nothing promises that another version of XLA reads the call of an exported program.
    if context.module_context.lowering_parameters.for_export:
        return mlir.lower_fun(_plain, multiple_results=False)(context, *operands, **parameters)
    name, steps = parameters["name"], parameters["steps"]
    config = json.loads(parameters["config"])
    if steps:
        config["fusions"] = {"ops": steps}
    call = jax.ffi.ffi_lowering(
        f"__onednn${name}", api_version=1, backend_config=json.dumps({_MESSAGES[name]: config})
    )
    return call(context, *operands)


def _differentiated(
    operands: tuple[Array, ...], tangents: tuple[Any, ...], **parameters: Any
) -> tuple[Array, Array]:
    """Of a gradient that is differentiated again: by plain JAX."""
    plain = functools.partial(_plain, **parameters)
    return jax.jvp(plain, operands, tuple(map(ad.instantiate_zeros, tangents)))


def _one_by_one(
    operands: tuple[Array, ...], axes: tuple[int | None, ...], **parameters: Any
) -> tuple[Array, int]:
    """Under `jax.vmap`."""
    mapped = [
        jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True) if axis is not None
    ]

    def call(parts: list[Array]) -> Array:
        rest = iter(parts)
        return _primitive.bind(
            *(x if axis is None else next(rest) for x, axis in zip(operands, axes, strict=True)),
            **parameters,
        )

    return jax.lax.map(call, mapped), 0


_primitive.def_impl(_plain)  # where nothing is compiled
ad.primitive_jvps[_primitive] = _differentiated
batching.primitive_batchers[_primitive] = _one_by_one
mlir.register_lowering(_primitive, _lower, platform="cpu")


@functools.cache
def missing() -> str | None:
    """Why these calls cannot be used with this version of XLA, or None. Runs a small program."""
    # In a thread of its own, for which the contexts of a trace or a mesh do not hold.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_try).result()


def _try() -> str | None:
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((2, 5, 6, size), np.float32) for size in (32, 48))
    w, taps = (rng.standard_normal(s, np.float32) for s in ((32, 48), (3, 3, 1, 32)))
    bias = rng.standard_normal(48, np.float32)

    def examples(*arrays: Array) -> tuple[Array, ...]:
        x, w, bias, dy, taps = arrays
        rows, dy_rows = x.reshape(-1, 32), dy.reshape(-1, 48)
        return (
            matmul(rows, w, bias, dy_rows, activation="relu"),
            matmul(rows, dy_rows, transpose="left"),
            matmul(dy_rows, w, transpose="right"),
            convolution(x, taps, bias[:32], padding=1, stride=2, groups=32, activation="relu"),
            layer_norm(dy_rows, bias, bias, 1e-3),
        )

    arrays = x, w, bias, dy, taps
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            program = jax.export.export(jax.jit(examples), platforms=["cpu"])(*arrays)
            for a, b in zip(jax.jit(examples)(*arrays), program.call(*arrays), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    except (jax.errors.JaxRuntimeError, AssertionError) as error:
        return f"XLA's oneDNN does not work here ({str(error).strip().splitlines()[0]})"
    return None
