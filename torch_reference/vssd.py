"""VSSD (arXiv 2407.18559) in plain PyTorch, with the parameter names of the released checkpoints.

Tokens travel as (B, H, W, C). A convolution sees them through a permuted view, which is
PyTorch's channels_last layout, so that no block copies its activations.

Shape letters: B batch, H W height and width, L tokens, C channels, N state, P head dim.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 128  # tokens of one block of the causal scan


@dataclasses.dataclass(frozen=True)
class VSSDConfig:
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    d_state: int
    drop_path: float = 0.0
    expand: int = 2
    ngroups: int = 1
    mixers: tuple[str, ...] = ("ncssd", "ncssd", "ncssd", "attention")
    stem: str = "conv"
    downsample: str = "conv"
    token_weight_sign: int = 1  # -1: the negative token weights of the ablation
    num_classes: int = 1000


VARIANTS = {
    "vssd_nano": VSSDConfig(16, (1, 2, 1, 1), (1, 2, 4, 8), 16, num_classes=10),
    "vssd_micro": VSSDConfig(48, (2, 2, 8, 4), (2, 4, 8, 16), 48, drop_path=0.1),
    "vssd_tiny": VSSDConfig(64, (2, 4, 8, 4), (2, 4, 8, 16), 64, drop_path=0.2),
    "vssd_small": VSSDConfig(64, (3, 4, 21, 5), (2, 4, 8, 16), 64, drop_path=0.4),
    "vssd_base": VSSDConfig(96, (3, 4, 21, 5), (3, 6, 12, 24), 64, drop_path=0.6),
}


def create_model(name: str, *, backbone: bool = False, **overrides: Any) -> "VSSD":
    """A freshly initialised VSSD in training mode; `overrides` are fields of VSSDConfig."""
    return VSSD(dataclasses.replace(VARIANTS[name], **overrides), backbone=backbone)


def to_nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def to_nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


class ConvNormAct(nn.Module):
    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, stride, padding, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out_dim) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ConvStem(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.conv1 = ConvNormAct(3, half, 3, stride=2)
        self.conv2 = nn.Sequential(
            ConvNormAct(half, half, 3), ConvNormAct(half, half, 3, act=False)
        )
        self.conv3 = nn.Sequential(
            ConvNormAct(half, 4 * dim, 3, stride=2), ConvNormAct(4 * dim, dim, 1, act=False)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        return to_nhwc(self.conv3(x + self.conv2(x)))


class PatchStem(nn.Module):
    """One 4x4 patch a token; rows and columns that fill no patch are dropped."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv1 = ConvNormAct(3, dim, 4, stride=4, padding=0)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(to_nhwc(self.conv1(images)))


class ConvDownsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 8 * dim
        self.conv = nn.Sequential(
            ConvNormAct(dim, hidden, 1, bias=True, norm=False),
            ConvNormAct(hidden, hidden, 3, stride=2, groups=hidden, bias=True, norm=False),
            ConvNormAct(hidden, 2 * dim, 1, bias=True, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return to_nhwc(self.conv(to_nchw(x)))


class SimpleDownsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(ConvNormAct(dim, 2 * dim, 3, stride=2, bias=True, norm=False))
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(to_nhwc(self.conv(to_nchw(x))))


def nc_ssd(x: Tensor, m: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Non-causal SSD: y_i = c_i . sum_j b_j m_j x_j, one state for the whole image.

    x (B, L, heads, P), m (B, L, heads), b and c (B, L, G, N); head i uses group i mod G.
    """
    batch, length, heads, head_dim = x.shape
    groups, per_group = b.shape[2], heads // b.shape[2]
    # The heads of one group side by side: one wide matmul a group, a mere view when G = 1.
    weighted = (x * m[..., None]).view(batch, length, per_group, groups, head_dim)
    weighted = weighted.permute(0, 3, 1, 2, 4).reshape(batch, groups, length, -1)
    b, c = b.transpose(1, 2), c.transpose(1, 2)
    y = c @ (b.transpose(-1, -2) @ weighted)
    y = y.view(batch, groups, length, per_group, head_dim).permute(0, 2, 3, 1, 4)
    return y.reshape(x.shape)


def ssd_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Causal SSD (Mamba-2): s_i = exp(dt_i a) s_{i-1} + dt_i b_i x_i^T and y_i = c_i s_i.

    Quadratic within chunks of tokens, a recurrence between them. x (B, L, heads, P),
    dt (B, L, heads), a (heads,), b and c (B, L, G, N); head i uses group i // (heads / G).
    """
    length, groups = x.shape[1], b.shape[2]
    chunk = min(CHUNK, length)
    tail = -length % chunk

    def chunked(t: Tensor) -> Tensor:
        # (B, L, G or heads, ...) -> (B, G, chunks, chunk, ...), heads by group
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, tail))  # dt = 0: no decay, no input
        return t.unflatten(1, (-1, chunk)).unflatten(3, (groups, -1)).movedim(3, 1)

    x = chunked(x * dt[..., None].to(x.dtype))
    b, c = chunked(b).squeeze(4), chunked(c).squeeze(4)
    log_decay = chunked(dt * a).cumsum(3)  # from a chunk's start up to and with each token

    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    between = log_decay[:, :, :, :, None] - log_decay[:, :, :, None]  # to token, from token, head
    between = between.movedim(5, 3).masked_fill(later, -math.inf).exp().to(x.dtype)
    scores = c @ b.transpose(-1, -2)
    y = ((scores[:, :, :, None] * between) @ x.movedim(4, 3)).movedim(3, 4)

    # The heads of one group side by side, (..., per_group * P), share the matmuls with b and c.
    to_end = (log_decay[:, :, :, -1:] - log_decay).exp().to(x.dtype)
    added = b.transpose(-1, -2) @ (x * to_end[..., None]).flatten(-2)
    kept = log_decay[:, :, :, -1].exp().repeat_interleave(x.shape[-1], -1)[..., None, :]
    state, entering = torch.zeros_like(added[:, :, 0], dtype=kept.dtype), []
    for i in range(added.shape[2]):
        entering.append(state)
        state = kept[:, :, i] * state + added[:, :, i]
    carried = (c @ torch.stack(entering, 2).to(c.dtype)).view_as(x)
    y = y + carried * log_decay.exp()[..., None].to(x.dtype)
    return y.movedim(1, 3).flatten(3, 4).flatten(1, 2)[:, :length]


def bidirectional_ssd_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The first half of the heads (and groups) scans forward, the second half backward."""
    forward, backward = zip(*(t.chunk(2, -1 if t.dim() == 1 else 2) for t in (x, dt, a, b, c)),
                            strict=True)
    flipped = (t if t.dim() == 1 else t.flip(1) for t in backward)
    return torch.cat([ssd_scan(*forward), ssd_scan(*flipped).flip(1)], 2)


class SSDMixer(nn.Module):
    def __init__(self, dim: int, heads: int, config: VSSDConfig, mode: str) -> None:
        super().__init__()
        self.heads, self.mode = heads, mode
        self.groups, self.sign = config.ngroups, config.token_weight_sign
        inner = config.expand * dim
        bc = config.ngroups * config.d_state
        self.split = (inner, inner + 2 * bc, heads)
        self.split_xbc = (inner, bc, bc)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.in_proj = nn.Linear(dim, sum(self.split), bias=False)
        conv_dim = sum(self.split_xbc)
        self.conv2d = nn.Conv2d(conv_dim, conv_dim, 3, padding=1, groups=conv_dim)
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        z, xbc, dt = self.in_proj(tokens).split(self.split, -1)
        xbc = to_nhwc(F.silu(self.conv2d(to_nchw(xbc)))).flatten(1, 2)
        x, b, c = xbc.split(self.split_xbc, -1)
        x = x.unflatten(-1, (self.heads, -1))
        b, c = (t.unflatten(-1, (self.groups, -1)) for t in (b, c))
        dt = F.softplus(dt.flatten(1, 2) + self.dt_bias)
        a = -self.A_log.exp()
        if self.mode == "ncssd":
            y = nc_ssd(x, (-self.sign * a * dt).to(x.dtype), b, c)
        elif self.mode == "ssd":
            y = ssd_scan(x, dt, a, b, c)
        else:
            y = bidirectional_ssd_scan(x, dt, a, b, c)
        y = y + x * self.D[:, None].to(x.dtype)
        y = self.norm(y.flatten(2)).view(z.shape)
        return self.out_proj(y * z)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x).flatten(1, 2).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).reshape(x.shape))


class DropPath(nn.Module):
    """Stochastic depth: leaves out a residual branch, image by image."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty((len(x),) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep.div_(1 - self.rate)


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(
        self, dim: int, heads: int, mixer: str, drop_path: float, config: VSSDConfig
    ) -> None:
        super().__init__()
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = (
            Attention(dim, heads) if mixer == "attention" else SSDMixer(dim, heads, config, mixer)
        )
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + to_nhwc(self.cpe1(to_nchw(x)))
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + to_nhwc(self.cpe2(to_nchw(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    def __init__(
        self,
        dim: int,
        heads: int,
        mixer: str,
        drop_paths: Sequence[float],
        downsample: Callable[[int], nn.Module] | None,
        config: VSSDConfig,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, mixer, rate, config) for rate in drop_paths)
        if downsample is not None:
            self.downsample = downsample(dim)


class VSSD(nn.Module):
    """Images (B, 3, H, W) to logits (B, num_classes), or, as a backbone, to four maps (B, C, h, w)
    at strides 4, 8, 16 and 32, each after its own LayerNorm."""

    def __init__(self, config: VSSDConfig, backbone: bool = False) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        stem = {"conv": ConvStem, "patch": PatchStem}[config.stem]
        downsample = {"conv": ConvDownsample, "patch": SimpleDownsample}[config.downsample]
        dims = [config.embed_dim * 2**i for i in range(4)]
        rates = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        self.patch_embed = stem(config.embed_dim)
        self.layers = nn.ModuleList()
        for i, dim in enumerate(dims):
            start = sum(config.depths[:i])
            stage_rates = rates[start : start + config.depths[i]]
            self.layers.append(
                Stage(dim, config.num_heads[i], config.mixers[i], stage_rates,
                      downsample if i < 3 else None, config)
            )
        if backbone:
            for i, dim in enumerate(dims):
                self.add_module(f"outnorm{i}", nn.LayerNorm(dim))
        else:
            self.norm = nn.LayerNorm(dims[-1])
            self.head = nn.Linear(dims[-1], config.num_classes)
        init_weights(self)

    def stages(self, images: Tensor) -> list[Tensor]:
        """The stem's output and the four stages' (before their downsampling), each (B, H, W, C)."""
        x = self.patch_embed(images)
        outputs = [x]
        for i, layer in enumerate(self.layers):
            for block in layer.blocks:
                x = block(x)
            outputs.append(x)
            if i < 3:
                x = layer.downsample(x)
        return outputs

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        _, *outputs = self.stages(images)
        if self.backbone:
            return [to_nchw(getattr(self, f"outnorm{i}")(x)) for i, x in enumerate(outputs)]
        return self.head(self.norm(outputs[-1]).mean((1, 2)))


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Linear layers and the SSD parameters; convolutions keep PyTorch's U(+-1/sqrt(fan_in))."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, SSDMixer):
            log_dt = torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(1e-1))
            dt = log_dt.exp().clamp(min=1e-4)
            module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            module.A_log.uniform_(1, 16).log_()
            nn.init.ones_(module.D)
