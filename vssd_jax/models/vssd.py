"""VSSD: Vision Mamba with Non-Causal State Space Duality (arXiv 2407.18559).

The file reads as the paper does: configuration, stem, mixers, block, stage, network.
Arrays are channels-last. Shape letters: B batch, H and W height and width, L = H * W tokens,
C channels, N state size, P head dimension.

Parameters and statistics are float32 whatever the compute `dtype`; so are norms, softmax,
token weights and states. (With `dtype=float64` everything is float64: the parity tests.)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vssd_jax.kernels.add_branch import add_branch
from vssd_jax.kernels.attention import attention
from vssd_jax.kernels.batch_norm import batch_norm
from vssd_jax.kernels.depthwise_conv import depthwise_conv
from vssd_jax.kernels.dispatch import check_name
from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.linear import linear
from vssd_jax.kernels.mlp import MLPParams, mlp
from vssd_jax.kernels.nc_ssd_mixer import MixerParams, nc_ssd_mixer
from vssd_jax.kernels.norm_linear import norm_linear
from vssd_jax.kernels.relu import relu
from vssd_jax.models.ssd import bidirectional_ssd, causal_ssd

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

    def __post_init__(self):
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
            # The bidirectional scan halves heads and groups between its two directions.
            parts = {"attention": 1, "bissd": max(2, self.ngroups)}.get(mixer, self.ngroups)
            if inner % heads or heads % parts or (mixer == "bissd" and self.ngroups % 2):
                raise ValueError(
                    f"stage {stage}: {heads} heads and {self.ngroups} groups do not divide "
                    f"a {mixer} mixer of width {inner}"
                )

    @classmethod
    def nano(cls):
        """A stand-in for tests and small pictures; not in the paper."""
        return cls(
            embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), d_state=16, drop_path=0.0
        )

    @classmethod
    def micro(cls):
        return cls(embed_dim=48, depths=(2, 2, 8, 4), d_state=48, drop_path=0.1)

    @classmethod
    def tiny(cls):
        return cls(embed_dim=64, depths=(2, 4, 8, 4), drop_path=0.2)

    @classmethod
    def small(cls):
        return cls(embed_dim=64, depths=(3, 4, 21, 5), drop_path=0.4)

    @classmethod
    def base(cls):
        return cls(embed_dim=96, depths=(3, 4, 21, 5), num_heads=(3, 6, 12, 24), drop_path=0.6)


# --- Layers -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Precision:
    """`compute` is the dtype of activations, `state` that of parameters and statistics."""

    compute: jax.typing.DTypeLike = jnp.float32

    @property
    def state(self) -> jnp.dtype:
        return jnp.promote_types(self.compute, jnp.float32)


# XLA takes minutes to compile the random numbers of a large model, one program for each shape.
# Outside of a transformation NumPy draws them instead; under `jax.jit` and `jax.eval_shape`,
# where a key has no value, JAX does (with other values for the same seed).
def _generator(key) -> np.random.Generator | None:
    if isinstance(key, jax.core.Tracer):
        return None
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def uniform(low: float, high: float):
    """An initialiser, U(low, high)."""

    def init(key, shape, dtype):
        if (generator := _generator(key)) is None:
            return jax.random.uniform(key, shape, dtype, low, high)
        return jnp.asarray(generator.uniform(low, high, shape), dtype)

    return init


def normal(std: float):
    """An initialiser, N(0, std^2)."""

    def init(key, shape, dtype):
        if (generator := _generator(key)) is None:
            return std * jax.random.normal(key, shape, dtype)
        return jnp.asarray(generator.normal(0, std, shape), dtype)

    return init


def torch_uniform(fan_in: int):
    """U(+-1/sqrt(fan_in)): PyTorch's default for the weights and biases of convolutions."""
    return uniform(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


class Linear(nnx.Module):
    """(..., inputs) -> (..., outputs); weights of standard deviation 0.02, zero biases."""

    def __init__(self, inputs: int, outputs: int, *, use_bias: bool = True, precision, rngs):
        # The recipe truncates at +-2, a hundred standard deviations: plain normal.
        kernel = normal(0.02)(rngs.params(), (inputs, outputs), precision.state)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((outputs,), precision.state)) if use_bias else None
        if use_bias:
            rngs.params()  # as `nnx.Linear`: what a seed gives stays the same
        self.precision = precision

    def __call__(self, x):
        bias = None if self.bias is None else self.bias[...]
        return linear(x.astype(self.precision.compute), self.kernel[...], bias)


