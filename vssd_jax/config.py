"""The fields that every run has, with their defaults; configs/ fills in the rest."""

import math
from collections.abc import Callable
from typing import Any

import ml_collections

from vssd_jax.errors import UserError


def base_config() -> ml_collections.ConfigDict:
    """A config for `train.py`; a field that is None is left to the task or to the device."""
    config = ml_collections.ConfigDict()
    config.task = "classification"
    config.seed = 0

    config.model = "vssd_tiny"
    config.model_options = {}  # overrides of the model's config, see create_model
    config.num_classes = ml_collections.config_dict.placeholder(int)  # None: the dataset's
    config.dtype = "float32"  # of the activations; "bfloat16" on GPUs
    config.implementation = ml_collections.config_dict.placeholder(str)  # xla, pallas, triton
    config.remat = False  # recompute blocks in the backward pass: less memory, more time
    config.init_from = ml_collections.config_dict.placeholder(str)  # weights to start from

    config.dataset = "imagenet2012"
    config.data_dir = "data"
    config.image_size = 224
    config.num_workers = 0  # processes that prepare batches; 0 uses threads
    config.max_unreadable = 0.01  # a greater share of unreadable pictures ends the run
    config.max_pixels = 89_478_485  # H * W; a picture with more is unreadable (Pillow's limit)

    config.batch_size = 1024  # global
    config.eval_batch_size = 1024
    config.accumulate = 1  # micro-batches of a step
    config.epochs = 300
    config.steps = ml_collections.config_dict.placeholder(int)  # instead of epochs

    config.learning_rate = 5e-4
    # The batch for which the rates hold; they scale with batch_size. None: no scaling.
    config.learning_rate_batch = ml_collections.config_dict.placeholder(int)
    config.schedule = "cosine"  # or "linear", "steps"
    config.min_learning_rate = 0.0
    config.warmup_learning_rate = 0.0
    config.warmup_epochs = 0.0
    config.warmup_steps = ml_collections.config_dict.placeholder(int)  # instead of epochs
    config.decay_epochs = ()  # of schedule "steps": a tenth after each
    config.betas = (0.9, 0.999)  # of AdamW
    config.epsilon = 1e-8
    config.weight_decay = 0.05
    config.no_decay = "vectors"  # or "norms"
    config.clip_grad_norm = 5.0  # 0: no clipping
    config.ema_decay = 0.9999
    config.max_nonfinite = 10  # skipped steps in a row that end the run

    # Devices per axis; -1: all that are left. Each has its share of the batch; over "fsdp" the
    # parameters and the optimizer's state are split too.
    config.mesh = {"data": -1, "fsdp": 1}
    config.profile_steps = ""  # "10:15" writes a trace of these steps to <workdir>/profile
    config.eval_every_epochs = 1
    # Checkpoints between the evaluations, each of which makes one.
    config.save_every_steps = ml_collections.config_dict.placeholder(int)
    config.log_every_steps = 50
    return config


def classification_config() -> ml_collections.ConfigDict:
    """The base config with the fields of classification."""
    config = base_config()
    config.label_smoothing = 0.1
    config.mixup_alpha = 0.0
    config.cutmix_alpha = 0.0
    config.cutmix_probability = 0.5  # of a batch, where both are on; otherwise mixup
    config.augmentation = {}  # fields of vssd_jax.data.classification_transforms.TrainTransform
    config.mesa = 0.0  # weight of the distance to the averaged model; 0: none
    config.mesa_start_epoch = 0
    # A folder for decoded training pictures, where the processors cannot keep up.
    config.cache_decoded = ml_collections.config_dict.placeholder(str)
    return config


def segmentation_config() -> ml_collections.ConfigDict:
    """The base config with the fields of segmentation, with the numbers of ADE20K."""
    config = base_config()
    config.task = "segmentation"
    config.dataset = "ade20k"
    config.image_shape = (512, 2048)  # multiply-adds and throughput are given for it
    config.image_size = 512  # side of the crops for training
    # Images are scaled to fit these sides; for training times a factor drawn from `scales`.
    config.short_side = 512
    config.long_side = 2048
    config.scales = (0.5, 2.0)
    config.max_class_share = 0.75  # of a crop
    config.flip = 0.5
    # In evaluation, sides are multiples of it: few shapes to compile for. 1 keeps every
    # image's proportions exactly, as the authors do, and compiles for far more shapes.
    config.size_multiple = 32
    config.tta_ratios = (0.75, 1.0, 1.25)  # of `--tta`
    config.schedule = "linear"
    config.no_decay = "norms"
    config.clip_grad_norm = 0.0
    config.ema_decay = 0.0  # no average
    return config


def detection_config() -> ml_collections.ConfigDict:
    """The base config with the fields of detection, with the numbers of COCO."""
    config = base_config()
    config.task = "detection"
    config.dataset = "coco"
    config.image_shape = (800, 1280)  # multiply-adds and throughput are given for it
    # Short sides, of which training takes one at random and evaluation the greatest.
    config.short_sides = (800,)
    config.long_side = 1333
    # The sizes (H, W) that images are padded to, a landscape and a portrait one, or one alone.
    config.padded_shapes = ((800, 1344), (1344, 800))
    config.crop = False  # of half of the images, as the 3x schedule does
    config.flip = 0.5
    config.max_objects = 100  # of an image in training
    config.bad_annotations = "skip"  # or "refuse"
    config.filter_empty = True  # leave images without objects out of training
    # Evaluate with padding to multiples of 32, as the authors do, one image at a time.
    config.exact_padding = False
    config.max_pictures = 200  # that --save-predictions draws, the first ones
    config.schedule = "steps"
    config.no_decay = "norms"
    config.clip_grad_norm = 0.0
    config.ema_decay = 0.0  # no average
    return config


