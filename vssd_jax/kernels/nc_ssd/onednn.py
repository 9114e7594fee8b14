"""NC-SSD with products by oneDNN."""

import functools

from jax import Array

from vssd_jax.kernels import dispatch, onednn
from vssd_jax.kernels.nc_ssd import xla


def supports(xbc: Array, **_: object) -> str | None:
    return dispatch.wrong_dtype(xbc, *onednn.DTYPES)


nc_ssd = functools.partial(xla.nc_ssd, matmul=onednn.product)
nc_ssd_gated = functools.partial(xla.nc_ssd_gated, matmul=onednn.product)