class LayerNorm(nnx.Module):
    """Layer normalisation over the channels: (..., C) -> (..., C)."""

    def __init__(self, channels, *, implementation=None, precision):
        self.scale = nnx.Param(jnp.ones((channels,), precision.state))
        self.bias = nnx.Param(jnp.zeros((channels,), precision.state))
        self.epsilon, self.implementation = 1e-5, implementation

    def __call__(self, x):
        return layer_norm(
            x,
            self.scale[...],
            self.bias[...],
            epsilon=self.epsilon,
            implementation=self.implementation,
        )


class Conv(nnx.Module):
    """k x k convolution with PyTorch's padding and initialisation.

    (B, H, W, inputs) -> (B, H', W', outputs); the kernel is (k, k, inputs, outputs).
    """

    def __init__(
        self, inputs, outputs, size, *, stride=1, padding=None, use_bias=True, precision, rngs
    ):
        init = torch_uniform(size * size * inputs)
        shape = (size, size, inputs, outputs)
        self.kernel = nnx.Param(init(rngs.params(), shape, precision.state))
        bias = init(rngs.params(), (outputs,), precision.state) if use_bias else None
        self.bias = None if bias is None else nnx.Param(bias)
        self.stride = stride
        self.padding = size // 2 if padding is None else padding
        self.precision = precision

    def __call__(self, x, scale=None, shift=None):
        """With `scale` and `shift` (outputs,): a norm's, that follows and becomes part of it."""
        dtype = self.precision.compute
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        if scale is not None:
            kernel = kernel * scale
            bias = shift if bias is None else bias * scale + shift
        x = x.astype(dtype)
        if kernel.shape[:2] == (1, 1) and self.stride == 1:
            if scale is None:
                return linear(x, kernel[0, 0], bias)
            y = linear(x, kernel[0, 0])  # XLA does not make one kernel of product and shift
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel.astype(dtype),
                (self.stride, self.stride),
                [(self.padding, self.padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        if bias is not None:  # wide: a rounded shift would move all pixels alike, which adds up
            y = (y.astype(bias.dtype) + bias).astype(dtype)
        return y


class BatchNorm(nnx.Module):
    """Batch normalisation with PyTorch's statistics, over B, H and W of the global batch.

    PyTorch normalises with the biased variance of the batch but keeps a running average of the
    unbiased one; Flax's own module keeps the biased one.
    """

    def __init__(self, channels, *, precision):
        self.scale = nnx.Param(jnp.ones((channels,), precision.state))
        self.bias = nnx.Param(jnp.zeros((channels,), precision.state))
        self.mean = nnx.BatchStat(jnp.zeros((channels,), precision.state))
        self.var = nnx.BatchStat(jnp.ones((channels,), precision.state))
        self.use_running_average = False
        self.momentum = 0.1
        self.epsilon = 1e-5
        self.precision = precision

    def running(self):
        """Scale and shift (C,) of the normalisation with the running average."""
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
        return scale, self.bias[...] - self.mean[...] * scale

    def __call__(self, x):
        dtype, scale, bias = self.precision.compute, self.scale[...], self.bias[...]
        if self.use_running_average:
            scale = scale * jax.lax.rsqrt(self.var[...] + self.epsilon)
            return ((x.astype(scale.dtype) - self.mean[...]) * scale + bias).astype(dtype)
        y, mean, var = batch_norm(x, scale, bias, self.epsilon, dtype)
        count = x.size // x.shape[-1]
        unbiased = jax.lax.stop_gradient(var) * (count / max(count - 1, 1))
        self.mean[...] += self.momentum * (jax.lax.stop_gradient(mean) - self.mean[...])
        self.var[...] += self.momentum * (unbiased - self.var[...])
        return y


class ConvNorm(nnx.Module):
    """A convolution and its batch normalisation."""

    def __init__(self, inputs, outputs, size, *, precision, rngs, **conv):
        self.conv = Conv(inputs, outputs, size, precision=precision, rngs=rngs, **conv)
        self.norm = BatchNorm(outputs, precision=precision)

    def __call__(self, x):
        if self.norm.use_running_average:
            return self.conv(x, *self.norm.running())  # no pass over the activations
        return self.norm(self.conv(x))


class DepthwiseConv(nnx.Module):
    """3x3 depthwise convolution with bias: (B, H, W, C) -> (B, ceil(H/s), ceil(W/s), C).

    The options are those of `vssd_jax.kernels.depthwise_conv.depthwise_conv`.
    """

    def __init__(
        self,
        channels,
        *,
        stride=1,
        activation=None,
        residual=False,
        relu_input=False,
        implementation=None,
        precision,
        rngs,
    ):
        init = torch_uniform(9)
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, channels), precision.state))
        self.bias = nnx.Param(init(rngs.params(), (channels,), precision.state))
        self.stride, self.activation, self.residual = stride, activation, residual
        self.relu_input, self.implementation = relu_input, implementation

    def __call__(self, x):
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


