"""UperNet (arXiv 1807.10221) on a VSSD backbone: the paper's segmentor for ADE20K.

Decoder: pyramid pooling on the last feature map, a top-down path over all four, and a fusion
of the four at stride 4. In training an auxiliary FCN head reads the third map.
Arrays are channels-last. Shape letters: B batch, H and W height and width, C channels,
K classes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vssd_jax.models import torch_names, vssd
from vssd_jax.models.family import BackboneConfig, Head, Images, Recognised, register
from vssd_jax.models.layers import ChannelDropout, Conv, ConvNorm, Precision, filled, normal
from vssd_jax.models.torch_names import Row, TensorShapes
from vssd_jax.models.vssd import VSSDConfig
from vssd_jax.types import Array, Float


@dataclasses.dataclass(frozen=True)
class UperNetConfig:
    """One segmentor.

    Attributes:
      backbone: the config of the backbone.
      num_classes: K of the labels.
      channels: width of the decoder.
      aux_channels: width of the auxiliary head.
      pool_scales: the pyramid's grids, s x s cells each.
      dropout: rate of the dropout of whole channels before both classifiers.
      aux_weight: weight of the auxiliary head's loss.
    """

    backbone: BackboneConfig
    num_classes: int = 150
    channels: int = 512
    aux_channels: int = 256
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    aux_weight: float = 0.4

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool_scales", tuple(self.pool_scales))  # a list in JSON

    @classmethod
    def nano(cls) -> "UperNetConfig":
        """A stand-in for tests and small pictures; not in the paper."""
        return cls(VSSDConfig.nano(), num_classes=11, channels=32, aux_channels=16)

    @classmethod
    def micro(cls) -> "UperNetConfig":
        return cls(VSSDConfig.micro())

    @classmethod
    def tiny(cls) -> "UperNetConfig":
        return cls(VSSDConfig.tiny())

    @classmethod
    def small(cls) -> "UperNetConfig":
        return cls(VSSDConfig.small())


# --- Resampling: a small matrix for each axis ---------------------------------------------------


@overload
def bilinear_matrix(inputs: int, outputs: int, rows: int | None = None) -> np.ndarray: ...
@overload
def bilinear_matrix(
    inputs: int, outputs: int | jax.Array, rows: int | None = None
) -> np.ndarray | jax.Array: ...
def bilinear_matrix(
    inputs: int, outputs: int | jax.Array, rows: int | None = None
) -> Float[Array | np.ndarray, "rows {inputs}"]:
    """(outputs, inputs) weights of linear interpolation between pixel centres.

    The same as PyTorch's `interpolate(mode="bilinear", align_corners=False)`: centres at half
    pixels, the outermost input beyond the outermost centres, and no antialiasing.

    Args:
      inputs, outputs: the sizes. A traced `outputs` gives a float32 JAX array, an int a
        float64 NumPy array.
      rows: number of rows to return; those from `outputs` on repeat the last input.
    """
    xp: Any = np if isinstance(outputs, int) else jnp
    cells = xp.arange(outputs if rows is None else rows)
    position = xp.clip((cells + 0.5) * (inputs / outputs) - 0.5, 0, inputs - 1)
    return xp.maximum(0, 1 - abs(position[:, None] - xp.arange(inputs)))


def pooling_matrix(inputs: int, outputs: int) -> Float[np.ndarray, "{outputs} {inputs}"]:
    """(outputs, inputs) float64 weights of PyTorch's adaptive average pooling.

    Cell i averages the inputs from floor(i * inputs / outputs) up to, and without,
    ceil((i + 1) * inputs / outputs); cells overlap where the sizes do not divide.
    """
    matrix = np.zeros((outputs, inputs))
    for i in range(outputs):
        start, stop = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def resample(
    x: Float[Array, "B H W C"],
    rows: Float[Array | np.ndarray, "H2 H"],
    columns: Float[Array | np.ndarray, "W2 W"],
) -> Float[Array, "B H2 W2 C"]:
    """(B, H, W, C) with (H', H) and (W', W) matrices -> (B, H', W', C), in the dtype of x.

    It sums in float32 (float64 for float64): PyTorch does so for half precision too.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    # Matrix products in float32 would round their inputs to 10 bits on a GPU.
    highest = jax.lax.Precision.HIGHEST
    y = jnp.einsum("oh,bhwc->bowc", jnp.asarray(rows, dtype), x.astype(dtype), precision=highest)
    y = jnp.einsum("ow,bhwc->bhoc", jnp.asarray(columns, dtype), y, precision=highest)
    return y.astype(x.dtype)


