from vssd_jax.kernels.nc_ssd.api import nc_ssd, nc_ssd_gated

__all__ = ["nc_ssd", "nc_ssd_gated"]