class DropPath(nnx.Module):
    """Stochastic depth: in training, drops the branch of a whole sample with probability `rate`.

    Gives the scale of the branch (B,), or None for ones.
    """

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = False

    def __call__(self, batch: int, rngs: nnx.Rngs | None):
        if self.deterministic or self.rate == 0:
            return None
        if rngs is None:
            raise ValueError("a model with drop path needs rngs=nnx.Rngs(dropout=...) in training")
        keep = 1 - self.rate
        return jax.random.bernoulli(rngs.dropout(), keep, (batch,)) / keep


# --- Stem and downsampling --------------------------------------------------------------------


class ConvStem(nnx.Module):
    """Overlapping stem: (B, H, W, 3) -> (B, ceil(H/4), ceil(W/4), E)."""

    def __init__(self, embed_dim, *, implementation, precision, rngs):
        del implementation  # it has one only

        def conv(inputs, outputs, size, stride=1):
            return ConvNorm(
                inputs, outputs, size, stride=stride, use_bias=False, precision=precision, rngs=rngs
            )

        half = embed_dim // 2
        self.conv1 = conv(3, half, 3, stride=2)
        self.conv2 = conv(half, half, 3)
        self.conv3 = conv(half, half, 3)
        self.conv4 = conv(half, 4 * embed_dim, 3, stride=2)
        self.conv5 = conv(4 * embed_dim, embed_dim, 1)

    def __call__(self, images):
        x = relu(self.conv1(images))
        x = x + self.conv3(relu(self.conv2(x)))
        return self.conv5(relu(self.conv4(x)))


class PatchStem(nnx.Module):
    """The ablation's stem, 4x4 patches: (B, H, W, 3) -> (B, H // 4, W // 4, E)."""

    def __init__(self, embed_dim, *, implementation, precision, rngs):
        self.conv1 = ConvNorm(
            3, embed_dim, 4, stride=4, padding=0, use_bias=False, precision=precision, rngs=rngs
        )
        self.norm = LayerNorm(embed_dim, implementation=implementation, precision=precision)

    def __call__(self, images):
        return self.norm(relu(self.conv1(images)))


class ConvDownsample(nnx.Module):
    """Inverted bottleneck: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(self, channels, *, implementation, precision, rngs):
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

    def __call__(self, x):
        return self.conv3(self.conv2(self.conv1(x)))


class PatchDownsample(nnx.Module):
    """The ablation's downsampling: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(self, channels, *, implementation, precision, rngs):
        self.conv1 = Conv(channels, 2 * channels, 3, stride=2, precision=precision, rngs=rngs)
        self.norm = LayerNorm(2 * channels, implementation=implementation, precision=precision)

    def __call__(self, x):
        return self.norm(relu(self.conv1(x)))


# --- Mixers -----------------------------------------------------------------------------------