def resize(x: Float[Array, "B H W C"], size: Sequence[int]) -> Float[Array, "B H2 W2 C"]:
    """(B, H, W, C) -> (B, *size, C), bilinear as in `bilinear_matrix`."""
    height, width = x.shape[1:3]
    if (height, width) == tuple(size):
        return x
    return resample(x, bilinear_matrix(height, size[0]), bilinear_matrix(width, size[1]))


def adaptive_average_pool(
    x: Float[Array, "B H W C"], size: int
) -> Float[Array, "B {size} {size} C"]:
    """(B, H, W, C) -> (B, size, size, C) means over a grid of cells, for any H and W."""
    height, width = x.shape[1:3]
    return resample(x, pooling_matrix(height, size), pooling_matrix(width, size))


# --- Heads ------------------------------------------------------------------------------------


class ConvNormReLU(ConvNorm):
    """A bias-free k x k convolution, batch normalisation and ReLU, as the heads use it."""

    def __init__(
        self, inputs: int, outputs: int, size: int, *, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        super().__init__(inputs, outputs, size, use_bias=False, precision=precision, rngs=rngs)
        # He's initialisation over the outputs, mmsegmentation's own for its convolutions.
        init = normal(math.sqrt(2 / (size * size * outputs)))
        self.conv.kernel[...] = init(rngs.params(), self.conv.kernel.shape, precision.state)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        return jax.nn.relu(super().__call__(x))


def _classifier(
    channels: int, num_classes: int, *, precision: Precision, rngs: nnx.Rngs
) -> Conv:
    conv = Conv(channels, num_classes, 1, precision=precision, rngs=rngs)
    init = normal(0.01)
    conv.kernel[...] = init(rngs.params(), conv.kernel.shape, precision.state)
    conv.bias = nnx.Param(filled(0, (num_classes,), precision.state))
    return conv


class DecodeHead(nnx.Module):
    """The decoder: four feature maps -> (B, H/4, W/4, K) logits."""

    def __init__(
        self,
        config: UperNetConfig,
        widths: Sequence[int],
        num_classes: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"precision": precision, "rngs": rngs}
        channels, levels = config.channels, len(widths)
        self.pool_scales = config.pool_scales
        self.ppm = nnx.List(
            [ConvNormReLU(widths[-1], channels, 1, **options) for _ in config.pool_scales]
        )
        pyramid = widths[-1] + len(config.pool_scales) * channels
        self.bottleneck = ConvNormReLU(pyramid, channels, 3, **options)
        self.lateral = nnx.List(
            [ConvNormReLU(width, channels, 1, **options) for width in widths[:-1]]
        )
        self.output = nnx.List(
            [ConvNormReLU(channels, channels, 3, **options) for _ in widths[:-1]]
        )
        self.fpn_bottleneck = ConvNormReLU(levels * channels, channels, 3, **options)
        self.dropout = ChannelDropout(config.dropout)
        self.classifier = _classifier(channels, num_classes, **options)

    def pyramid_pooling(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """(B, H, W, C) -> (B, H, W, channels), with the context of the pyramid's cells."""
        context = [
            resize(conv(adaptive_average_pool(x, scale)), x.shape[1:3])
            for scale, conv in zip(self.pool_scales, self.ppm, strict=True)
        ]
        return self.bottleneck(jnp.concatenate([x, *context], -1))

    def __call__(
        self, maps: Sequence[Float[Array, "B _ _ _"]], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B H4 W4 K"]:
        paths = [conv(x) for conv, x in zip(self.lateral, maps[:-1], strict=True)]
        paths.append(self.pyramid_pooling(maps[-1]))
        for level in reversed(range(len(paths) - 1)):
            paths[level] += resize(paths[level + 1], paths[level].shape[1:3])
        outputs = [conv(x) for conv, x in zip(self.output, paths[:-1], strict=True)]
        outputs.append(paths[-1])
        outputs = [resize(x, outputs[0].shape[1:3]) for x in outputs]
        x = self.fpn_bottleneck(jnp.concatenate(outputs, -1))
        return self.classifier(self.dropout(x, rngs))


class AuxiliaryHead(nnx.Module):
    """A fully convolutional head: (B, H/16, W/16, C) -> (B, H/16, W/16, K) logits."""

    def __init__(
        self,
        config: UperNetConfig,
        width: int,
        num_classes: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"precision": precision, "rngs": rngs}
        self.conv = ConvNormReLU(width, config.aux_channels, 3, **options)
        self.dropout = ChannelDropout(config.dropout)
        self.classifier = _classifier(config.aux_channels, num_classes, **options)

    def __call__(
        self, x: Float[Array, "B H W C"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B H W K"]:
        return self.classifier(self.dropout(self.conv(x), rngs))


class UperNet(nnx.Module):
    """The segmentor.

    Args:
      config: the architecture.
      num_classes: K; None is the config's.
      dtype: float32 or bfloat16 activations; logits are float32.
      remat: recompute the backbone's blocks in the backward pass.
      implementation: of the backbone's operations, see `build` in `family.py`.
      rngs: with a `params` stream for the initialisation.
    """

    def __init__(
        self,
        config: UperNetConfig,
        *,
        num_classes: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.aux_weight = config, config.aux_weight
        self.num_classes = config.num_classes if num_classes is None else num_classes
        self.precision = Precision(jnp.dtype(dtype))
        self.backbone = config.backbone.make_backbone(
            dtype=dtype, remat=remat, implementation=implementation, rngs=rngs
        )
        widths = self.backbone.widths
        options: dict[str, Any] = {"precision": self.precision, "rngs": rngs}
        self.decode_head = DecodeHead(config, widths, self.num_classes, **options)
        self.auxiliary_head = AuxiliaryHead(config, widths[-2], self.num_classes, **options)

    def __call__(
        self, images: Images, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B H4 W4 K"], Float[Array, "B H16 W16 K"]]:
        """Logits of both heads, before any upsampling.

        Args:
          images: (B, H, W, 3), normalised with ImageNet's mean and deviation; any H and W.
          rngs: the `dropout` stream, needed in training.

        Returns:
          (B, ceil(H/4), ceil(W/4), K) of the decoder and (B, ceil(H/16), ceil(W/16), K) of the
          auxiliary head, float32.
        """
        maps = self.backbone.feature_maps(images, rngs)
        dtype = self.precision.state
        decode = self.decode_head(maps, rngs).astype(dtype)
        return decode, self.auxiliary_head(maps[-2], rngs).astype(dtype)

    def logits(self, images: Images) -> Float[Array, "B H W K"]:
        """(B, H, W, 3) images -> (B, H, W, K) logits of the decoder at the images' size."""
        decode = self.decode_head(self.backbone.feature_maps(images))
        return resize(decode.astype(self.precision.state), images.shape[1:3])


# --- The released checkpoints, and UperNet on other backbones -----------------------------------

_CONV_NORMS = {
    "decode_head.psp_modules.{}.1": "decode_head.ppm.{}",
    "decode_head.bottleneck": "decode_head.bottleneck",
    "decode_head.lateral_convs.{}": "decode_head.lateral.{}",
    "decode_head.fpn_convs.{}": "decode_head.output.{}",
    "decode_head.fpn_bottleneck": "decode_head.fpn_bottleneck",
    "auxiliary_head.convs.0": "auxiliary_head.conv",
}
_TORCH_HEADS = (
    *(Row(f"{a}.conv", f"{b}.conv", torch_names.CONV) for a, b in _CONV_NORMS.items()),
    *(Row(f"{a}.bn", f"{b}.norm", torch_names.BATCH_NORM) for a, b in _CONV_NORMS.items()),
    Row("decode_head.conv_seg", "decode_head.classifier", torch_names.CONV),
    Row("auxiliary_head.conv_seg", "auxiliary_head.classifier", torch_names.CONV),
)


def _recognise(shapes: TensorShapes) -> Recognised | None:
    if not shapes.any_under("decode_head."):
        return None
    fields = {
        "channels": shapes.size("decode_head.bottleneck.conv.weight"),
        "aux_channels": shapes.size("auxiliary_head.convs.0.conv.weight"),
    }
    return Recognised(shapes.size("decode_head.conv_seg.weight"), fields)


HEAD = Head(
    prefix="upernet_",
    module=UperNet,
    classifier=("decode_head.classifier.", "auxiliary_head.classifier."),
    torch_table=_TORCH_HEADS,
    recognise=_recognise,
    training_fields=("dropout", "aux_weight"),
)
FAMILY = register(
    HEAD.on(
        vssd.FAMILY,
        {
            "nano": UperNetConfig.nano,
            "micro": UperNetConfig.micro,
            "tiny": UperNetConfig.tiny,
            "small": UperNetConfig.small,
        },
    )
)
