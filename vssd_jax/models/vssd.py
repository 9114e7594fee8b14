"""VSSD: Vision Mamba with Non-Causal State Space Duality (arXiv 2407.18559).

The order is the paper's: configuration, stem, mixers, block, stage, network. Then come the names of
the parameters in the released PyTorch checkpoints, and how those are recognised.
Arrays are channels-last. Shape letters: B batch, H and W height and width, L = H * W tokens,
C channels, N state size, P head dimension.

Norms, softmax, token weights and states are float32 whatever the compute `dtype`.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vssd_jax.errors import UserError
from vssd_jax.kernels.add_branch import add_branch
from vssd_jax.kernels.attention import attention
from vssd_jax.kernels.dispatch import check_name, in_trace, unit
from vssd_jax.kernels.expand_depthwise import expand_depthwise
from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.mlp import MLPParams, mlp
from vssd_jax.kernels.nc_ssd import token_weights
from vssd_jax.kernels.nc_ssd_mixer import MixerParams, nc_ssd_mixer
from vssd_jax.kernels.norm_linear import norm_linear
from vssd_jax.kernels.relu import relu
from vssd_jax.models import torch_names
from vssd_jax.models.family import Family, Images, Recognised, register
from vssd_jax.models.layers import (
    Conv,
    ConvNorm,
    DepthwiseConv,
    DropPath,
    LayerNorm,
    Linear,
    NormParams,
    Precision,
    filled,
    initializer,
    uniform,
)
from vssd_jax.models.ssd import bidirectional_ssd, causal_ssd
from vssd_jax.models.taps import tap
from vssd_jax.models.torch_names import Row, TensorShapes
from vssd_jax.types import Array, Float

MIXERS = ("ncssd", "ssd", "bissd", "attention")


@dataclasses.dataclass(frozen=True)
class VSSDConfig:
    """One architecture; the four-element fields have an element per stage.

    Attributes:
      embed_dim: channels of the first stage; each later stage doubles them.
      depths: blocks per stage.
      num_heads: heads of the mixers per stage.
      d_state: N, the state size of the SSD mixers.
      expand: inner width of the SSD mixers as a multiple of C.
      ngroups: groups of heads that share B and C.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      mixers: "ncssd" (the paper's), "ssd" (causal scan), "bissd" (half of the heads scan
        backward) or "attention" per stage.
      stem: "conv" (overlapping convolutions) or "patch" (4x4 patches).
      downsample: "conv" (inverted bottleneck) or "patch" (one 3x3 convolution).
      token_weight_sign: +1, or -1 for the ablation with negative token weights.
    """

    embed_dim: int = 64
    depths: tuple[int, ...] = (2, 4, 8, 4)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    d_state: int = 64
    expand: int = 2
    ngroups: int = 1
    drop_path: float = 0.2
    mixers: tuple[str, ...] = ("ncssd", "ncssd", "ncssd", "attention")
    stem: str = "conv"
    downsample: str = "conv"
    token_weight_sign: int = 1

    def __post_init__(self) -> None:
        for field in ("depths", "num_heads", "mixers"):
            value = tuple(getattr(self, field))  # a list when it comes from JSON
            object.__setattr__(self, field, value)
            if len(value) != 4:
                raise ValueError(f"{field} needs one element for each of the 4 stages: {value}")
        for mixer in self.mixers:
            if mixer not in MIXERS:
                raise ValueError(f"unknown mixer {mixer!r}; choose from {', '.join(MIXERS)}")
        for field in ("stem", "downsample"):
            if getattr(self, field) not in ("conv", "patch"):
                raise ValueError(f'{field} must be "conv" or "patch": {getattr(self, field)!r}')
        if self.token_weight_sign not in (1, -1):
            raise ValueError(f"token_weight_sign must be 1 or -1: {self.token_weight_sign}")
        if self.embed_dim % 2:
            raise ValueError(f"embed_dim must be even: {self.embed_dim}")
        for stage, (mixer, heads) in enumerate(zip(self.mixers, self.num_heads, strict=True)):
            inner = self.embed_dim * 2**stage * (1 if mixer == "attention" else self.expand)
            if mixer == "bissd" and self.ngroups % 2:
                raise ValueError(
                    f"stage {stage}: a bissd mixer needs an even number of groups, half of them "
                    f"for each direction: ngroups={self.ngroups}"
                )
            if inner % heads or heads % (1 if mixer == "attention" else self.ngroups):
                raise ValueError(
                    f"stage {stage}: {heads} heads and {self.ngroups} groups do not divide "
                    f"a {mixer} mixer of width {inner}"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the four stages."""
        return tuple(self.embed_dim * 2**stage for stage in range(4))

    @classmethod
    def nano(cls) -> "VSSDConfig":
        """A stand-in for tests and small pictures; not in the paper."""
        return cls(
            embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), d_state=16, drop_path=0.0
        )

    @classmethod
    def micro(cls) -> "VSSDConfig":
        return cls(embed_dim=48, depths=(2, 2, 8, 4), d_state=48, drop_path=0.1)

    @classmethod
    def tiny(cls) -> "VSSDConfig":
        return cls(embed_dim=64, depths=(2, 4, 8, 4), drop_path=0.2)

    @classmethod
    def small(cls) -> "VSSDConfig":
        return cls(embed_dim=64, depths=(3, 4, 21, 5), drop_path=0.4)

    @classmethod
    def base(cls) -> "VSSDConfig":
        return cls(embed_dim=96, depths=(3, 4, 21, 5), num_heads=(3, 6, 12, 24), drop_path=0.6)

    def make_backbone(
        self,
        *,
        dtype: jax.typing.DTypeLike,
        remat: bool,
        implementation: str | None,
        rngs: nnx.Rngs,
    ) -> "VSSD":
        return VSSD(
            self, num_classes=None, dtype=dtype, remat=remat, implementation=implementation,
            rngs=rngs,
        )  # fmt: skip