class SSDMixer(nnx.Module):
    """The NC-SSD mixer (section 3.2, figure 3), or one of the scans it is compared with.

    `x + branch_scale * mixer(norm(x))`, (B, H, W, C). `kind` is "ncssd", "ssd" or "bissd".
    """

    def __init__(
        self, config: VSSDConfig, channels, heads, *, kind, implementation, precision, rngs
    ):
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
        log_dt = uniform(math.log(1e-3), math.log(1e-1))
        dt = jnp.maximum(jnp.exp(log_dt(rngs.params(), (heads,), precision.state)), 1e-4)
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))  # inverse of softplus
        a = uniform(1.0, 16.0)(rngs.params(), (heads,), precision.state)
        self.A_log = nnx.Param(jnp.log(a))
        self.D = nnx.Param(jnp.ones((heads,), precision.state))
        self.norm = LayerNorm(inner, implementation=implementation, precision=precision)
        self.out_proj = Linear(inner, channels, use_bias=False, precision=precision, rngs=rngs)

    def __call__(self, x, norm, branch_scale):
        # dt is wide because softplus is.
        z, xbc, dt = norm_linear(
            x,
            norm.scale[...],
            norm.bias[...],
            self.in_proj.kernel[...],
            widths=self.sizes,
            dtypes=(x.dtype, x.dtype, self.precision.state),
            epsilon=norm.epsilon,
            implementation=self.implementation,
        )
        dt = jax.nn.softplus(dt + self.dt_bias[...])
        a, d = jnp.exp(self.A_log[...]), self.D[...]
        if self.kind == "ncssd":
            return nc_ssd_mixer(
                x,
                xbc,
                self.sign * dt * a,
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
        batch, inner = len(x), self.sizes[0]
        xbc, dt, z = (t.reshape(batch, -1, t.shape[-1]) for t in (self.conv(xbc), dt, z))
        xs, b, c = jnp.split(xbc, (inner, (inner + xbc.shape[-1]) // 2), axis=-1)
        b, c = (t.reshape(*t.shape[:2], self.groups, -1) for t in (b, c))
        y = self.norm(scan(xs, dt, -a, b, c, d)) * z
        return add_branch(x, self.out_proj(y).reshape(x.shape), branch_scale)


class AttentionMixer(nnx.Module):
    """Multi-head self-attention over all tokens.

    `x + branch_scale * mixer(norm(x))`, (B, H, W, C).
    """

    def __init__(self, channels, heads, *, implementation, precision, rngs):
        self.heads = heads
        self.implementation = implementation
        self.qkv = Linear(channels, 3 * channels, use_bias=False, precision=precision, rngs=rngs)
        self.out = Linear(channels, channels, precision=precision, rngs=rngs)

    def __call__(self, x, norm, branch_scale):
        batch, height, width, channels = x.shape
        qkv = self.qkv(norm(x)).reshape(batch, height * width, 3 * channels)
        y = attention(qkv, heads=self.heads, implementation=self.implementation)
        return add_branch(x, self.out(y).reshape(x.shape), branch_scale)


class MLP(nnx.Module):
    """Linear to four times the width, exact GELU, linear back.

    `x + branch_scale * mlp(norm(x))`, (B, H, W, C).
    """

    def __init__(self, channels, *, implementation, precision, rngs):
        self.implementation = implementation
        self.fc1 = Linear(channels, 4 * channels, precision=precision, rngs=rngs)
        self.fc2 = Linear(4 * channels, channels, precision=precision, rngs=rngs)

    def __call__(self, x, norm, branch_scale):
        return mlp(
            x,
            branch_scale,
            MLPParams(
                norm.scale[...],
                norm.bias[...],
                self.fc1.kernel[...],
                self.fc1.bias[...],
                self.fc2.kernel[...],
                self.fc2.bias[...],
            ),
            epsilon=norm.epsilon,
            implementation=self.implementation,
        )


# --- Network ----------------------------------------------------------------------------------


class Block(nnx.Module):
    """Local perception, mixer, local perception, MLP; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self, config: VSSDConfig, stage: int, drop_path: float, *, implementation, precision, rngs
    ):
        channels, heads = config.embed_dim * 2**stage, config.num_heads[stage]
        kind = config.mixers[stage]
        norm_options = {"implementation": implementation, "precision": precision}
        options = norm_options | {"rngs": rngs}
        self.cpe1 = DepthwiseConv(channels, residual=True, **options)
        self.norm1 = LayerNorm(channels, **norm_options)
        if kind == "attention":
            self.mixer = AttentionMixer(channels, heads, **options)
        else:
            self.mixer = SSDMixer(config, channels, heads, kind=kind, **options)
        self.cpe2 = DepthwiseConv(channels, residual=True, **options)
        self.norm2 = LayerNorm(channels, **norm_options)
        self.mlp = MLP(channels, **options)
        self.drop_path = DropPath(drop_path)

    def __call__(self, x, rngs=None):
        x = self.cpe1(x)
        x = self.mixer(x, self.norm1, self.drop_path(len(x), rngs))
        x = self.cpe2(x)
        return self.mlp(x, self.norm2, self.drop_path(len(x), rngs))


class Stage(nnx.Module):
    """Blocks at one resolution, and the way down to the next (None in the last stage)."""

    def __init__(self, config, stage, drop_paths, *, remat, implementation, precision, rngs):
        options = {"implementation": implementation, "precision": precision, "rngs": rngs}
        self.blocks = nnx.List([Block(config, stage, rate, **options) for rate in drop_paths])
        self.remat = remat
        self.deterministic = False
        make = {"conv": ConvDownsample, "patch": PatchDownsample}[config.downsample]
        channels = config.embed_dim * 2**stage
        self.downsample = make(channels, **options) if stage < 3 else None

    def __call__(self, x, rngs=None):
        """Returns the output of the last block; `downsample` is left to the caller."""
        remat = self.remat and not self.deterministic  # evaluation has no backward pass
        for block in self.blocks:
            x = nnx.remat(Block.__call__)(block, x, rngs) if remat else block(x, rngs)
        return x


class VSSD(nnx.Module):
    """The classifier, or with `num_classes=None` the backbone of a detector or segmentor.

    Args:
      config: the architecture.
      num_classes: size of the classifier. None makes a backbone: no classifier, and a
        LayerNorm on each feature map.
      dtype: float32 or bfloat16 activations.
      remat: recompute the blocks in the backward pass instead of keeping their activations.
      implementation: of the kernels: None (the best for the device), "xla", "pallas", "triton".
      rngs: with a `params` stream for the initialisation.
    """

    def __init__(
        self,
        config: VSSDConfig,
        *,
        num_classes: int | None = 1000,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_name(implementation)
        precision = Precision(jnp.dtype(dtype))
        options = {"precision": precision, "rngs": rngs}
        self.config, self.num_classes, self.precision = config, num_classes, precision
        stem = {"conv": ConvStem, "patch": PatchStem}[config.stem]
        self.stem = stem(config.embed_dim, implementation=implementation, **options)
        rates = np.linspace(0, config.drop_path, sum(config.depths)).tolist()
        self.stages = nnx.List()
        for stage, depth in enumerate(config.depths):
            first = sum(config.depths[:stage])
            stage_rates = rates[first : first + depth]
            self.stages.append(
                Stage(
                    config,
                    stage,
                    stage_rates,
                    remat=remat,
                    implementation=implementation,
                    **options,
                )
            )
        widths = [config.embed_dim * 2**stage for stage in range(4)]
        norm_options = {"implementation": implementation, "precision": precision}
        if num_classes is None:
            self.out_norms = nnx.List([LayerNorm(width, **norm_options) for width in widths])
        else:
            self.norm = LayerNorm(widths[-1], **norm_options)
            self.head = Linear(widths[-1], num_classes, **options)

    def feature_maps(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> list[jax.Array]:
        """The outputs of the four stages, normalised if this is a backbone.

        Args:
          images: (B, H, W, 3), normalised with ImageNet's mean and deviation; any H and W.
          rngs: the `dropout` stream, needed in training if there is drop path.

        Returns:
          Four arrays (B, ceil(H/s), ceil(W/s), C * s/4) for s = 4, 8, 16, 32.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must have the shape (B, H, W, 3), not {images.shape}")
        x = self.stem(images.astype(self.precision.compute))
        maps = []
        for stage in self.stages:
            x = stage(x, rngs)
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        if self.num_classes is None:
            maps = [norm(x) for norm, x in zip(self.out_norms, maps, strict=True)]
        return maps

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(B, H, W, 3) images -> (B, num_classes) logits in float32."""
        x = self.norm(self.feature_maps(images, rngs)[-1])
        x = x.astype(self.precision.state).mean((1, 2))
        return self.head(x).astype(self.precision.state)
