"""Fine-tuning on pictures of one's own, from released weights, for each of the three tasks.

    python train.py --config configs/finetune.py --config.data_dir=pictures
    python train.py --config configs/finetune.py:detection,tiny --config.data_dir=boxes
    python train.py --config configs/finetune.py:segmentation,micro --config.data_dir=maps \\
        --config.class_names=background,cat,dog

The argument is `{classification,detection,segmentation},{nano,micro,tiny,small,base}`. It starts
from the authors' ImageNet weights, which the first run downloads; `--config.init_from=weights/mine`
takes others, a detector's or segmentor's too. `nano` is a stand-in for trying a recipe on a CPU:
it starts from nothing, and sees small pictures. docs/your_own_pictures.md has the layouts of
`data_dir`, and what to change for few pictures, rare classes and little memory.

For a batch of 32 on one GPU; `learning_rate` scales with `batch_size`. Layers near the input learn
slower (`layer_decay`), and the run ends when the metric has not improved for ten evaluations.
"""

from vssd_jax.config import classification_config, detection_config, segmentation_config

TASKS = {
    "classification": classification_config,
    "detection": detection_config,
    "segmentation": segmentation_config,
}
WEIGHTS = {
    "micro": "vssd_micro_best.pth",
    "tiny": "vssd_tiny_best_ema.pth",
    "small": "vssd_small_best_ema.pth",
    "base": "vssd_base_best_ema.pth",
}


def get_config(arg="classification,tiny"):
    task, _, variant = arg.partition(",")
    variant = variant or "tiny"
    known = task in TASKS and variant in ("nano", *WEIGHTS)
    if not known or (variant == "base" and task != "classification"):
        raise ValueError(
            f"unknown argument {arg!r}: {{{','.join(TASKS)}}},{{nano,{','.join(WEIGHTS)}}}; "
            "base only for classification"
        )
    config = TASKS[task]()
    if variant != "nano":
        config.init_from = f"hf://YuhengSSS/VSSD/{WEIGHTS[variant]}"
    config.batch_size = 32
    config.eval_batch_size = 32
    config.learning_rate_batch = 32
    config.schedule = "cosine"
    config.min_learning_rate = 1e-6
    config.warmup_epochs = 1.0
    config.weight_decay = 0.05
    config.clip_grad_norm = 1.0
    config.layer_decay = 0.8
    config.ema_decay = 0.0  # a short run is over before an average has settled
    config.patience = 10
    config.log_every_steps = 10
    if task == "classification":
        config.model = f"vssd_{variant}"
        config.dataset = "folder"
        config.epochs = 30
        config.learning_rate = 2e-4
        config.augmentation = {
            "crop_area": (0.3, 1.0),
            "flip_probability": 0.5,
            "randaugment_num_ops": 2,
            "randaugment_magnitude": 7.0,
            "erase_probability": 0.25,
        }
    elif task == "detection":
        config.model = f"mask_rcnn_vssd_{variant}"
        config.batch_size = config.eval_batch_size = config.learning_rate_batch = 4
        config.epochs = 24
        config.learning_rate = 1e-4
    else:
        config.model = f"upernet_vssd_{variant}"
        config.dataset = "label_maps"
        config.batch_size = config.eval_batch_size = config.learning_rate_batch = 8
        config.epochs = 60
        config.learning_rate = 1e-4
    if variant == "nano":
        _shrink(config)
    return config


def _shrink(config):
    """For the nano models, from nothing."""
    config.learning_rate = 2e-3
    config.layer_decay = 1.0
    config.warmup_epochs = 2.0
    config.clip_grad_norm = 5.0
    config.eval_every_epochs = 3
    if config.task == "classification":
        config.image_size = 64
        config.model_options = {"drop_path": 0.1}
    elif config.task == "detection":
        config.model_options = {"box_channels": 128, "roi_samples": 32, "rpn_pre_nms_train": 200}
        config.image_shape = (128, 160)
        config.short_sides, config.long_side = (128,), 160
        config.padded_shapes = ((128, 160), (160, 128))
        config.learning_rate = 1e-3
        config.epochs = 15
    else:
        config.model_options = {"dropout": 0.0, "aux_weight": 1.0}
        config.image_size = 64
        config.image_shape = (64, 64)
        config.short_side, config.long_side = 64, 128
        config.scales = (0.8, 1.25)
