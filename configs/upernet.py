"""UperNet on VSSD-Micro, -Tiny or -Small, on ADE20K, as in the paper (section 4.3).

    python convert_torch_weights.py --input hf://YuhengSSS/VSSD/vssd_tiny_best_ema.pth \\
        --output weights/vssd_tiny
    python train.py --config configs/upernet.py:tiny --workdir runs/upernet_tiny \\
        --config.data_dir=/data/ADEChallengeData2016
    python eval.py --config configs/upernet.py:tiny --weights runs/upernet_tiny \\
        --config.data_dir=/data/ADEChallengeData2016 --tta --save-predictions predictions

The argument is micro, tiny or small. The data folder holds images/{training,validation}/*.jpg and
annotations/{training,validation}/*.png. For the authors' image sizes in evaluation:
--config.size_multiple=1.

Expected mIoU, the paper's: micro 45.6, multi-scale 46.0; tiny 47.9, multi-scale 48.7; it gives none
for small.
As in the authors' runs the heads' BatchNorm is decayed (no_decay="backbone_norms"), and BatchNorm
takes its statistics from the whole batch (batch_norm_images=None; SyncBN there). Other than
there, the heads compute in bfloat16; --config.dtype=float32 makes everything float32.
Hours on 8 GPUs: not measured. 8 H200 would need 0.3 to 0.4 by arithmetic: the backbone at 70 % of
the memory roofline of ImageNet training, by pixels, and the decoder's multiply-adds at 40 % of 990
TFLOP/s; two crops a GPU will keep it less busy than that. The 12 workers prepare 2.56 million crops
in as long, at 185 images/s each (benchmarks/segmentation_pipeline.py, 683x512 JPEGs).
"""

from vssd_jax.config import segmentation_config

VARIANTS = ("micro", "tiny", "small")


def get_config(arg="tiny"):
    if arg not in VARIANTS:
        raise ValueError(f"unknown argument {arg!r}: {', '.join(VARIANTS)}")
    config = segmentation_config()
    config.model = f"upernet_vssd_{arg}"
    config.init_from = f"weights/vssd_{arg}"
    config.dtype = "bfloat16"
    config.num_workers = 12

    config.batch_size = 16
    config.eval_batch_size = 8
    config.steps = 160_000
    config.learning_rate = 6e-5
    config.learning_rate_batch = 16
    config.warmup_steps = 1500
    config.warmup_learning_rate = 6e-11
    config.betas = (0.9, 0.999)
    config.epsilon = 1e-8
    config.weight_decay = 0.01
    config.eval_every_epochs = 12
    return config
