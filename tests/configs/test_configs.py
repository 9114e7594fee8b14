"""Every config, whole, as recorded beside this file, and the recipes against the paper.

`configs/tiny.json` here holds what `--config configs/tiny.py` and `configs/tiny.py:mesa` give. To
record a new config, or a change that is meant, name all arguments that it is to be recorded with:

    python -m tests.configs.test_configs configs/tiny.py configs/tiny.py:mesa
"""

import importlib
import json
import math
import pathlib
import sys

import pytest

from vssd_jax.data.classification_transforms import TrainTransform
from vssd_jax.models.family import make_config
from vssd_jax.models.mask_rcnn import MaskRCNNConfig
from vssd_jax.models.vssd import VSSDConfig
from vssd_jax.training.optimizer import make_schedule

FOLDER = pathlib.Path(__file__).parent
RECORDED = {
    name: fields
    for file in sorted(FOLDER.glob("*.json"))
    for name, fields in json.loads(file.read_text()).items()
}


def get_config(name):
    """The config that `--config NAME` gives."""
    path, colon, argument = name.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    return module.get_config(argument) if colon else module.get_config()


def contents(name):
    return json.loads(json.dumps(get_config(name).to_dict()))  # tuples become lists


@pytest.mark.parametrize("name", RECORDED)
def test_holds_what_is_recorded(name):
    assert contents(name) == RECORDED[name]


def test_every_config_is_recorded():
    files = {f"configs/{file.name}" for file in (FOLDER.parents[1] / "configs").glob("*.py")}
    assert {name.partition(":")[0] for name in RECORDED} == files


# variant: batch, learning rate and minimum for a batch of 512, drop path, MESA's weight
PAPER = {
    "micro": (1024, 5e-4, 5e-6, 0.1, None),
    "tiny": (1024, 5e-4, 5e-6, 0.2, 1.0),
    "small": (2048, 3e-4, 3e-6, 0.4, 1.5),
    "base": (2048, 3e-4, 3e-6, 0.6, 2.0),
}


@pytest.mark.parametrize("variant", PAPER)
def test_imagenet_follows_the_paper(variant):
    batch, peak, minimum, drop_path, mesa = PAPER[variant]
    config = get_config(f"configs/{variant}.py")
    assert config.model == f"vssd_{variant}"
    assert config.model_options.to_dict() == {}
    assert getattr(VSSDConfig, variant)().drop_path == drop_path
    assert (config.batch_size, config.epochs, config.steps) == (batch, 300, None)
    assert (config.image_size, config.dtype) == (224, "bfloat16")

    steps = 1_281_167 // batch  # an epoch's
    schedule = make_schedule(config, steps)
    for epoch in (0, 10, 20, 90, 160, 300):
        rate = 5e-7 + (peak - 5e-7) * epoch / 20
        if epoch > 20:
            cosine = (1 + math.cos(math.pi * (epoch - 20) / 280)) / 2
            rate = minimum + (peak - minimum) * cosine
        # To the float32 rounding of the peak.
        expected = pytest.approx(rate * batch / 512, abs=2e-10)
        assert float(schedule(epoch * steps)) == expected

    assert (*config.betas, config.epsilon) == (0.9, 0.999, 1e-8)
    assert (config.weight_decay, config.no_decay) == (0.05, "vectors")
    assert (config.clip_grad_norm, config.ema_decay, config.label_smoothing) == (5, 0.9999, 0.1)
    assert (config.mixup_alpha, config.cutmix_alpha, config.cutmix_probability) == (0.8, 1.0, 0.5)
    assert TrainTransform(224, **config.augmentation) == TrainTransform(
        image_size=224,
        crop_area=(0.08, 1.0),
        crop_aspect=(3 / 4, 4 / 3),
        flip_probability=0.5,
        randaugment_num_ops=2,
        randaugment_magnitude=9.0,
        randaugment_magnitude_std=0.5,
        erase_probability=0.25,
        erase_area=(0.02, 1 / 3),
        erase_aspect=(0.3, 1 / 0.3),
    )

    assert config.mesa == 0
    if mesa is None:
        with pytest.raises(ValueError, match="takes none"):
            get_config(f"configs/{variant}.py:mesa")
        return
    with_mesa = get_config(f"configs/{variant}.py:mesa")
    assert (with_mesa.mesa, with_mesa.mesa_start_epoch) == (mesa, 75)
    with_mesa.mesa = 0.0
    assert with_mesa.to_dict() == config.to_dict()


