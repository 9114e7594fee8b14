"""The NC-SSD mixer by oneDNN, for inference: the residual sum is part of the last product."""

from jax import Array

from vssd_jax.kernels import onednn
from vssd_jax.kernels.nc_ssd_mixer.api import MixerParams
from vssd_jax.kernels.nc_ssd_mixer.xla import before_projection

supports = onednn.supports


def nc_ssd_mixer(
    x: Array,
    xbc: Array,
    token_weights: Array,
    z: Array,
    branch_scale: None,
    params: MixerParams,
    *,
    groups: int,
    epsilon: float,
) -> Array:
    """See `vssd_jax.kernels.nc_ssd_mixer.api.nc_ssd_mixer`."""
    y = before_projection(xbc, token_weights, z, params, groups=groups, epsilon=epsilon)
    rows, added = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    kernel = params.out_kernel.astype(x.dtype)
    return onednn.matmul(rows, kernel, None, added).reshape(x.shape)
