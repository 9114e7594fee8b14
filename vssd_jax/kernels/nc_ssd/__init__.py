from vssd_jax.kernels.nc_ssd.api import (
    GATED_OPERATION,
    OPERATION,
    applies_silu_on_load,
    nc_ssd,
    nc_ssd_gated,
)
from vssd_jax.kernels.nc_ssd.token_weights import token_weights

__all__ = [
    "GATED_OPERATION",
    "OPERATION",
    "applies_silu_on_load",
    "nc_ssd",
    "nc_ssd_gated",
    "token_weights",
]
