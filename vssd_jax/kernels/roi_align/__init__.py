from vssd_jax.kernels.roi_align.api import OPERATION, roi_align

__all__ = ["OPERATION", "roi_align"]
