"""A backbone that is not VSSD, for classification, Mask R-CNN and UperNet, in one file.

    python train.py --config tests/extending/toy_backbone.py:classification
    python train.py --config tests/extending/toy_backbone.py:detection --config.data_dir=...
    python train.py --config tests/extending/toy_backbone.py:segmentation --config.data_dir=...

It declares a module, its config, the names in its PyTorch checkpoints and how to recognise them,
and puts both heads on itself.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from vssd_jax.config import classification_config, detection_config, segmentation_config
from vssd_jax.models import mask_rcnn, torch_names, upernet
from vssd_jax.models.family import Family, Recognised, register
from vssd_jax.models.layers import ConvNorm, Linear, Precision
from vssd_jax.models.taps import tap
from vssd_jax.models.torch_names import Row


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int = 8
    depth: int = 4

    def make_backbone(self, *, dtype, remat, implementation, rngs):
        return Toy(
            self, num_classes=None, dtype=dtype, remat=remat, implementation=implementation,
            rngs=rngs,
        )  # fmt: skip


class Toy(nnx.Module):
    """One strided convolution for each stage."""

    def __init__(
        self, config, *, num_classes, dtype=jnp.float32, remat=False, implementation=None, rngs
    ):
        del remat, implementation  # nothing to recompute, and plain convolutions
        self.config, self.num_classes = config, num_classes
        self.precision = Precision(jnp.dtype(dtype))
        self.widths = tuple(config.width * 2**i for i in range(config.depth))
        self.strides = tuple(4 * 2**i for i in range(config.depth))
        options = {"precision": self.precision, "rngs": rngs}
        self.stages = nnx.List()
        for i, width in enumerate(self.widths):
            inputs, stride = (3, 4) if i == 0 else (self.widths[i - 1], 2)
            self.stages.append(ConvNorm(inputs, width, 3, stride=stride, **options))
        if num_classes is not None:
            self.head = Linear(self.widths[-1], num_classes, **options)

    def feature_maps(self, images, rngs=None):
        x, maps = images.astype(self.precision.compute), []
        for stage in self.stages:
            x = tap("map", jnp.maximum(stage(x), 0))
            maps.append(x)
        return maps

    def __call__(self, images, rngs=None):
        x = self.feature_maps(images)[-1].astype(self.precision.state)
        return self.head(x.mean((1, 2))).astype(self.precision.state)


TORCH_TABLE = (
    Row("layers.{}.conv", "stages.{}.conv", torch_names.CONV),
    Row("layers.{}.bn", "stages.{}.norm", torch_names.BATCH_NORM),
    Row("fc", "head", torch_names.LINEAR),
)


def recognise_backbone(shapes, known, given):
    return {"width": shapes.size("layers.0.conv.weight"), "depth": shapes.count("layers.")}


def recognise(shapes, known, given):
    if "layers.0.bn.weight" not in shapes:
        return None
    return Recognised(shapes.size("fc.weight"), recognise_backbone(shapes, known, given))


FAMILY = register(
    Family(
        prefix="toy_",
        variants={"small": ToyConfig},
        module=Toy,
        num_classes=1000,
        classifier=("head.",),
        torch_table=TORCH_TABLE,
        recognise=recognise,
        recognise_backbone=recognise_backbone,
        variant_fields=("width", "depth"),
    )
)


def small_mask_rcnn():
    return mask_rcnn.MaskRCNNConfig(
        backbone=ToyConfig(), num_classes=10, fpn_channels=8, box_channels=16, rpn_pre_nms=40,
        rpn_pre_nms_train=40, rpn_proposals=20, rpn_samples=16, roi_samples=8, max_detections=10,
    )  # fmt: skip


def small_upernet():
    return upernet.UperNetConfig(
        backbone=ToyConfig(), channels=8, aux_channels=8, pool_scales=(1, 2)
    )


register(mask_rcnn.HEAD.on(FAMILY, {"small": small_mask_rcnn}))
register(upernet.HEAD.on(FAMILY, {"small": small_upernet}))


def get_config(arg="classification"):
    if arg == "classification":
        config = classification_config()
        config.update(model="toy_small", dataset="digits", image_size=32)
    elif arg == "detection":
        config = detection_config()
        config.update(
            model="mask_rcnn_toy_small", image_shape=(96, 96), short_sides=(64,), long_side=80,
            padded_shapes=((96, 96),),
        )  # fmt: skip
    else:
        config = segmentation_config()
        config.update(
            model="upernet_toy_small", image_size=32, image_shape=(32, 32), short_side=32,
            long_side=64,
        )  # fmt: skip
    config.update(batch_size=4, eval_batch_size=4, steps=3, log_every_steps=1)
    return config
