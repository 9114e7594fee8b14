"""Layers that the networks share.

Parameters and statistics are float32 whatever the compute dtype; so are norms. (With
`dtype=float64` everything is float64: the parity tests.) Arrays are channels-last.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vssd_jax.kernels.batch_norm import batch_norm
from vssd_jax.kernels.conv import conv
from vssd_jax.kernels.depthwise_conv import depthwise_conv
from vssd_jax.kernels.dispatch import in_trace, unit
from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.linear import linear
from vssd_jax.kernels.shared_one import shared_one
from vssd_jax.types import Array, Dimension, Float

Initializer = Callable[[jax.Array, tuple[int, ...], jax.typing.DTypeLike], jax.Array]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Precision:
    """`compute` is the dtype of activations, `state` that of parameters and statistics."""

    compute: jax.typing.DTypeLike = jnp.float32

    @property
    def state(self) -> jnp.dtype:
        return jnp.promote_types(self.compute, jnp.float32)


# --- Initialisation -----------------------------------------------------------------------------


# XLA takes minutes to compile the random numbers of a large model, one program for each shape.
# Outside of a transformation NumPy draws them instead; under `jax.jit` and `jax.eval_shape`,
# where a key has no value, JAX does (with other values for the same seed).
def _generator(key: jax.Array) -> np.random.Generator | None:
    if isinstance(key, jax.core.Tracer):
        return None
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


_placeholders = contextvars.ContextVar[dict | None]("placeholders", default=None)


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Within it, in a trace, initial values are zeros, one array for each shape.

    To trace the random numbers of a model takes a second, for a program that is thrown away where
    only the shapes are asked for.
    """
    token = _placeholders.set({})
    try:
        yield
    finally:
        _placeholders.reset(token)


