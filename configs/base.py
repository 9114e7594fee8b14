"""VSSD-Base on ImageNet-1K, as in the paper (section 4.1), also with MESA.

    python train.py --config configs/base.py --config.data_dir=/data/imagenet
    python train.py --config configs/base.py:mesa --config.data_dir=/data/imagenet

Expected top-1: 84.7 %, 85.4 % with MESA.
Hours on 8 GPUs: 7.2 on 8 H200 by arithmetic, not measured: 300 epochs of 1,281,167 images at 70 %
of 21,200 images/s, tiny's memory roofline of a training step scaled by multiply-adds; MESA adds a
third from epoch 75 on, a quarter of the whole. The processors keep up: 96 cores
(--config.num_workers=96) at 325 images/s each (benchmarks/input_pipeline.py) prepare as many
images in 3.4 hours.
"""

from vssd_jax.config import imagenet_config


def get_config(arg=None):
    config = imagenet_config()
    config.model = "vssd_base"
    config.batch_size = 2048
    config.learning_rate = 3e-4  # for a batch of 512
    config.min_learning_rate = 3e-6
    if arg == "mesa":
        config.mesa = 2.0
    elif arg:
        raise ValueError(f"unknown argument {arg!r}: mesa or none")
    return config
