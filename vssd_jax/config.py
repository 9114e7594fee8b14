"""The fields that every run has, with their defaults; configs/ fills in the rest."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vssd_jax.errors import UserError, did_you_mean

# Only where a config is made: a prediction does without this package.
if TYPE_CHECKING:
    import ml_collections


# The fields that say, with mean and deviation, how a picture becomes a model's input, by task.
PREPROCESSING: dict[str, dict[str, Any]] = {
    "classification": {
        "image_size": 224,
        "eval_crop": 0.875,  # the square that counts in evaluation, of the shorter side
    },
    "detection": {
        # Short sides, of which training takes one at random and evaluation the greatest.
        "short_sides": (800,),
        "long_side": 1333,
        # The sizes (H, W) that images are padded to, each the smallest that holds it. Each compiles
        # a program; with one width in place of three, 16 % of COCO's pixels would be padding, not
        # 3 % (benchmarks/padding.py).
        "padded_shapes": tuple(
            shape for width in (1344, 1216, 1088) for shape in ((800, width), (width, 800))
        ),
        # Evaluate with padding to multiples of 32, as the authors do, one image at a time.
        "exact_padding": False,
    },
    "segmentation": {
        # Images are scaled to fit these sides; for training times a factor drawn from `scales`.
        "short_side": 512,
        "long_side": 2048,
        # In evaluation, sides are multiples of it: few shapes to compile for. 1 keeps every
        # image's proportions exactly, as the authors do, and compiles for far more shapes.
        "size_multiple": 32,
    },
}


def _optional(kind: type) -> Any:
    """A field of this type that is None at first."""
    from ml_collections import config_dict

    return config_dict.placeholder(kind)


def base_config() -> "ml_collections.ConfigDict":
    """A config for `train.py`; a field that is None is left to the task or to the device."""
    import ml_collections

    config = ml_collections.ConfigDict()
    config.task = "classification"
    config.seed = 0

    config.model = "vssd_tiny"
    config.model_options = {}  # overrides of the model's config, see create_model
    config.num_classes = _optional(int)  # None: the dataset's
    config.dtype = "float32"  # of the activations; "bfloat16" on GPUs
    config.implementation = _optional(str)  # xla, pallas, triton
    config.remat = False  # recompute blocks in the backward pass: less memory, more time
    config.init_from = _optional(str)  # weights to start from

    config.dataset = "imagenet2012"
    config.data_dir = "data"
    # Names, separated by commas, or a text file with a name a line. Folders and categories are
    # chosen and ordered by them; label maps have numbers, which they name. None: the dataset's.
    config.class_names = _optional(str)
    config.validation_share = 0.2  # of the samples, set aside where there is no validation part
    config.image_size = 224
    config.num_workers = 0  # processes that prepare batches; 0 uses threads
    config.max_unreadable = 0.01  # a greater share of unreadable pictures ends the run
    config.max_pixels = 89_478_485  # H * W; a picture with more is unreadable (Pillow's limit)

    config.batch_size = 1024  # global
    config.eval_batch_size = 1024
    config.accumulate = 1  # micro-batches of a step
    # Images that share the statistics of BatchNorm in training, as those of a GPU do in PyTorch
    # without SyncBN. None: the global batch, or micro-batch, whatever the number of devices.
    config.batch_norm_images = _optional(int)
    config.epochs = 300
    config.steps = _optional(int)  # instead of epochs

    config.learning_rate = 5e-4
    # The batch for which the rates hold; they scale with batch_size. None: no scaling.
    config.learning_rate_batch = _optional(int)
    config.schedule = "cosine"  # or "linear", "steps"
    config.min_learning_rate = 0.0
    config.warmup_learning_rate = 0.0
    config.warmup_epochs = 0.0
    config.warmup_steps = _optional(int)  # instead of epochs
    config.decay_epochs = ()  # of schedule "steps": a tenth after each
    config.betas = (0.9, 0.999)  # of AdamW
    config.epsilon = 1e-8
    config.weight_decay = 0.05
    config.no_decay = "vectors"  # or "norms", "backbone_norms"
    config.clip_grad_norm = 5.0  # 0: no clipping
    config.ema_decay = 0.9999
    config.max_nonfinite = 10  # skipped steps in a row that end the run

    # Fine-tuning. Rates of layers fall from the head to the input: layer_decay ** distance.
    config.layer_decay = 1.0
    config.freeze_stages = 0  # of the backbone, its stem included, that stay as they are
    config.linear_probe = False  # train the classifier alone, or a head without its backbone
    config.patience = 0  # evaluations without a better metric that end the run; 0: none do
    # "balanced", or numbers separated by commas, one for each class: of the loss.
    config.class_weights = _optional(str)
    config.balanced_sampling = False  # draw samples of rare classes more often

    # Devices per axis; -1: all that are left. Each has its share of the batch; over "fsdp" the
    # parameters and the optimizer's state are split too.
    config.mesh = {"data": -1, "fsdp": 1}
    config.profile_steps = ""  # "10:15" writes a trace of these steps to <workdir>/profile
    config.eval_every_epochs = 1
    # Checkpoints between the evaluations, each of which makes one.
    config.save_every_steps = _optional(int)
    config.log_every_steps = 50
    config.tracker = ""  # the metrics also go to "wandb", "mlflow" or "trackio"
    return config


def classification_config() -> "ml_collections.ConfigDict":
    """The base config with the fields of classification."""
    config = base_config()
    config.update(PREPROCESSING["classification"])
    config.label_smoothing = 0.1
    config.mixup_alpha = 0.0
    config.cutmix_alpha = 0.0
    config.cutmix_probability = 0.5  # of a batch, where both are on; otherwise mixup
    config.augmentation = {}  # fields of vssd_jax.data.classification_transforms.TrainTransform
    config.mesa = 0.0  # weight of the distance to the averaged model; 0: none
    config.mesa_start_epoch = 0
    # A folder for decoded training pictures, where the processors cannot keep up.
    config.cache_decoded = _optional(str)
    return config


def segmentation_config() -> "ml_collections.ConfigDict":
    """The base config with the fields of segmentation, with the numbers of ADE20K."""
    config = base_config()
    config.task = "segmentation"
    config.update(PREPROCESSING["segmentation"])
    config.dataset = "ade20k"
    # Where the pictures and label maps are, in `data_dir` or anywhere else; None: where the layout
    # has them.
    for name in ("train_images", "train_labels", "val_images", "val_labels"):
        config[name] = _optional(str)
    # What the names of the files end with, before the ending: "_leftImg8bit". None: recognised.
    config.image_suffix = _optional(str)
    config.label_suffix = _optional(str)
    # Whether label 0 is no class but ignored, and 1 the first class. None: as the dataset has it.
    config.reduce_zero_label = _optional(bool)
    config.ignore_label = 255  # of the label maps: pixels that do not count
    config.image_shape = (512, 2048)  # multiply-adds and throughput are given for it
    config.image_size = 512  # side of the crops for training
    config.scales = (0.5, 2.0)
    config.max_class_share = 0.75  # of a crop
    config.flip = 0.5
    config.tta_ratios = (0.75, 1.0, 1.25)  # of `--tta`
    config.schedule = "linear"
    config.no_decay = "backbone_norms"
    config.clip_grad_norm = 0.0
    config.ema_decay = 0.0  # no average
    return config


def detection_config() -> "ml_collections.ConfigDict":
    """The base config with the fields of detection, with the numbers of COCO."""
    config = base_config()
    config.task = "detection"
    config.update(PREPROCESSING["detection"])
    config.dataset = "coco"
    # Where the pictures and COCO's JSON files are, in `data_dir` or anywhere else; None: where the
    # layout has them.
    for name in ("train_images", "train_annotations", "val_images", "val_annotations"):
        config[name] = _optional(str)
    config.image_shape = (800, 1280)  # multiply-adds and throughput are given for it
    config.crop = False  # of half of the images, as the 3x schedule does
    config.flip = 0.5
    config.max_objects = 100  # of an image in training
    config.bad_annotations = "skip"  # or "refuse"
    config.filter_empty = True  # leave images without objects out of training
    config.max_pictures = 200  # that --save-predictions draws, the first ones
    config.schedule = "steps"
    config.no_decay = "norms"
    config.clip_grad_norm = 0.0
    config.ema_decay = 0.0  # no average
    return config


def imagenet_config() -> "ml_collections.ConfigDict":
    """The paper's recipe for ImageNet-1K; the variants differ in batch, rates and MESA.

    BatchNorm takes its statistics from the global batch. Under PyTorch's DistributedDataParallel,
    with which the authors trained, it takes them from a GPU's part: with eight GPUs that is
    `batch_norm_images` of 128 for a batch of 1024. Their running average is the first GPU's.
    """
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


# Fields that name where the parts of a dataset are.
PATHS = tuple(
    f"{split}_{part}" for split in ("train", "val") for part in ("images", "labels", "annotations")
)
# Those that some datasets read and others do not: to set them for the others is a mistake.
DATASET_FIELDS = ("class_names", *PATHS, "image_suffix", "label_suffix", "reduce_zero_label")
_LARGEST = 2**31 - 1  # of whole numbers: steps are counted in int32
_LARGEST_SIDE = 16384  # of pictures, in pixels
_LARGEST_FLOAT = 1e30  # the state is float32


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "to_dict")  # a ConfigDict


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) <= _LARGEST_FLOAT


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _count(value: Any) -> bool:
    return _whole(value) and value >= 1


def _side(value: Any) -> bool:
    return _count(value) and value <= _LARGEST_SIDE


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _list(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _weights(value: Any) -> bool:
    if value == "balanced":
        return True
    try:
        numbers = [float(number) for number in value.split(",")]
    except (AttributeError, ValueError):
        return False
    return all(_number(number) and number >= 0 for number in numbers) and sum(numbers) > 0


def _one_of(*choices: str) -> tuple[str, Callable[[Any], bool]]:
    words = ", ".join(choice or "'' (none)" for choice in choices)
    return f"one of {words}", lambda value: value in choices


def _mesh(value: Any) -> bool:
    if not _is_dict(value):
        return False
    sizes = list(value.values())
    return sizes.count(-1) <= 1 and all(size == -1 or _count(size) for size in sizes)


_TEXT = ("a text that is not empty", lambda value: isinstance(value, str) and value.strip() != "")
_AT_LEAST_1 = ("a whole number of at least 1", _count)
_NOT_NEGATIVE = ("0 or more", lambda value: _number(value) and value >= 0)
_WHOLE_NOT_NEGATIVE = ("a whole number of 0 or more", lambda value: _whole(value) and value >= 0)
_POSITIVE = ("greater than 0", lambda value: _number(value) and value > 0)
_SHARE = ("from 0 to 1", _share)
_BELOW_1 = ("0 or more and less than 1", lambda value: _share(value) and value < 1)
_SWITCH = ("True or False", lambda value: isinstance(value, bool))
_SIDE = (f"a whole number of pixels from 1 to {_LARGEST_SIDE}", _side)
_SIZE = ("a height and a width of at least 1", lambda v: _pair(v) and all(map(_side, v)))

# Field -> what is allowed, in words and as a test.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        (
            "num_classes", "batch_size", "eval_batch_size", "accumulate", "epochs",
            "steps", "learning_rate_batch", "max_nonfinite", "eval_every_epochs",
            "save_every_steps", "log_every_steps", "max_objects", "max_pixels",
            "batch_norm_images",
        ),
        _AT_LEAST_1,
    ),
    **dict.fromkeys(("image_size", "short_side", "long_side", "size_multiple"), _SIDE),
    **dict.fromkeys(
        ("seed", "warmup_steps", "mesa_start_epoch", "max_pictures", "freeze_stages", "patience"),
        _WHOLE_NOT_NEGATIVE,
    ),
    "num_workers": ("a whole number from 0 to 1024", lambda v: _whole(v) and 0 <= v <= 1024),
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
    "layer_decay": ("greater than 0 and at most 1", lambda v: _share(v) and v > 0),
    "class_weights": ("balanced, or numbers separated by commas", _weights),
    "max_class_share": ("greater than 0 and at most 1", lambda v: _share(v) and v > 0),
    "betas": ("two numbers from 0 to below 1", lambda v: _pair(v) and all(map(_BELOW_1[1], v))),
    **dict.fromkeys(
        (
            "remat", "crop", "exact_padding", "filter_empty", "reduce_zero_label", "linear_probe",
            "balanced_sampling",
        ),
        _SWITCH,
    ),
    "image_shape": _SIZE,
    "padded_shapes": (
        "one or more pairs of height and width",
        lambda v: _list(v) and len(v) > 0 and all(_SIZE[1](shape) for shape in v),
    ),
    "short_sides": (
        "one or more lengths of at least 1",
        lambda v: _list(v) and len(v) > 0 and all(map(_side, v)),
    ),
    "scales": (
        "two factors greater than 0, the smaller first",
        lambda v: _pair(v) and all(map(_POSITIVE[1], v)) and v[0] <= v[1],
    ),
    "tta_ratios": (
        "one or more factors greater than 0",
        lambda v: _list(v) and len(v) > 0 and all(map(_POSITIVE[1], v)),
    ),
    "decay_epochs": (
        "growing numbers greater than 0",
        lambda v: _list(v) and all(map(_POSITIVE[1], v)) and list(v) == sorted(set(v)),
    ),
    **dict.fromkeys(
        (
            "task", "model", "dataset", "data_dir", "implementation", "init_from",
            "cache_decoded", *PATHS,
        ),
        _TEXT,
    ),
    "class_names": (
        "names, separated by commas, or a text file",
        lambda v: (isinstance(v, str) and v.strip() != "")
        or (_list(v) and len(v) > 0 and all(isinstance(name, str) for name in v)),
    ),
    **dict.fromkeys(("image_suffix", "label_suffix"), ("a text", lambda v: isinstance(v, str))),
    "validation_share": ("greater than 0 and less than 1", lambda v: _number(v) and 0 < v < 1),
    "eval_crop": ("from 0.1 to 1", lambda v: _share(v) and v >= 0.1),
    "ignore_label": ("a whole number from 0 to 255", lambda v: _whole(v) and 0 <= v <= 255),
    **dict.fromkeys(
        ("model_options", "augmentation"), ("a dict of fields", lambda v: _is_dict(v))
    ),
    "mesh": ("a size of at least 1 for each axis, of which one may be -1", _mesh),
    "profile_steps": ("a text", lambda value: isinstance(value, str)),
    "dtype": _one_of("float32", "bfloat16", "float64"),
    "schedule": _one_of("cosine", "linear", "steps"),
    "no_decay": _one_of("vectors", "norms", "backbone_norms"),
    "bad_annotations": _one_of("skip", "refuse"),
    "tracker": _one_of("wandb", "mlflow", "trackio", ""),
}  # fmt: skip
_RANGE = (
    "two numbers greater than 0, the smaller first",
    lambda v: _pair(v) and all(map(_POSITIVE[1], v)) and v[0] <= v[1],
)
# The same for the fields of `config.augmentation`.
_AUGMENTATION: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("crop_area", "erase_area"), (
        "two shares greater than 0, the smaller first", lambda v: _RANGE[1](v) and v[1] <= 1,
    )),
    **dict.fromkeys(("crop_aspect", "erase_aspect"), _RANGE),
    **dict.fromkeys(("flip_probability", "erase_probability"), _SHARE),
    "randaugment_num_ops": ("a whole number from 0 to 100", lambda v: _whole(v) and 0 <= v <= 100),
    "randaugment_magnitude": ("from 0 to 10", lambda v: _number(v) and 0 <= v <= 10),
    "randaugment_magnitude_std": _NOT_NEGATIVE,
}  # fmt: skip
# Fields that may be None.
OPTIONAL = frozenset(
    (
        "num_classes", "implementation", "steps", "learning_rate_batch", "warmup_steps",
        "batch_norm_images", "save_every_steps", "init_from", "cache_decoded", "class_names",
        "image_suffix", "label_suffix", "reduce_zero_label", "class_weights", *PATHS,
    )
)  # fmt: skip


def preprocessing_of(task: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of `PREPROCESSING` of a task, those given and for the others the defaults.

    Raises:
      UserError: a value that cannot be used, or an unknown field.
    """
    values = dict(PREPROCESSING[task])
    values |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # ImageNet's
    values |= {"detection": {"boxes_only": False}, "segmentation": {"reduce_zero_label": True}}.get(
        task, {}
    )
    for name in given or {}:
        if name not in values:
            raise UserError(f"preprocessing has no field {name!r}{did_you_mean(name, values)}")
    values |= given or {}
    numbers = lambda v: _list(v) and len(v) == 3 and all(map(_number, v))  # noqa: E731
    rules = {name: rule for name, rule in _ALLOWED.items() if name in values} | {
        "mean": ("three numbers", numbers),
        "std": ("three numbers greater than 0", lambda v: numbers(v) and min(v) > 0),
        "boxes_only": _SWITCH,
        "reduce_zero_label": _SWITCH,
    }
    _check(values, rules, "preprocessing")
    return {name: _tuples(value) for name, value in values.items()}


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


