"""VSSD-Micro on ImageNet-1K, as in the paper (section 4.1).

    python train.py --config configs/micro.py --config.data_dir=/data/imagenet

Expected top-1: 82.5 %.
Hours on 8 GPUs: 1.0 on 8 H200 by arithmetic, not measured: 300 epochs of 1,281,167 images at 70 %
of 148,700 images/s, tiny's memory roofline of a training step scaled by multiply-adds. The
processors take longer: 3.4 hours with 96 cores (--config.num_workers=96) at 325 images/s each
(benchmarks/input_pipeline.py); see `config.cache_decoded`.
"""

from vssd_jax.config import imagenet_config


def get_config(arg=None):
    config = imagenet_config()
    config.model = "vssd_micro"
    config.batch_size = 1024
    config.learning_rate = 5e-4  # for a batch of 512
    config.min_learning_rate = 5e-6
    if arg:
        raise ValueError(f"unknown argument {arg!r}: this config takes none")
    return config
