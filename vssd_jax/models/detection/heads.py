"""The feature pyramid and the heads, with the initialisation of mmdet."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vssd_jax.models.layers import Conv, Initializer, Precision, filled, normal, uniform
from vssd_jax.types import Array, Float


def _xavier(fans: int) -> Initializer:
    """Xavier's uniform initialisation; `fans` is fan in plus fan out."""
    return uniform(-math.sqrt(6 / fans), math.sqrt(6 / fans))


def _conv(
    inputs: int,
    outputs: int,
    size: int,
    *,
    std: float | None = None,
    precision: Precision,
    rngs: nnx.Rngs,
) -> Conv:
    """A convolution with zero biases and weights of deviation `std`, else Xavier's uniform."""
    conv = Conv(inputs, outputs, size, precision=precision, rngs=rngs)
    init = _xavier(size * size * (inputs + outputs)) if std is None else normal(std)
    conv.kernel = nnx.Param(init(rngs.params(), conv.kernel.shape, precision.state))
    conv.bias = nnx.Param(filled(0, (outputs,), precision.state))
    return conv


def _linear(
    inputs: int, outputs: int, *, std: float | None = None, precision: Precision, rngs: nnx.Rngs
) -> nnx.Linear:
    init = _xavier(inputs + outputs) if std is None else normal(std)
    return nnx.Linear(
        inputs,
        outputs,
        kernel_init=init,
        dtype=precision.compute,
        param_dtype=precision.state,
        rngs=rngs,
    )


class FPN(nnx.Module):
    """Feature pyramid: maps of any widths -> maps of `channels`, and one of half the last size."""

    def __init__(
        self, widths: Sequence[int], channels: int, *, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"precision": precision, "rngs": rngs}
        self.lateral = nnx.List([_conv(width, channels, 1, **options) for width in widths])
        self.output = nnx.List([_conv(channels, channels, 3, **options) for _ in widths])

    def __call__(self, maps: Sequence[Float[Array, "B _ _ _"]]) -> list[Float[Array, "B _ _ C"]]:
        maps = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            height, width = maps[i - 1].shape[1:3]
            coarse = maps[i].repeat(2, axis=1).repeat(2, axis=2)
            maps[i - 1] = maps[i - 1] + coarse[:, :height, :width]
        maps = [conv(x) for conv, x in zip(self.output, maps, strict=True)]
        return [*maps, maps[-1][:, ::2, ::2]]


class RPNHead(nnx.Module):
    """Objectness and box deltas of each anchor.

    (B, H, W, C) -> (B, H * W * anchors) logits and (B, H * W * anchors, 4) deltas.
    """

    def __init__(
        self, channels: int, anchors: int, *, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"std": 0.01, "precision": precision, "rngs": rngs}
        self.conv = _conv(channels, channels, 3, **options)
        self.cls = _conv(channels, anchors, 1, **options)
        self.reg = _conv(channels, 4 * anchors, 1, **options)
        self.precision = precision

    def __call__(
        self, x: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B A"], Float[Array, "B A 4"]]:
        x = jax.nn.relu(self.conv(x))
        logits, deltas = (y.astype(self.precision.state) for y in (self.cls(x), self.reg(x)))
        return logits.reshape(x.shape[0], -1), deltas.reshape(x.shape[0], -1, 4)


class BoxHead(nnx.Module):
    """Class and box of each region.

    (..., 7, 7, C) -> (..., classes + 1) logits, the background last, and (..., classes, 4) deltas.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        num_classes: int,
        bins: int = 7,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"precision": precision, "rngs": rngs}
        self.fc1 = _linear(bins * bins * channels, width, **options)
        self.fc2 = _linear(width, width, **options)
        self.cls = _linear(width, num_classes + 1, std=0.01, **options)
        self.reg = _linear(width, 4 * num_classes, std=0.001, **options)
        self.precision = precision

    def __call__(
        self, x: Float[Array, "*regions bins bins C"]
    ) -> tuple[Float[Array, "*regions classes_and_background"], Float[Array, "*regions classes 4"]]:
        x = x.reshape(*x.shape[:-3], -1)
        x = jax.nn.relu(self.fc2(jax.nn.relu(self.fc1(x))))
        logits, deltas = (y.astype(self.precision.state) for y in (self.cls(x), self.reg(x)))
        return logits, deltas.reshape(*deltas.shape[:-1], -1, 4)


class Upsample(nnx.Module):
    """A deconvolution of 2x2 with stride 2: (N, H, W, C) -> (N, 2H, 2W, outputs)."""

    def __init__(
        self, inputs: int, outputs: int, *, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        # Kaiming normal, fan out, as PyTorch counts it for a deconvolution.
        init = normal(math.sqrt(2 / (4 * inputs)))
        self.kernel = nnx.Param(init(rngs.params(), (2, 2, inputs, outputs), precision.state))
        self.bias = nnx.Param(filled(0, (outputs,), precision.state))
        self.precision = precision

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N 2*H 2*W D"]:
        dtype = self.precision.compute
        count, height, width, _ = x.shape
        y = jnp.einsum("nhwi,abio->nhawbo", x.astype(dtype), self.kernel[...].astype(dtype))
        return y.reshape(count, 2 * height, 2 * width, -1) + self.bias[...].astype(dtype)


class MaskHead(nnx.Module):
    """A mask of each region for each class: (..., 14, 14, C) -> (..., 28, 28, classes) logits."""

    def __init__(
        self, channels: int, num_classes: int, *, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"precision": precision, "rngs": rngs}
        std = math.sqrt(2 / (9 * channels))
        self.convs = nnx.List([_conv(channels, channels, 3, std=std, **options) for _ in range(4)])
        self.upsample = Upsample(channels, channels, **options)
        std = math.sqrt(2 / num_classes)
        self.logits = _conv(channels, num_classes, 1, std=std, **options)
        self.precision = precision

    def __call__(
        self, x: Float[Array, "*regions H W C"]
    ) -> Float[Array, "*regions 2*H 2*W classes"]:
        lead = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:])
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        x = self.logits(jax.nn.relu(self.upsample(x)))
        return x.reshape(*lead, *x.shape[1:]).astype(self.precision.state)
