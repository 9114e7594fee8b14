"""UperNet with VSSD-Nano on scenes of hand-written digits: the whole path on a CPU.

    python train.py --config configs/digits_segmentation.py
    python eval.py --config configs/digits_segmentation.py --weights runs/digits_segmentation \\
        --tta --save-predictions predictions

The scenes are written into `data_dir` by the first run, in ADE20K's layout.

Expected: not measured yet; the aim is mIoU 0.80 within 20 minutes on 2 cores. The labels
themselves, averaged to the logits' stride of 4 and back, reach 0.92. The digits are told from the
background within a hundred steps, and from each other only after some hundred more.
"""

from vssd_jax.config import segmentation_config


def get_config(arg=None):
    config = segmentation_config()
    config.model = "upernet_vssd_nano"
    config.model_options = {"dropout": 0.0}
    config.dataset = "digits_segmentation"
    config.image_shape = (96, 128)
    config.image_size = 96
    config.short_side = 96
    config.long_side = 128
    config.scales = (0.9, 1.1)
    config.max_class_share = 1.0
    config.flip = 0.0  # a mirrored digit is another shape

    config.batch_size = 16
    config.eval_batch_size = 20
    config.epochs = 20
    config.schedule = "cosine"
    config.learning_rate = 2e-3
    config.min_learning_rate = 1e-5
    config.warmup_epochs = 1
    # Forgets the first steps' large gradients, of digits against background, before the small
    # ones that tell the digits apart; whether that helps is not measured.
    config.betas = (0.9, 0.99)
    config.weight_decay = 0.05
    config.no_decay = "vectors"
    config.clip_grad_norm = 1.0
    config.ema_decay = 0.98
    config.eval_every_epochs = 5
    config.log_every_steps = 20
    if arg:
        raise ValueError(f"unknown argument {arg!r}: this config takes none")
    return config
