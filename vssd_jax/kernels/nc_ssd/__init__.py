from vssd_jax.kernels.nc_ssd.api import nc_ssd

__all__ = ["nc_ssd"]
