"""UperNet with a VSSD backbone on ADE20K, as in the paper (section 4.3).

    python train.py --config configs/upernet.py:micro --config.data_dir=/data/ADEChallengeData2016
    python train.py --config configs/upernet.py:tiny --config.data_dir=/data/ADEChallengeData2016
    python train.py --config configs/upernet.py:small --config.data_dir=/data/ADEChallengeData2016

"""

from vssd_jax.config import segmentation_config


def get_config(arg="tiny"):
    config = segmentation_config()
    if arg not in ("micro", "tiny", "small"):
        raise ValueError(f"unknown argument {arg!r}: micro, tiny or small")
    config.model = f"upernet_vssd_{arg}"
    config.init_from = f"weights/vssd_{arg}"
    config.dtype = "bfloat16"
    config.num_workers = 12
    config.batch_size = 16
    config.eval_batch_size = 8
    config.steps = 160_000
    config.warmup_steps = 1500
    config.warmup_learning_rate = 1e-6 * config.learning_rate
    config.eval_every_epochs = 12
    return config
