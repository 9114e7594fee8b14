"""The tables that relate PyTorch's tensors to the parameters of the models here.

A row is (PyTorch module, module here, kind); `{}` stands for a number and matches in order.
The kind tells how the tensors of the module are named and laid out on both sides. One table
serves import and export.
"""

import re
from collections.abc import Mapping

import numpy as np

# kind -> {PyTorch's leaf: (leaf here, axes of the PyTorch tensor in the order used here)}
KINDS = {
    "conv": {"weight": ("kernel", (2, 3, 1, 0)), "bias": ("bias", None)},  # OIHW -> HWIO
    "depthwise": {"weight": ("kernel", (2, 3, 0)), "bias": ("bias", None)},  # C1HW -> HWC
    "linear": {"weight": ("kernel", (1, 0)), "bias": ("bias", None)},
    "norm": {"weight": ("scale", None), "bias": ("bias", None)},
    "batchnorm": {
        "weight": ("scale", None),
        "bias": ("bias", None),
        "running_mean": ("mean", None),
        "running_var": ("var", None),
    },
    "ssd": {name: (name, None) for name in ("dt_bias", "A_log", "D")},
}

# Tensors that have no counterpart here and do not change a model's output.
IGNORED = re.compile(r"(.*\.)?num_batches_tracked$")

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


def _match(table, name: str, source: int, target: int):
    """(name on the other side, axes) of a tensor, or None; sides are 0 PyTorch and 1 here."""
    module, _, leaf = name.rpartition(".")
    for row in table:
        pattern = re.escape(row[source]).replace(r"\{\}", r"(\d+)")
        if (found := re.fullmatch(pattern, module)) is None:
            continue
        for torch_leaf, (leaf_here, axes) in KINDS[row[2]].items():
            if leaf == (torch_leaf, leaf_here)[source]:
                other = row[target].format(*found.groups())
                return f"{other}.{(torch_leaf, leaf_here)[target]}", axes
    return None


def from_torch(
    table, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Renames and transposes PyTorch's tensors.

    Returns:
      The parameters by the names used here, the tensors that are deliberately ignored, and
      those that no row of the table matches.
    """
    params, ignored, unknown = {}, [], []
    for name, value in tensors.items():
        if IGNORED.fullmatch(name):
            ignored.append(name)
        elif (found := _match(table, name, 0, 1)) is None:
            unknown.append(name)
        else:
            other, axes = found
            if axes == (2, 3, 0) and value.ndim == 4 and value.shape[1] == 1:
                value = value[:, 0].transpose(1, 2, 0)
            elif axes is not None and value.ndim == len(axes):
                value = value.transpose(axes)
            params[other] = value
    return params, ignored, unknown


def to_torch(table, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`; every parameter must be in the table."""
    tensors = {}
    for name, value in params.items():
        other, axes = _match(table, name, 1, 0)
        if axes == (2, 3, 0):
            value = value.transpose(2, 0, 1)[:, None]
        elif axes is not None:
            value = value.transpose(np.argsort(axes))
        tensors[other] = value
    return tensors
