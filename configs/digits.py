"""VSSD-Nano on scikit-learn's hand-written digits: the whole path in minutes on a CPU.

    python train.py --config configs/digits.py

Expected: above 97 % top-1 on the 360 test digits.
"""

from vssd_jax.config import classification_config


def get_config(arg=None):
    config = classification_config()
    config.model = "vssd_nano"
    config.model_options = {"drop_path": 0.1}
    config.dataset = "digits"
    config.image_size = 32
    config.eval_crop = 1.0
    config.mixup_alpha = 0.4

    config.batch_size = 64
    config.eval_batch_size = 120
    config.epochs = 25
    config.learning_rate = 2e-3
    config.min_learning_rate = 1e-5
    config.warmup_epochs = 2
    config.ema_decay = 0.97
    config.log_every_steps = 11
    return config
