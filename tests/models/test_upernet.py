"""UperNet against the golden cases and PyTorch's resampling."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.golden.synthetic import synthetic_images, synthetic_state_dict
from vssd_jax.models import upernet
from vssd_jax.weights import names
from vssd_jax.weights.state import set_state

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

_CONV_NORMS = {
    "decode_head.psp_modules.{}.1": "decode_head.ppm.{}",
    "decode_head.bottleneck": "decode_head.bottleneck",
    "decode_head.lateral_convs.{}": "decode_head.lateral.{}",
    "decode_head.fpn_convs.{}": "decode_head.output.{}",
    "decode_head.fpn_bottleneck": "decode_head.fpn_bottleneck",
    "auxiliary_head.convs.0": "auxiliary_head.conv",
}
TABLE = (
    *((f"backbone.{a}", f"backbone.{b}", kind) for a, b, kind in names.VSSD),
    *((f"{a}.conv", f"{b}.conv", "conv") for a, b in _CONV_NORMS.items()),
    *((f"{a}.bn", f"{b}.norm", "batchnorm") for a, b in _CONV_NORMS.items()),
    ("decode_head.conv_seg", "decode_head.classifier", "conv"),
    ("auxiliary_head.conv_seg", "auxiliary_head.classifier", "conv"),
)


def golden_model(variant, dtype=jnp.float32):
    """An UperNet with the golden case's synthetic weights, in evaluation mode."""
    config = getattr(upernet.UperNetConfig, variant)()
    inventory = json.loads((GOLDEN / "inventory" / f"upernet_{variant}.json").read_text())
    model = upernet.UperNet(config, dtype=dtype, rngs=nnx.Rngs(0))
    params, _, unknown = names.from_torch(TABLE, synthetic_state_dict(inventory))
    assert not unknown
    set_state(model, params)
    model.eval()
    return model


def forward(model, images):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, images)


def relative(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("size", ["64x96", "97x131"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_nano_logits_match_golden(size, dtype):
    golden = np.load(GOLDEN / "upernet_nano.npz")
    images = synthetic_images((1, 3, *map(int, size.split("x")))).transpose(0, 2, 3, 1)
    suffix, bound = {"float64": ("_f64", 1e-9), "float32": ("", 1e-5)}[dtype]
    with jax.enable_x64(dtype == "float64"):
        model = golden_model("nano", jnp.dtype(dtype))
        logits = forward(model, jnp.asarray(images, dtype))
        for head, got in zip(("decode", "aux"), logits, strict=True):
            expected = golden[f"{size}_{head}{suffix}"]
            got = np.asarray(got).transpose(0, 3, 1, 2)
            assert got.dtype == dtype
            assert relative(got, expected) < bound
            if dtype == "float64":
                np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["micro", "tiny", "small"])
def test_variants_match_golden(variant):
    golden = np.load(GOLDEN / f"upernet_{variant}.npz")
    images = synthetic_images((1, 3, 128, 160)).transpose(0, 2, 3, 1)
    decode, aux = forward(golden_model(variant), images)
    decode = np.asarray(decode).transpose(0, 3, 1, 2)[:, ::5, ::2, ::2]
    aux = np.asarray(aux).transpose(0, 3, 1, 2)[:, ::5]
    assert relative(decode, golden["128x160_decode"]) < 1e-5
    assert relative(aux, golden["128x160_aux"]) < 1e-5
