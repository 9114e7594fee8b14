"""Mask R-CNN on VSSD-Micro, -Tiny or -Small, on COCO 2017, as in the paper (section 4.2).

    python convert_torch_weights.py --input hf://YuhengSSS/VSSD/vssd_tiny_best_ema.pth \\
        --output weights/vssd_tiny
    python train.py --config configs/mask_rcnn.py:tiny,1x --workdir runs/mask_rcnn_tiny_1x \\
        --config.data_dir=/data/coco
    python eval.py --config configs/mask_rcnn.py:tiny,1x --weights runs/mask_rcnn_tiny_1x \\
        --config.data_dir=/data/coco --save-predictions predictions

The argument is `{micro,tiny,small},{1x,3x}`. The data folder holds train2017/, val2017/ and
annotations/instances_{train,val}2017.json. For the authors' padding in evaluation:
--config.exact_padding=True --config.eval_batch_size=1.

Expected box and mask mAP, the paper's:

           1x           3x
    micro  45.4  41.3   47.7  42.8
    tiny   46.9  42.6   48.8  43.6
    small  48.4  43.5   50.0  44.6

As in the authors' runs the backbone's BatchNorm takes its statistics from two images, those of a
GPU there; here it does so on any number of devices (--config.batch_norm_images=None: from the whole
batch). What differs: the running average of the statistics is that of all pairs, there of the first
GPU's alone; the heads compute in bfloat16 here, in float32 there (--config.dtype=float32 makes
everything float32); the images of a batch have one of six padded shapes here, so that in 3x they
are of like size, while theirs are of one orientation, each two of a GPU padded to the larger
(benchmarks/padding.py counts what each way costs).

Hours on 8 GPUs: not measured. 1x is 88,000 steps of 16 images. By arithmetic the multiply-adds of
tiny take 0.4 hours on 8 H200 (at the speed that configs/tiny.py assumes), and with two images on a
GPU much of it waits: 2 to 4 hours are likely, three times that for 3x. The 12 worker processes
could prepare more than 1,000 images/s (benchmarks/detection_pipeline.py: 190 on a core, 225 in 3x).
"""

from vssd_jax.config import detection_config

VARIANTS, SCHEDULES = ("micro", "tiny", "small"), ("1x", "3x")


def get_config(arg="tiny,1x"):
    variant, _, schedule = arg.partition(",")
    if variant not in VARIANTS or schedule not in SCHEDULES:
        raise ValueError(f"unknown argument {arg!r}: give {{micro,tiny,small}},{{1x,3x}}")
    config = detection_config()
    config.model = f"mask_rcnn_vssd_{variant}"
    config.init_from = f"weights/vssd_{variant}"
    config.dtype = "bfloat16"
    config.num_workers = 12

    config.batch_size = 16
    config.batch_norm_images = 2
    config.eval_batch_size = 16
    config.learning_rate = 1e-4
    config.learning_rate_batch = 16
    config.warmup_steps = 1000
    config.warmup_learning_rate = 1e-7
    config.betas = (0.9, 0.999)
    config.weight_decay = 0.05
    config.no_decay = "norms"
    config.epochs, config.decay_epochs = 12, (8, 11)
    if schedule == "3x":
        config.epochs, config.decay_epochs = 36, (27, 33)
        config.short_sides = tuple(range(480, 801, 32))
        config.crop = True
        config.padded_shapes = (
            (800, 1344), (1344, 800), (768, 1024), (1024, 768), (640, 864), (864, 640),
        )  # fmt: skip
    return config
