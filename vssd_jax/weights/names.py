"""The tables that relate PyTorch's tensors to the parameters of the models here.

A row is (PyTorch module, module here, kind); `{}` stands for a number and matches in order.
The kind tells how the tensors of the module are named and laid out on both sides. One table
serves import and export.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """How an array is rearranged on import, and back on export."""

    here: Callable[[np.ndarray], np.ndarray]
    torch: Callable[[np.ndarray], np.ndarray]


def _axes(*axes: int) -> Layout:
    return Layout(lambda w: w.transpose(axes), lambda w: w.transpose(np.argsort(axes)))


SAME = Layout(lambda w: w, lambda w: w)
CONV = _axes(2, 3, 1, 0)  # OIHW -> HWIO
DECONV = _axes(2, 3, 0, 1)  # IOHW -> HWIO
LINEAR = _axes(1, 0)
DEPTHWISE = Layout(  # C1HW -> HWC
    lambda w: w[:, 0].transpose(1, 2, 0), lambda w: w.transpose(2, 0, 1)[:, None]
)
ROI_LINEAR = Layout(  # the inputs are a flattened (C, 7, 7) there and (7, 7, C) here
    lambda w: w.reshape(len(w), -1, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(w)),
    lambda w: w.reshape(7, 7, -1, w.shape[1]).transpose(3, 2, 0, 1).reshape(w.shape[1], -1),
)

# kind -> {PyTorch's leaf: (leaf here, layout)}
KINDS = {
    "conv": {"weight": ("kernel", CONV), "bias": ("bias", SAME)},
    "deconv": {"weight": ("kernel", DECONV), "bias": ("bias", SAME)},
    "depthwise": {"weight": ("kernel", DEPTHWISE), "bias": ("bias", SAME)},
    "linear": {"weight": ("kernel", LINEAR), "bias": ("bias", SAME)},
    "roi_linear": {"weight": ("kernel", ROI_LINEAR), "bias": ("bias", SAME)},
    "norm": {"weight": ("scale", SAME), "bias": ("bias", SAME)},
    "batchnorm": {
        "weight": ("scale", SAME),
        "bias": ("bias", SAME),
        "running_mean": ("mean", SAME),
        "running_var": ("var", SAME),
    },
    "ssd": {name: (name, SAME) for name in ("dt_bias", "A_log", "D")},
}

# A count that PyTorch's BatchNorm keeps; it does not change a model's output.
COUNTER = "num_batches_tracked"

_CONV_NORMS = {
    "patch_embed.conv1": "stem.conv1",
    "patch_embed.conv2.0": "stem.conv2",
    "patch_embed.conv2.1": "stem.conv3",
    "patch_embed.conv3.0": "stem.conv4",
    "patch_embed.conv3.1": "stem.conv5",
    "layers.{}.downsample.conv.2": "stages.{}.downsample.conv3",
}
_BLOCK = ("layers.{}.blocks.{}.", "stages.{}.blocks.{}.")

VSSD = (
    *((f"{a}.conv", f"{b}.conv", "conv") for a, b in _CONV_NORMS.items()),
    *((f"{a}.norm", f"{b}.norm", "batchnorm") for a, b in _CONV_NORMS.items()),
    ("patch_embed.norm", "stem.norm", "norm"),
    ("layers.{}.downsample.conv.0.conv", "stages.{}.downsample.conv1", "conv"),
    ("layers.{}.downsample.conv.1.conv", "stages.{}.downsample.conv2", "depthwise"),
    ("layers.{}.downsample.norm", "stages.{}.downsample.norm", "norm"),
    *(
        (_BLOCK[0] + a, _BLOCK[1] + b, kind)
        for a, b, kind in (
            ("cpe1", "cpe1", "depthwise"),
            ("norm1", "norm1", "norm"),
            ("attn", "mixer", "ssd"),
            ("attn.in_proj", "mixer.in_proj", "linear"),
            ("attn.conv2d", "mixer.conv", "depthwise"),
            ("attn.norm", "mixer.norm", "norm"),
            ("attn.out_proj", "mixer.out_proj", "linear"),
            ("attn.to_qkv", "mixer.qkv", "linear"),
            ("attn.to_out", "mixer.out", "linear"),
            ("cpe2", "cpe2", "depthwise"),
            ("norm2", "norm2", "norm"),
            ("mlp.fc1", "mlp.fc1", "linear"),
            ("mlp.fc2", "mlp.fc2", "linear"),
        )
    ),
    ("outnorm{}", "out_norms.{}", "norm"),
    ("norm", "norm", "norm"),
    ("head", "head", "linear"),
)


_BACKBONE = tuple((f"backbone.{a}", f"backbone.{b}", kind) for a, b, kind in VSSD)

MASK_RCNN = (
    *_BACKBONE,
    ("neck.lateral_convs.{}.conv", "neck.lateral.{}", "conv"),
    ("neck.fpn_convs.{}.conv", "neck.output.{}", "conv"),
    ("rpn_head.rpn_conv", "rpn_head.conv", "conv"),
    ("rpn_head.rpn_cls", "rpn_head.cls", "conv"),
    ("rpn_head.rpn_reg", "rpn_head.reg", "conv"),
    ("roi_head.bbox_head.shared_fcs.0", "box_head.fc1", "roi_linear"),
    ("roi_head.bbox_head.shared_fcs.1", "box_head.fc2", "linear"),
    ("roi_head.bbox_head.fc_cls", "box_head.cls", "linear"),
    ("roi_head.bbox_head.fc_reg", "box_head.reg", "linear"),
    ("roi_head.mask_head.convs.{}.conv", "mask_head.convs.{}", "conv"),
    ("roi_head.mask_head.upsample", "mask_head.upsample", "deconv"),
    ("roi_head.mask_head.conv_logits", "mask_head.logits", "conv"),
)

_CONV_BNS = {
    "decode_head.psp_modules.{}.1": "decode_head.ppm.{}",
    "decode_head.bottleneck": "decode_head.bottleneck",
    "decode_head.lateral_convs.{}": "decode_head.lateral.{}",
    "decode_head.fpn_convs.{}": "decode_head.output.{}",
    "decode_head.fpn_bottleneck": "decode_head.fpn_bottleneck",
    "auxiliary_head.convs.0": "auxiliary_head.conv",
}

UPERNET = (
    *_BACKBONE,
    *((f"{a}.conv", f"{b}.conv", "conv") for a, b in _CONV_BNS.items()),
    *((f"{a}.bn", f"{b}.norm", "batchnorm") for a, b in _CONV_BNS.items()),
    ("decode_head.conv_seg", "decode_head.classifier", "conv"),
    ("auxiliary_head.conv_seg", "auxiliary_head.classifier", "conv"),
)

TABLES = {"vssd_": VSSD, "mask_rcnn_vssd_": MASK_RCNN, "upernet_vssd_": UPERNET}


@functools.cache
def _patterns(table, side: int) -> list[re.Pattern]:
    return [re.compile(re.escape(row[side]).replace(r"\{\}", r"(\d+)")) for row in table]


def _match(table, name: str, side: int) -> tuple[str, Layout] | None:
    """Name on the other side and layout of a tensor; the sides are 0 PyTorch and 1 here."""
    module, _, leaf = name.rpartition(".")
    for row, pattern in zip(table, _patterns(table, side), strict=True):
        if found := pattern.fullmatch(module):
            for leaves in KINDS[row[2]].items():
                torch_leaf, (leaf_here, layout) = leaves
                if leaf == (torch_leaf, leaf_here)[side]:
                    other = row[1 - side].format(*found.groups())
                    return f"{other}.{(leaf_here, torch_leaf)[side]}", layout
    return None


def known(table, name: str, *, here: bool) -> bool:
    """Whether a row of the table matches a name of this or of PyTorch's side."""
    return _match(table, name, int(here)) is not None


def from_torch(
    table, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Renames and rearranges PyTorch's tensors, whose shapes must be right.

    Returns:
      The parameters by the names used here, the tensors that are deliberately ignored, and
      those that no row of the table matches.
    """
    params, ignored, unknown = {}, [], []
    for name, value in tensors.items():
        if name.rpartition(".")[2] == COUNTER:
            ignored.append(name)
        elif (found := _match(table, name, 0)) is None:
            unknown.append(name)
        else:
            params[found[0]] = found[1].here(value)
    return params, ignored, unknown


def to_torch(table, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`; every parameter must be in the table."""
    tensors = {}
    for name, value in params.items():
        other, layout = _match(table, name, 1)
        tensors[other] = layout.torch(value)
    return tensors
