"""The golden cases' models: weights from synthetic.py through the name table."""

import dataclasses
import pathlib

import numpy as np
from flax import nnx

from tests.golden.inventories import load_inventory
from tests.golden.synthetic import synthetic_images, synthetic_state_dict
from vssd_jax.models import torch_names, vssd
from vssd_jax.models.family import abstract
from vssd_jax.models.vssd import VSSD, VSSDConfig
from vssd_jax.weights import state

GOLDEN = pathlib.Path(__file__).parent / "golden"

_NANO = VSSDConfig.nano()
_GROUPED = {"ngroups": 2, "num_heads": (2, 4, 4, 8)}
ABLATIONS = {
    "negative_da": {"token_weight_sign": -1},
    "groups": _GROUPED,
    "causal": {"mixers": ("ssd", "ssd", "ssd", "attention")},
    "bidirectional": {"mixers": ("bissd", "bissd", "bissd", "attention"), **_GROUPED},
    "simple": {"stem": "patch", "downsample": "patch"},
    "all_ssd": {"mixers": ("ncssd",) * 4},
    "all_attention": {"mixers": ("attention",) * 4},
    "expand1": {"expand": 1},
}


def ablation_config(name: str) -> VSSDConfig:
    return dataclasses.replace(_NANO, **ABLATIONS[name])


def golden_weights(inventory: str, salt: int = 0) -> dict[str, np.ndarray]:
    """The synthetic weights of an inventory, by the names of this project."""
    state_dict = synthetic_state_dict(load_inventory(inventory), salt)
    params, _, unknown = torch_names.from_torch(vssd.TORCH_TABLE, state_dict)
    assert not unknown
    return params


def golden_model(config, inventory: str, *, num_classes, dtype, salt: int = 0) -> VSSD:
    """A model in evaluation mode with the golden weights."""
    model = abstract(lambda rngs: VSSD(config, num_classes=num_classes, dtype=dtype, rngs=rngs))
    state.set_state(model, golden_weights(inventory, salt))
    model.eval()
    return model


def golden_images(shape, salt: int = 0, dtype=np.float32) -> np.ndarray:
    """(B, H, W, 3) images; `shape` is PyTorch's (B, 3, H, W)."""
    return synthetic_images(shape, salt).transpose(0, 2, 3, 1).astype(dtype)


def run(model, images):
    """The logits, compiled: op by op a large model takes long."""
    return np.asarray(nnx.jit(lambda model, images: model(images))(model, images))


def relative_error(actual, expected) -> float:
    """The largest error in units of the largest magnitude."""
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())