def _placeholder(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array | None:
    """Zeros within `shapes_alone`, else None."""
    if (known := _placeholders.get()) is None:
        return None
    key = shape, jnp.dtype(dtype)
    if key not in known:
        known[key] = jnp.zeros(shape, dtype)
    return known[key]


def initializer(function: Initializer) -> Initializer:
    """`function`, but what `shapes_alone` gives within it."""

    @functools.wraps(function)
    def initial(
        key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        zeros = _placeholder(shape, dtype)
        return function(key, shape, dtype) if zeros is None else zeros

    return initial


def _on_device(values: np.ndarray, dtype: jax.typing.DTypeLike) -> jax.Array:
    # In this dtype already: JAX would compile a program to convert each shape.
    return jnp.asarray(values.astype(dtype), dtype)


def filled(value: float, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """An array of one value; JAX would compile a program for each shape outside of a trace."""
    if not in_trace():
        return _on_device(np.full(shape, value), dtype)
    zeros = _placeholder(shape, dtype)
    return jnp.full(shape, value, dtype) if zeros is None else zeros


def uniform(low: float, high: float) -> Initializer:
    """An initialiser, U(low, high)."""

    @initializer
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        if (generator := _generator(key)) is None:
            return jax.random.uniform(key, shape, dtype, low, high)
        return _on_device(generator.uniform(low, high, shape), dtype)

    return draw


def normal(std: float) -> Initializer:
    """An initialiser, N(0, std^2)."""

    @initializer
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        if (generator := _generator(key)) is None:
            return std * jax.random.normal(key, shape, dtype)
        return _on_device(generator.normal(0, std, shape), dtype)

    return draw


def torch_uniform(fan_in: int) -> Initializer:
    """U(+-1/sqrt(fan_in)): PyTorch's default for the weights and biases of convolutions."""
    return uniform(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


def required(value: T | None, what: str) -> T:
    """`value`; raises a ValueError if it is None, with `what` as the subject of the message."""
    if value is None:
        raise ValueError(f"{what} needs rngs=nnx.Rngs(dropout=...) in training")
    return value


# --- Linear layers and convolutions -------------------------------------------------------------


class Linear(nnx.Module):
    """(..., inputs) -> (..., outputs); weights of standard deviation 0.02, zero biases."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool = True,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        # The recipe truncates at +-2, a hundred standard deviations: plain normal.
        kernel = normal(0.02)(rngs.params(), (inputs, outputs), precision.state)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(filled(0, (outputs,), precision.state)) if use_bias else None
        if use_bias:
            rngs.params()  # `nnx.Linear` draws a key for the bias: a seed gives the same weights
        self.precision = precision

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        bias = None if self.bias is None else self.bias[...]
        return linear(x.astype(self.precision.compute), self.kernel[...], bias)


class Conv(nnx.Module):
    """k x k convolution with PyTorch's padding and initialisation.

    (B, H, W, inputs) -> (B, H', W', outputs); the kernel is (k, k, inputs, outputs).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        use_bias: bool = True,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        init = torch_uniform(size * size * inputs)
        shape = (size, size, inputs, outputs)
        self.kernel = nnx.Param(init(rngs.params(), shape, precision.state))
        bias = init(rngs.params(), (outputs,), precision.state) if use_bias else None
        self.bias = None if bias is None else nnx.Param(bias)
        self.stride = stride
        self.padding = size // 2 if padding is None else padding
        self.precision = precision

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        scale: Float[Array, " D"] | None = None,
        shift: Float[Array, " D"] | None = None,
    ) -> Float[Array, "B H2 W2 D"]:
        """`conv(x) * scale + shift` as one convolution: a norm that follows is folded into it.

        `scale` and `shift` are both given or both None.
        """
        return _convolve(
            x,
            self.kernel[...],
            None if self.bias is None else self.bias[...],
            scale,
            shift,
            stride=self.stride,
            padding=self.padding,
            dtype=self.precision.compute,
        )


@unit
def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    scale: jax.Array | None,
    shift: jax.Array | None,
    *,
    stride: int,
    padding: int,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """See `Conv`."""
    if scale is not None:
        assert shift is not None
        kernel = kernel * scale
        bias = shift if bias is None else bias * scale + shift
    x = x.astype(dtype)
    if kernel.shape[:2] == (1, 1) and stride == 1:
        if scale is None:
            return linear(x, kernel[0, 0], bias)
        assert bias is not None
        y = linear(x, kernel[0, 0])  # XLA does not make one kernel of product and shift
        return (y.astype(bias.dtype) + bias).astype(dtype)
    return conv(x, kernel, bias, stride=stride, padding=padding)


class DepthwiseConv(nnx.Module):
    """3x3 depthwise convolution with bias: (B, H, W, C) -> (B, ceil(H/s), ceil(W/s), C).

    The options are those of `vssd_jax.kernels.depthwise_conv.depthwise_conv`.
    """

    def __init__(
        self,
        channels: int,
        *,
        stride: int = 1,
        activation: str | None = None,
        residual: bool = False,
        relu_input: bool = False,
        implementation: str | None = None,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        init = torch_uniform(9)
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, channels), precision.state))
        self.bias = nnx.Param(init(rngs.params(), (channels,), precision.state))
        self.stride, self.activation, self.residual = stride, activation, residual
        self.relu_input, self.implementation = relu_input, implementation

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        return depthwise_conv(
            x,
            self.kernel[...],
            self.bias[...],
            stride=self.stride,
            activation=self.activation,
            residual=self.residual,
            relu_input=self.relu_input,
            implementation=self.implementation,
        )


# --- Norms --------------------------------------------------------------------------------------


class NormParams(TypedDict):
    """The parameters of a `LayerNorm`, for a layer that normalises its input by itself.

    Not the module: `nnx.tabulate` fails on modules and NamedTuples among the arguments of another.
    """

    scale: Float[Array, " C"]
    bias: Float[Array, " C"]
    epsilon: float


class LayerNorm(nnx.Module):
    """Layer normalisation over the channels: (..., C) -> (..., C)."""

    def __init__(
        self, channels: int, *, implementation: str | None = None, precision: Precision
    ) -> None:
        self.scale = nnx.Param(filled(1, (channels,), precision.state))
        self.bias = nnx.Param(filled(0, (channels,), precision.state))
        self.epsilon, self.implementation = 1e-5, implementation

    @property
    def params(self) -> NormParams:
        """The arrays, and the epsilon."""
        return NormParams(scale=self.scale[...], bias=self.bias[...], epsilon=self.epsilon)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return layer_norm(
            x,
            self.scale[...],
            self.bias[...],
            epsilon=self.epsilon,
            implementation=self.implementation,
        )


class BatchNorm(nnx.Module):
    """Batch normalisation with PyTorch's statistics, over B, H and W of the global batch.

    PyTorch normalises with the biased variance of the batch but keeps a running average of the
    unbiased one; Flax's own module keeps the biased one.

    With `batch_norm_groups` each group of images has its own statistics. The running average is
    then that of their mean over the groups of a step; of several GPUs PyTorch keeps the first
    one's.
    """

    def __init__(self, channels: int, *, precision: Precision) -> None:
        self.scale = nnx.Param(filled(1, (channels,), precision.state))
        self.bias = nnx.Param(filled(0, (channels,), precision.state))
        self.mean = nnx.BatchStat(filled(0, (channels,), precision.state))
        self.var = nnx.BatchStat(filled(1, (channels,), precision.state))
        self.use_running_average = False
        self.momentum = 0.1
        self.epsilon = 1e-5
        self.precision = precision
        self.images: int | None = None

    def running(self) -> tuple[jax.Array, jax.Array]:
        """Scale and shift (C,) of the normalisation with the running average."""
        return _running(
            self.scale[...], self.bias[...], self.mean[...], self.var[...], epsilon=self.epsilon
        )

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        dtype, scale, bias = self.precision.compute, self.scale[...], self.bias[...]
        if self.use_running_average:
            scale = scale * jax.lax.rsqrt(self.var[...] + self.epsilon)
            return ((x.astype(scale.dtype) - self.mean[...]) * scale + bias).astype(dtype)
        y, mean, var = batch_norm(x, scale, bias, self.epsilon, dtype, images=self.images)
        count = x.size // x.shape[-1]
        if self.images is not None:
            count = count // x.shape[0] * self.images
        unbiased = jax.lax.stop_gradient(var) * (count / max(count - 1, 1))
        self.mean[...] += self.momentum * (jax.lax.stop_gradient(mean) - self.mean[...])
        self.var[...] += self.momentum * (unbiased - self.var[...])
        return y


@unit
def _running(
    scale: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array, *, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """See `BatchNorm.running`."""
    scale = scale * jax.lax.rsqrt(var + epsilon)
    return scale, bias - mean * scale


class ConvNorm(nnx.Module):
    """A convolution and its batch normalisation; the options are those of `Conv`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        use_bias: bool = True,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = Conv(
            inputs,
            outputs,
            size,
            stride=stride,
            padding=padding,
            use_bias=use_bias,
            precision=precision,
            rngs=rngs,
        )
        self.norm = BatchNorm(outputs, precision=precision)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        if self.norm.use_running_average:
            # Folded into the convolution: no pass of its own over the activations.
            return self.conv(x, *self.norm.running())
        return self.norm(self.conv(x))


NORMS = (
    LayerNorm,
    BatchNorm,
    nnx.LayerNorm,
    nnx.BatchNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
    nnx.RMSNorm,
)


def norm_parameters(model: nnx.Module) -> set[str]:
    """The dotted names of the parameters of all modules whose type is in `NORMS`."""
    norms = [path for path, module in nnx.iter_graph(model) if isinstance(module, NORMS)]
    return {
        ".".join(map(str, path))
        for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if any(path[: len(norm)] == norm for norm in norms)
    }


def batch_norm_groups(model: nnx.Module, images: int | None) -> None:
    """Makes every `BatchNorm`, in place, take its moments in training from groups of `images`.

    They follow each other in the batch; None makes all of the global batch one group.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.images = images


def round_kernels(model: nnx.Module) -> None:
    """Rounds the parameters, in place, that layers use in no other dtype than the compute dtype.

    For inference: the results are the same, bit for bit.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            kernel = module.kernel[...].astype(module.precision.compute)
            module.kernel = nnx.Param(kernel)


# --- Stochastic depth and dropout ---------------------------------------------------------------


class DropPath(nnx.Module):
    """Stochastic depth: in training, drops both branches of a block, mixer and MLP, for a sample.

    Each branch of each sample on its own, with the probability of `rates` for its block. A call
    returns for each block the factors (2, B) of its branches, 0 or 1 / (1 - rate), or None where
    all are 1. They are drawn at once: on a GPU an own draw for each branch is four kernels more.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = tuple(rates)
        self.deterministic = False

    def __call__(
        self, batch: Dimension, rngs: nnx.Rngs | None
    ) -> list[Float[Array, "2 B"] | None]:
        if self.deterministic or not any(self.rates):
            return [None] * len(self.rates)
        keep = 1 - jnp.array(self.rates)[:, None, None]
        key = required(rngs, "a model with drop path").dropout()
        factors = jax.random.bernoulli(key, keep, (len(self.rates), 2, batch)) / keep
        return [
            f * shared_one() if rate else None
            for f, rate in zip(factors, self.rates, strict=True)
        ]


class ChannelDropout(nnx.Module):
    """In training, drops whole channels of a sample with probability `rate`: (B, H, W, C)."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.deterministic = False

    def __call__(
        self, x: Float[Array, "B H W C"], rngs: nnx.Rngs | None
    ) -> Float[Array, "B H W C"]:
        if self.deterministic or self.rate == 0:
            return x
        keep = 1 - self.rate
        key = required(rngs, "a model with dropout").dropout()
        mask = jax.random.bernoulli(key, keep, (x.shape[0], 1, 1, x.shape[-1]))
        return jnp.where(mask, x / keep, jnp.zeros((), x.dtype))