_MAKERS = {
    "classification": classification_config,
    "segmentation": segmentation_config,
    "detection": detection_config,
}


def add_missing(config: "ml_collections.ConfigDict") -> None:
    """Gives the fields that a config of an earlier version lacks their defaults."""
    defaults = _MAKERS.get(config.get("task"), base_config)()
    with config.unlocked():
        for name in defaults:
            if name not in config:
                config[name] = defaults[name]


def changed_fields(config: "ml_collections.ConfigDict") -> dict[str, Any]:
    """The fields that differ from the defaults of the config's task."""
    defaults = _MAKERS.get(config.get("task"), base_config)().to_dict()
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in defaults or _tuples(value) != _tuples(defaults[name])
    }


def check(config: "ml_collections.ConfigDict") -> None:
    """Raises a UserError for the first field whose value cannot be used."""
    _check(config, _ALLOWED, "config")
    augmentation = config.get("augmentation", {})
    for name in augmentation:
        if name not in _AUGMENTATION:
            near = did_you_mean(str(name), _AUGMENTATION)
            raise UserError(f"config.augmentation has no field {name!r}{near}")
    _check(augmentation, _AUGMENTATION, "config.augmentation")


def _check(
    fields: Mapping[str, Any],
    rules: dict[str, tuple[str, Callable[[Any], bool]]],
    prefix: str,
) -> None:
    for name, (words, allowed) in rules.items():
        if name not in fields:
            continue
        value = fields[name]
        if value is None and name in OPTIONAL:
            continue
        if not allowed(value):
            if isinstance(value, int) and abs(value) > _LARGEST:
                words += f" and at most {_LARGEST}"
            optional = ", or None" if name in OPTIONAL else ""
            shown = " ".join(repr(value).split())  # a ConfigDict has several lines
            raise UserError(f"{prefix}.{name}={shown[:200]} must be {words}{optional}")


def total_steps(config: "ml_collections.ConfigDict", steps_per_epoch: int) -> int:
    """Of the whole run: `config.steps`, or `config.epochs` in steps."""
    return config.epochs * steps_per_epoch if config.steps is None else config.steps