def imagenet_config() -> ml_collections.ConfigDict:
    """The paper's recipe for ImageNet-1K; the variants differ in batch, rates and MESA."""
    config = classification_config()
    config.dataset = "imagenet2012"
    config.image_size = 224
    config.dtype = "bfloat16"
    config.num_workers = 12
    config.epochs = 300
    config.learning_rate_batch = 512
    config.warmup_epochs = 20
    config.warmup_learning_rate = 5e-7
    config.betas = (0.9, 0.999)
    config.epsilon = 1e-8
    config.weight_decay = 0.05
    config.clip_grad_norm = 5.0
    config.ema_decay = 0.9999
    config.label_smoothing = 0.1
    config.mixup_alpha = 0.8
    config.cutmix_alpha = 1.0
    config.cutmix_probability = 0.5
    config.augmentation = {
        "crop_area": (0.08, 1.0),
        "crop_aspect": (3 / 4, 4 / 3),
        "flip_probability": 0.5,
        "randaugment_num_ops": 2,
        "randaugment_magnitude": 9.0,
        "randaugment_magnitude_std": 0.5,
        "erase_probability": 0.25,
        "erase_area": (0.02, 1 / 3),
        "erase_aspect": (0.3, 1 / 0.3),
    }
    config.mesa_start_epoch = 75
    config.log_every_steps = 100
    return config


# --- Checks -------------------------------------------------------------------------------------


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return _whole(value) and value >= 1


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _one_of(*choices: str) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(choices)}", lambda value: value in choices


_AT_LEAST_1 = ("a whole number of at least 1", _count)
_NOT_NEGATIVE = ("0 or more", lambda value: _number(value) and value >= 0)
_WHOLE_NOT_NEGATIVE = ("a whole number of 0 or more", lambda value: _whole(value) and value >= 0)
_POSITIVE = ("greater than 0", lambda value: _number(value) and value > 0)
_SHARE = ("from 0 to 1", _share)
_BELOW_1 = ("0 or more and less than 1", lambda value: _share(value) and value < 1)
_SWITCH = ("True or False", lambda value: isinstance(value, bool))
_SIZE = ("a height and a width of at least 1", lambda v: _pair(v) and all(map(_count, v)))

# Field -> what is allowed, in words and as a test.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        (
            "num_classes", "image_size", "batch_size", "eval_batch_size", "accumulate", "epochs",
            "steps", "learning_rate_batch", "max_nonfinite", "eval_every_epochs",
            "save_every_steps", "log_every_steps", "short_side", "long_side", "size_multiple",
            "max_objects", "max_pixels",
        ),
        _AT_LEAST_1,
    ),
    **dict.fromkeys(
        ("seed", "num_workers", "warmup_steps", "mesa_start_epoch", "max_pictures"),
        _WHOLE_NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "min_learning_rate", "warmup_learning_rate", "warmup_epochs", "weight_decay",
            "clip_grad_norm", "mixup_alpha", "cutmix_alpha", "mesa",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("learning_rate", "epsilon"), _POSITIVE),
    **dict.fromkeys(("cutmix_probability", "max_unreadable", "flip"), _SHARE),
    **dict.fromkeys(("ema_decay", "label_smoothing"), _BELOW_1),
    "max_class_share": ("greater than 0 and at most 1", lambda v: _share(v) and v > 0),
    "betas": ("two numbers from 0 to below 1", lambda v: _pair(v) and all(map(_BELOW_1[1], v))),
    **dict.fromkeys(("remat", "crop", "exact_padding", "filter_empty"), _SWITCH),
    "image_shape": _SIZE,
    "padded_shapes": ("one or more pairs of height and width", lambda v: v and all(
        _SIZE[1](shape) for shape in v
    )),
    "short_sides": ("one or more lengths of at least 1", lambda v: v and all(map(_count, v))),
    "scales": (
        "two factors greater than 0, the smaller first",
        lambda v: _pair(v) and all(map(_POSITIVE[1], v)) and v[0] <= v[1],
    ),
    "tta_ratios": (
        "one or more factors greater than 0", lambda v: v and all(map(_POSITIVE[1], v))
    ),
    "decay_epochs": (
        "growing numbers greater than 0",
        lambda v: all(map(_POSITIVE[1], v)) and list(v) == sorted(set(v)),
    ),
    "dtype": _one_of("float32", "bfloat16", "float64"),
    "schedule": _one_of("cosine", "linear", "steps"),
    "no_decay": _one_of("vectors", "norms"),
    "bad_annotations": _one_of("skip", "refuse"),
}  # fmt: skip
# Fields that may be None.
OPTIONAL = frozenset(
    (
        "num_classes", "implementation", "steps", "learning_rate_batch", "warmup_steps",
        "save_every_steps", "init_from", "cache_decoded",
    )
)  # fmt: skip


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a UserError for the first field whose value cannot be used."""
    for name, (words, allowed) in _ALLOWED.items():
        if name not in config:
            continue
        value = config[name]
        if value is None and name in OPTIONAL:
            continue
        if not allowed(value):
            optional = ", or None" if name in OPTIONAL else ""
            raise UserError(f"config.{name}={value!r} must be {words}{optional}")


def total_steps(config: ml_collections.ConfigDict, steps_per_epoch: int) -> int:
    """Of the whole run: `config.steps`, or `config.epochs` in steps."""
    return config.epochs * steps_per_epoch if config.steps is None else config.steps