@pytest.mark.parametrize("variant", ["micro", "tiny", "small"])
def test_ade20k_follows_the_paper(variant):
    config = get_config(f"configs/upernet.py:{variant}")
    assert config.model == f"upernet_vssd_{variant}"
    assert config.init_from == f"weights/vssd_{variant}"
    model = make_config(config.model, **config.model_options)
    assert model.backbone == getattr(VSSDConfig, variant)()
    assert (model.channels, model.pool_scales, model.num_classes) == (512, (1, 2, 3, 6), 150)
    assert (model.aux_channels, model.aux_weight, model.dropout) == (256, 0.4, 0.1)

    schedule = make_schedule(config, 20_210 // 16)
    rates = [float(schedule(step)) for step in (0, 1499, 1500, 159_999)]
    # To the float32 rounding of the peak.
    assert rates == pytest.approx([6e-11, 6e-5, 6e-5, 0], rel=1e-6, abs=2e-12)
    assert (config.batch_size, config.steps) == (16, 160_000)
    assert (*config.betas, config.epsilon) == (0.9, 0.999, 1e-8)
    assert (config.weight_decay, config.no_decay) == (0.01, "backbone_norms")
    assert (config.clip_grad_norm, config.ema_decay) == (0, 0)
    assert (config.image_size, config.short_side, config.long_side) == (512, 512, 2048)
    assert (config.scales, config.max_class_share, config.flip) == ((0.5, 2.0), 0.75, 0.5)
    assert (config.tta_ratios, config.image_shape) == ((0.75, 1.0, 1.25), (512, 2048))


@pytest.mark.parametrize("variant", ["micro", "tiny", "small"])
def test_mask_rcnn_follows_the_paper(variant):
    short, long = (get_config(f"configs/mask_rcnn.py:{variant},{name}") for name in ("1x", "3x"))
    for config, epochs, drops in ((short, 12, (8, 11)), (long, 36, (27, 33))):
        assert config.model == f"mask_rcnn_vssd_{variant}"
        assert config.model_options.to_dict() == {}
        assert config.init_from == f"weights/vssd_{variant}"
        assert (config.batch_size, config.epochs, config.steps) == (16, epochs, None)
        schedule = make_schedule(config, 2000)
        for epoch, rate in ((0, 1e-7), (0.25, 5.01e-5), (0.4995, 1e-4), (1, 1e-4), (drops[0], 1e-5),
                            (drops[1], 1e-6)):  # fmt: skip
            assert schedule(2000 * epoch) == pytest.approx(rate, rel=2e-3)
        for drop, rate in zip(drops, (1e-4, 1e-5), strict=True):
            assert schedule(2000 * drop - 1) == pytest.approx(rate)
        assert (*config.betas, config.weight_decay, config.no_decay) == (0.9, 0.999, 0.05, "norms")
        assert (config.clip_grad_norm, config.ema_decay) == (0, 0)
        assert (config.long_side, config.flip, config.batch_norm_images) == (1333, 0.5, 2)
    assert (short.short_sides, short.crop) == ((800,), False)
    assert long.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert long.crop
    for wrong in ("base,1x", "tiny", "tiny,2x"):
        with pytest.raises(ValueError, match="give"):
            get_config(f"configs/mask_rcnn.py:{wrong}")
    model = getattr(MaskRCNNConfig, variant)()
    backbone = getattr(VSSDConfig, variant)()
    assert model == MaskRCNNConfig(
        backbone=backbone, num_classes=80, fpn_channels=256, box_channels=1024,
        anchor_scale=8.0, anchor_ratios=(0.5, 1.0, 2.0),
        rpn_pre_nms=1000, rpn_pre_nms_train=2000, rpn_proposals=1000, rpn_nms_iou=0.7,
        rpn_samples=256, rpn_positive_fraction=0.5,
        roi_samples=512, roi_positive_fraction=0.25, roi_add_objects=True,
        score_threshold=0.05, nms_iou=0.5, max_detections=100,
    )  # fmt: skip


def record(names):
    files = {}
    for name in names:
        file = FOLDER / pathlib.Path(name.partition(":")[0]).with_suffix(".json").name
        files.setdefault(file, {})[name] = get_config(name).to_dict()
    for file, configs in files.items():
        file.write_text(json.dumps(configs, indent=2) + "\n")


if __name__ == "__main__":
    record(sys.argv[1:])
