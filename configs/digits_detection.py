"""Mask R-CNN on VSSD-Nano, on scenes of hand-written digits: the whole path on a CPU.

    python train.py --config configs/digits_detection.py
    python eval.py --config configs/digits_detection.py --weights runs/digits_detection \\
        --save-predictions predictions

Expected: box AP50 0.93 and mask AP50 0.91 on the 200 held-out scenes. The 1,500 steps take about
15 minutes of processor time in all, compilation and the making of the scenes included; less on the
clock with two cores.
"""

from vssd_jax.config import detection_config


def get_config(arg=None):
    config = detection_config()
    config.model = "mask_rcnn_vssd_nano"
    config.model_options = {"box_channels": 128, "roi_samples": 32, "rpn_pre_nms_train": 200}
    config.dataset = "digits_detection"
    config.image_shape = (128, 160)
    config.short_sides = (128,)
    config.long_side = 160
    config.padded_shapes = ((128, 160),)
    config.max_objects = 6
    config.flip = 0.0  # a mirrored digit is another shape

    config.batch_size = 8
    config.eval_batch_size = 20
    config.epochs = 6
    config.schedule = "cosine"
    config.learning_rate = 1e-3
    config.min_learning_rate = 1e-5
    config.warmup_steps = 100
    config.clip_grad_norm = 5.0
    config.ema_decay = 0.99
    config.eval_every_epochs = 3
    config.log_every_steps = 25
    if arg:
        raise ValueError(f"unknown argument {arg!r}: this config takes none")
    return config
