"""The operations that decide the speed of VSSD, a folder each.

A folder has `api.py`, the public function and the table of its implementations; `xla.py`, the one
in plain JAX that is the reference of the others; and a file for each of these. See `dispatch`.
"""

# All of them, so that `dispatch` knows every implementation's name.
from vssd_jax.kernels import (
    add_branch,
    attention,
    batch_norm,
    conv,
    depthwise_conv,
    expand_depthwise,
    gelu,
    layer_norm,
    linear,
    mlp,
    nc_ssd,
    nc_ssd_mixer,
    norm_linear,
    relu,
    roi_align,
    silu,
)

__all__ = [
    "add_branch",
    "attention",
    "batch_norm",
    "conv",
    "depthwise_conv",
    "expand_depthwise",
    "gelu",
    "layer_norm",
    "linear",
    "mlp",
    "nc_ssd",
    "nc_ssd_mixer",
    "norm_linear",
    "relu",
    "roi_align",
    "silu",
]
