"""A head of one's own on VSSD, in one file: a segmentor with one linear layer on the last map.

python train.py --config tests/extending/toy_head.py --config.data_dir=...
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from vssd_jax.config import segmentation_config
from vssd_jax.models import torch_names, vssd
from vssd_jax.models.family import Head, Recognised, register
from vssd_jax.models.layers import Linear, Precision
from vssd_jax.models.torch_names import Row


@dataclasses.dataclass(frozen=True)
class LinearHeadConfig:
    backbone: vssd.VSSDConfig
    num_classes: int = 150


class LinearHead(nnx.Module):
    """Logits at the stride of the backbone's last map; no auxiliary head."""

    aux_weight = 0.0

    def __init__(
        self, config, *, num_classes=None, dtype=jnp.float32, remat=False, implementation=None, rngs
    ):
        self.config = config
        self.num_classes = config.num_classes if num_classes is None else num_classes
        self.precision = Precision(jnp.dtype(dtype))
        self.backbone = config.backbone.make_backbone(
            dtype=dtype, remat=remat, implementation=implementation, rngs=rngs
        )
        self.classifier = Linear(
            self.backbone.widths[-1], self.num_classes, precision=self.precision, rngs=rngs
        )

    def __call__(self, images, rngs=None):
        logits = self.classifier(self.backbone.feature_maps(images, rngs)[-1])
        return (logits.astype(self.precision.state),)


def recognise(shapes):
    if "classifier.weight" not in shapes:
        return None
    return Recognised(shapes.size("classifier.weight"), {})


HEAD = Head(
    prefix="linear_",
    module=LinearHead,
    classifier=("classifier.",),
    torch_table=(Row("classifier", "classifier", torch_names.LINEAR),),
    recognise=recognise,
)
register(HEAD.on(vssd.FAMILY, {"nano": lambda: LinearHeadConfig(vssd.VSSDConfig.nano())}))


def get_config(arg=None):
    config = segmentation_config()
    config.update(
        model="linear_vssd_nano", image_size=32, image_shape=(32, 32), short_side=32, long_side=64,
        batch_size=4, eval_batch_size=4, steps=3, log_every_steps=1,
    )  # fmt: skip
    config.model_options = {
        "embed_dim": 8, "depths": (1, 0, 0, 1), "num_heads": (1, 1, 2, 2), "d_state": 4,
        "stem": "patch", "downsample": "patch",  # compile fast
    }  # fmt: skip
    return config
