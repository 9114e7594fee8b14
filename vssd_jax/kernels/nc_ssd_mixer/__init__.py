from vssd_jax.kernels.nc_ssd_mixer.api import OPERATION, MixerParams, nc_ssd_mixer

__all__ = ["OPERATION", "MixerParams", "nc_ssd_mixer"]
