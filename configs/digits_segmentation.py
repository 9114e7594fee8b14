"""UperNet with VSSD-Nano on scenes of hand-written digits: the whole path on a CPU.

    python train.py --config configs/digits_segmentation.py
"""

from vssd_jax.config import segmentation_config


def get_config(arg=None):
    config = segmentation_config()
    config.model = "upernet_vssd_nano"
    config.dataset = "digits_segmentation"
    config.image_shape = (128, 160)
    config.flip = 0.0
    return config
