from vssd_jax.kernels.mixer.api import nc_ssd_mixer

__all__ = ["nc_ssd_mixer"]