# --- Stem and downsampling ----------------------------------------------------------------------


class ConvStem(nnx.Module):
    """Overlapping stem: (B, H, W, 3) -> (B, ceil(H/4), ceil(W/4), E)."""

    def __init__(
        self, embed_dim: int, *, implementation: str | None, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        del implementation  # its convolutions are XLA's

        def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> ConvNorm:
            return ConvNorm(
                inputs, outputs, size, stride=stride, use_bias=False, precision=precision, rngs=rngs
            )

        half = embed_dim // 2
        self.conv1 = conv(3, half, 3, stride=2)
        self.conv2 = conv(half, half, 3)
        self.conv3 = conv(half, half, 3)
        self.conv4 = conv(half, 4 * embed_dim, 3, stride=2)
        self.conv5 = conv(4 * embed_dim, embed_dim, 1)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H4 W4 E"]:
        x = relu(self.conv1(images))
        x = x + self.conv3(relu(self.conv2(x)))
        return self.conv5(relu(self.conv4(x)))


class PatchStem(nnx.Module):
    """The ablation's stem, 4x4 patches: (B, H, W, 3) -> (B, H // 4, W // 4, E)."""

    def __init__(
        self, embed_dim: int, *, implementation: str | None, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = ConvNorm(
            3, embed_dim, 4, stride=4, padding=0, use_bias=False, precision=precision, rngs=rngs
        )
        self.norm = LayerNorm(embed_dim, implementation=implementation, precision=precision)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H4 W4 E"]:
        return self.norm(relu(self.conv1(images)))


class ConvDownsample(nnx.Module):
    """Inverted bottleneck: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(
        self, channels: int, *, implementation: str | None, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        wide = 8 * channels
        self.conv1 = Conv(channels, wide, 1, precision=precision, rngs=rngs)
        self.conv2 = DepthwiseConv(
            wide,
            stride=2,
            relu_input=True,
            activation="relu",
            implementation=implementation,
            precision=precision,
            rngs=rngs,
        )
        self.conv3 = ConvNorm(wide, 2 * channels, 1, precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        conv1, conv2 = self.conv1, self.conv2
        assert conv1.bias is not None
        hidden = _expanded(
            x,
            conv1.kernel[...],
            conv1.bias[...],
            conv2.kernel[...],
            conv2.bias[...],
            dtype=conv1.precision.compute,
            implementation=conv2.implementation,
        )
        return self.conv3(hidden)


@unit
def _expanded(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
    implementation: str | None,
) -> jax.Array:
    """See `expand_depthwise`; `w1` is (1, 1, C, D)."""
    return expand_depthwise(
        x.astype(dtype), w1[0, 0], b1, kernel, bias, implementation=implementation
    )


class PatchDownsample(nnx.Module):
    """The ablation's downsampling: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(
        self, channels: int, *, implementation: str | None, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = Conv(channels, 2 * channels, 3, stride=2, precision=precision, rngs=rngs)
        self.norm = LayerNorm(2 * channels, implementation=implementation, precision=precision)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        return self.norm(relu(self.conv1(x)))


# --- Mixers: x + branch_scale * mixer(norm(x)) --------------------------------------------------


class SSDMixer(nnx.Module):
    """The NC-SSD mixer (section 3.2, figure 3), or one of the scans it is compared with.

    `kind` is "ncssd", "ssd" or "bissd".
    """

    def __init__(
        self,
        config: VSSDConfig,
        channels: int,
        heads: int,
        *,
        kind: str,
        implementation: str | None,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        inner = config.expand * channels
        state = config.ngroups * config.d_state
        self.sizes = (inner, inner + 2 * state, heads)  # z, x|B|C, dt
        self.groups, self.kind, self.sign = config.ngroups, kind, config.token_weight_sign
        self.implementation, self.precision = implementation, precision
        self.in_proj = Linear(
            channels, sum(self.sizes), use_bias=False, precision=precision, rngs=rngs
        )
        self.conv = DepthwiseConv(
            inner + 2 * state,
            activation="silu",
            implementation=implementation,
            precision=precision,
            rngs=rngs,
        )
        self.dt_bias = nnx.Param(_initial_dt_bias(rngs.params(), (heads,), precision.state))
        self.A_log = nnx.Param(_initial_a_log(rngs.params(), (heads,), precision.state))
        self.D = nnx.Param(filled(1, (heads,), precision.state))
        self.norm = LayerNorm(inner, implementation=implementation, precision=precision)
        self.out_proj = Linear(inner, channels, use_bias=False, precision=precision, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        norm: NormParams,
        branch_scale: Float[Array, " B"] | None,
    ) -> Float[Array, "B H W C"]:
        z, xbc, dt = norm_linear(
            x,
            norm["scale"],
            norm["bias"],
            self.in_proj.kernel[...],
            widths=self.sizes,
            dtypes=(x.dtype, x.dtype, self.precision.state),  # softplus(dt) is float32
            epsilon=norm["epsilon"],
            implementation=self.implementation,
        )
        dt_bias, a_log, d = self.dt_bias[...], self.A_log[...], self.D[...]
        if self.kind == "ncssd":
            return nc_ssd_mixer(
                x,
                xbc,
                tap("token_weights", token_weights(dt, dt_bias, a_log, sign=self.sign)),
                z,
                branch_scale,
                MixerParams(
                    self.conv.kernel[...],
                    self.conv.bias[...],
                    d,
                    self.norm.scale[...],
                    self.norm.bias[...],
                    self.out_proj.kernel[...],
                ),
                groups=self.groups,
                epsilon=self.norm.epsilon,
                implementation=self.implementation,
            )
        scan = causal_ssd if self.kind == "ssd" else bidirectional_ssd
        dt, a = _steps(dt, dt_bias, a_log)
        dt = tap("token_weights", dt)
        batch, inner = x.shape[0], self.sizes[0]
        xbc, dt, z = (t.reshape(batch, -1, t.shape[-1]) for t in (self.conv(xbc), dt, z))
        xs, b, c = jnp.split(xbc, (inner, (inner + xbc.shape[-1]) // 2), axis=-1)
        b, c = (t.reshape(*t.shape[:2], self.groups, -1) for t in (b, c))
        y = self.norm(scan(xs, dt, -a, b, c, d)) * z
        return add_branch(x, self.out_proj(y).reshape(x.shape), branch_scale)


@initializer
def _initial_dt_bias(
    key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """softplus(dt_bias) is log-uniform."""
    log_dt = uniform(math.log(1e-3), math.log(1e-1))(key, shape, dtype)
    # As one program they would have other last bits. NumPy's results of sum and maximum are JAX's,
    # without a program for each.
    xnp: Any = jnp if in_trace() else np
    dt = xnp.maximum(xnp.asarray(jnp.exp(log_dt)), 1e-4)
    inverse = xnp.asarray(jnp.log(-xnp.asarray(jnp.expm1(-dt))))  # of softplus
    return jnp.asarray(dt + inverse, dtype)


@initializer
def _initial_a_log(
    key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
    return jnp.log(uniform(1.0, 16.0)(key, shape, dtype))


@unit
def _steps(dt: jax.Array, bias: jax.Array, a_log: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Step sizes and decay rates."""
    return jax.nn.softplus(dt + bias), jnp.exp(a_log)


class AttentionMixer(nnx.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        implementation: str | None,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.implementation = heads, implementation
        self.qkv = Linear(channels, 3 * channels, use_bias=False, precision=precision, rngs=rngs)
        self.out = Linear(channels, channels, precision=precision, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        norm: NormParams,
        branch_scale: Float[Array, " B"] | None,
    ) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        normed = layer_norm(x, **norm, implementation=self.implementation)
        qkv = self.qkv(normed).reshape(batch, height * width, 3 * channels)
        qkv = tap("qkv", qkv, heads=self.heads)
        y = attention(qkv, heads=self.heads, implementation=self.implementation)
        return add_branch(x, self.out(y).reshape(x.shape), branch_scale)


class MLP(nnx.Module):
    """Linear to four times the width, exact GELU, linear back; a branch as the mixers are."""

    def __init__(
        self, channels: int, *, implementation: str | None, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        self.implementation = implementation
        self.fc1 = Linear(channels, 4 * channels, precision=precision, rngs=rngs)
        self.fc2 = Linear(4 * channels, channels, precision=precision, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        norm: NormParams,
        branch_scale: Float[Array, " B"] | None,
    ) -> Float[Array, "B H W C"]:
        b1, b2 = self.fc1.bias, self.fc2.bias
        assert b1 is not None
        assert b2 is not None
        return mlp(
            x,
            branch_scale,
            MLPParams(
                norm["scale"],
                norm["bias"],
                self.fc1.kernel[...],
                b1[...],
                self.fc2.kernel[...],
                b2[...],
            ),
            epsilon=norm["epsilon"],
            implementation=self.implementation,
        )


# --- Network ------------------------------------------------------------------------------------


class Block(nnx.Module):
    """Local perception, mixer, local perception, MLP; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self,
        config: VSSDConfig,
        stage: int,
        *,
        implementation: str | None,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        channels, heads = config.widths[stage], config.num_heads[stage]
        kind = config.mixers[stage]
        norm_options: dict[str, Any] = {"implementation": implementation, "precision": precision}
        options = {**norm_options, "rngs": rngs}
        self.cpe1 = DepthwiseConv(channels, residual=True, **options)
        self.norm1 = LayerNorm(channels, **norm_options)
        self.mixer = (
            AttentionMixer(channels, heads, **options)
            if kind == "attention"
            else SSDMixer(config, channels, heads, kind=kind, **options)
        )
        self.cpe2 = DepthwiseConv(channels, residual=True, **options)
        self.norm2 = LayerNorm(channels, **norm_options)
        self.mlp = MLP(channels, **options)

    def __call__(
        self, x: Float[Array, "B H W C"], branch_scales: Float[Array, "2 B"] | None = None
    ) -> Float[Array, "B H W C"]:
        mixer_scale, mlp_scale = (None, None) if branch_scales is None else branch_scales
        x = self.mixer(self.cpe1(x), self.norm1.params, mixer_scale)
        return self.mlp(self.cpe2(x), self.norm2.params, mlp_scale)


class Stage(nnx.Module):
    """Blocks at one resolution, and the way down to the next (None in the last stage)."""

    def __init__(
        self,
        config: VSSDConfig,
        stage: int,
        *,
        remat: bool,
        implementation: str | None,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {
            "implementation": implementation, "precision": precision, "rngs": rngs,
        }  # fmt: skip
        depth = config.depths[stage]
        self.blocks = nnx.List([Block(config, stage, **options) for _ in range(depth)])
        self.remat = remat
        self.deterministic = False
        downsample = {"conv": ConvDownsample, "patch": PatchDownsample}[config.downsample]
        self.downsample = downsample(config.widths[stage], **options) if stage < 3 else None

    def __call__(
        self, x: Float[Array, "B H W C"], branch_scales: list[Float[Array, "2 B"] | None]
    ) -> Float[Array, "B H W C"]:
        """Returns the output of the last block; `downsample` is left to the caller."""
        remat = self.remat and not self.deterministic  # evaluation has no backward pass
        call = nnx.remat(Block.__call__) if remat else Block.__call__
        for block, scales in zip(self.blocks, branch_scales, strict=True):
            x = call(block, x, scales)
        return x


class VSSD(nnx.Module):
    """The classifier, or with `num_classes=None` the backbone of a detector or segmentor.

    Args:
      config: the architecture.
      num_classes: size of the classifier; with 0 there is none, and the model gives the pooled
        features. None makes a backbone: no classifier, and a LayerNorm on each feature map.
      dtype: float32 or bfloat16 activations.
      remat: recompute the blocks in the backward pass instead of keeping their activations.
      implementation: of the operations: None (the best for the device), "xla", "pallas", "triton".
      rngs: with a `params` stream for the initialisation.
    """

    strides: tuple[int, ...] = (4, 8, 16, 32)

    def __init__(
        self,
        config: VSSDConfig,
        *,
        num_classes: int | None = 1000,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        check_name(implementation)
        precision = Precision(jnp.dtype(dtype))
        norm_options: dict[str, Any] = {"implementation": implementation, "precision": precision}
        options = {**norm_options, "rngs": rngs}
        self.config, self.num_classes, self.precision = config, num_classes, precision
        self.widths = config.widths
        stem = {"conv": ConvStem, "patch": PatchStem}[config.stem]
        self.stem = stem(config.embed_dim, **options)
        self.drop_path = DropPath(np.linspace(0, config.drop_path, sum(config.depths)).tolist())
        self.stages = nnx.List(
            [Stage(config, stage, remat=remat, **options) for stage in range(len(config.depths))]
        )
        if num_classes is None:
            self.out_norms = nnx.List([LayerNorm(width, **norm_options) for width in self.widths])
        else:
            self.norm = LayerNorm(self.widths[-1], **norm_options)
            if num_classes > 0:
                self.head = Linear(self.widths[-1], num_classes, precision=precision, rngs=rngs)

    def feature_maps(
        self, images: Images, rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "B _ _ _"]]:
        """The outputs of the four stages, normalised if this is a backbone.

        Args:
          images: (B, H, W, 3), normalised with ImageNet's mean and deviation; any H and W.
          rngs: the `dropout` stream, needed in training if there is drop path.

        Returns:
          Four arrays (B, ceil(H/s), ceil(W/s), C * s/4) for s = 4, 8, 16, 32.
        """
        check_images(images)
        scales = self.drop_path(images.shape[0], rngs)
        x = self.stem(images.astype(self.precision.compute))
        maps: list[jax.Array] = []
        first = 0
        for stage in self.stages:
            last = first + len(stage.blocks)
            x = tap("map", stage(x, scales[first:last]))
            first = last
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        if self.num_classes is None:
            maps = [norm(x) for norm, x in zip(self.out_norms, maps, strict=True)]
        return maps

    def __call__(self, images: Images, rngs: nnx.Rngs | None = None) -> Float[Array, "B K"]:
        """(B, H, W, 3) images -> (B, num_classes) logits in float32.

        With 0 classes, the (B, C) mean of the last feature map.
        """
        x = self.norm(self.feature_maps(images, rngs)[-1])
        x = x.astype(self.precision.state).mean((1, 2))
        if self.num_classes == 0:
            return x
        return self.head(x).astype(self.precision.state)


def check_images(images: Any) -> None:
    """Raises a UserError unless these are (B, H, W, 3) images as an array of JAX or NumPy."""
    if not isinstance(images, jax.Array | np.ndarray):
        kind = f"{type(images).__module__}.{type(images).__name__}".removeprefix("builtins.")
        raise UserError(
            f"images must be an array of JAX or NumPy of the shape (B, H, W, 3), not a {kind}; "
            "convert them by numpy.asarray (and a PyTorch tensor from (B, 3, H, W) by transpose)"
        )
    if images.ndim != 4 or images.shape[-1] != 3:
        hint = ""
        if images.ndim == 4 and images.shape[1] == 3:
            hint = "; transpose them from PyTorch's layout by (0, 2, 3, 1)"
        raise UserError(f"images must have the shape (B, H, W, 3), not {images.shape}{hint}")
    if 0 in images.shape:
        raise UserError(f"images must not be empty: their shape is {images.shape}")


# --- The released checkpoints -------------------------------------------------------------------

_SSD = tuple(
    torch_names.Leaf(name, name, torch_names.SAME_LAYOUT) for name in ("dt_bias", "A_log", "D")
)
_CONV_NORMS = {
    "patch_embed.conv1": "stem.conv1",
    "patch_embed.conv2.0": "stem.conv2",
    "patch_embed.conv2.1": "stem.conv3",
    "patch_embed.conv3.0": "stem.conv4",
    "patch_embed.conv3.1": "stem.conv5",
    "layers.{}.downsample.conv.2": "stages.{}.downsample.conv3",
}
_BLOCK = (
    Row("cpe1", "cpe1", torch_names.DEPTHWISE),
    Row("norm1", "norm1", torch_names.NORM),
    Row("attn", "mixer", _SSD),
    Row("attn.in_proj", "mixer.in_proj", torch_names.LINEAR),
    Row("attn.conv2d", "mixer.conv", torch_names.DEPTHWISE),
    Row("attn.norm", "mixer.norm", torch_names.NORM),
    Row("attn.out_proj", "mixer.out_proj", torch_names.LINEAR),
    Row("attn.to_qkv", "mixer.qkv", torch_names.LINEAR),
    Row("attn.to_out", "mixer.out", torch_names.LINEAR),
    Row("cpe2", "cpe2", torch_names.DEPTHWISE),
    Row("norm2", "norm2", torch_names.NORM),
    Row("mlp.fc1", "mlp.fc1", torch_names.LINEAR),
    Row("mlp.fc2", "mlp.fc2", torch_names.LINEAR),
)
TORCH_TABLE = (
    *(Row(f"{a}.conv", f"{b}.conv", torch_names.CONV) for a, b in _CONV_NORMS.items()),
    *(Row(f"{a}.norm", f"{b}.norm", torch_names.BATCH_NORM) for a, b in _CONV_NORMS.items()),
    Row("patch_embed.norm", "stem.norm", torch_names.NORM),
    Row("layers.{}.downsample.conv.0.conv", "stages.{}.downsample.conv1", torch_names.CONV),
    Row("layers.{}.downsample.conv.1.conv", "stages.{}.downsample.conv2", torch_names.DEPTHWISE),
    Row("layers.{}.downsample.norm", "stages.{}.downsample.norm", torch_names.NORM),
    *torch_names.under("layers.{}.blocks.{}.", "stages.{}.blocks.{}.", _BLOCK),
    Row("outnorm{}", "out_norms.{}", torch_names.NORM),
    Row("norm", "norm", torch_names.NORM),
    Row("head", "head", torch_names.LINEAR),
)


def recognise_backbone(
    shapes: TensorShapes, known: Mapping[str, Any] | None, given: Collection[str]
) -> dict[str, Any]:
    """The fields of a `VSSDConfig` that a backbone's tensors show, see `BackboneRecogniser`."""
    conv_stem = "patch_embed.norm.weight" not in shapes
    stages = [shapes.under(f"layers.{stage}.") for stage in range(4)]
    fields: dict[str, Any] = {
        "embed_dim": shapes.size("patch_embed.conv1.conv.weight") * (2 if conv_stem else 1),
        "depths": tuple(stage.count("blocks.") for stage in stages),
        "stem": "conv" if conv_stem else "patch",
        "downsample": "conv" if "downsample.conv.1.conv.weight" in stages[0] else "patch",
    }
    if known is None:
        return fields
    mixers, num_heads = list(known["mixers"]), list(known["num_heads"])
    for i, stage in enumerate(stages):
        mixer = stage.under("blocks.0.attn.")
        if "to_qkv.weight" in mixer:  # no shape shows its heads
            mixers[i] = "attention"
            continue
        mixers[i] = "ncssd" if mixers[i] == "attention" else mixers[i]
        num_heads[i] = mixer.size("A_log")
        inner = mixer.size("norm.weight")
        fields["expand"] = inner // mixer.size("in_proj.weight", 1)
        # Shapes show only the product of groups and d_state.
        states = (mixer.size("conv2d.weight") - inner) // 2
        if states != known["ngroups"] * known["d_state"]:
            field, other = ("d_state", "ngroups") if "ngroups" in given else ("ngroups", "d_state")
            fields[field] = states // known[other]
    return fields | {"mixers": tuple(mixers), "num_heads": tuple(num_heads)}


def _recognise(
    shapes: TensorShapes, known: Mapping[str, Any] | None, given: Collection[str]
) -> Recognised | None:
    if not shapes.any_under("patch_embed.", "layers."):
        return None
    # Without a head they are the weights of a feature extractor.
    headless = not shapes.any_under("head.")
    num_classes = 0 if headless else shapes.size("head.weight")
    return Recognised(num_classes, recognise_backbone(shapes, known, given))


def _layers(config: VSSDConfig) -> list[tuple[str, ...]]:
    """Stem and blocks; a stage's downsampling is of the layer of the block that follows it."""
    layers: list[tuple[str, ...]] = [("stem.",)]
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            names: tuple[str, ...] = (f"stages.{stage}.blocks.{block}.",)
            if block == 0 and stage > 0:
                names = (f"stages.{stage - 1}.downsample.", *names)
            layers.append(names)
    return layers


FAMILY = register(
    Family(
        prefix="vssd_",
        variants={
            "nano": VSSDConfig.nano,
            "micro": VSSDConfig.micro,
            "tiny": VSSDConfig.tiny,
            "small": VSSDConfig.small,
            "base": VSSDConfig.base,
        },
        module=VSSD,
        num_classes=1000,
        classifier=("head.",),
        torch_table=TORCH_TABLE,
        recognise=_recognise,
        recognise_backbone=recognise_backbone,
        variant_fields=("embed_dim", "depths"),
        training_fields=("drop_path",),
        stages=("stem.", "stages.0.", "stages.1.", "stages.2.", "stages.3."),
        layers=_layers,
    )
)
