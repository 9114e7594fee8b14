"""UperNet against the golden cases and PyTorch's resampling."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.golden.inventories import load_inventory
from tests.golden.synthetic import synthetic_images, synthetic_state_dict
from vssd_jax.models import torch_names, upernet
from vssd_jax.models.family import abstract
from vssd_jax.weights.state import set_state

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def golden_model(variant, dtype=jnp.float32):
    """An UperNet with the golden case's synthetic weights, in evaluation mode."""
    config = getattr(upernet.UperNetConfig, variant)()
    tensors = synthetic_state_dict(load_inventory(f"upernet_{variant}"))
    model = abstract(lambda rngs: upernet.UperNet(config, dtype=dtype, rngs=rngs))
    params, _, unknown = torch_names.from_torch(upernet.FAMILY.torch_table, tensors)
    assert not unknown
    set_state(model, params)
    model.eval()
    return model


@functools.cache
def nano_model(dtype="float32"):
    return golden_model("nano", jnp.dtype(dtype))


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
        model = nano_model(dtype)
        logits = forward(model, jnp.asarray(images, dtype))
        for head, got in zip(("decode", "aux"), logits, strict=True):
            expected = golden[f"{size}_{head}{suffix}"]
            got = np.asarray(got).transpose(0, 3, 1, 2)
            assert got.dtype == dtype
            assert relative(got, expected) < bound
            if dtype == "float64":
                np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["micro", "tiny", "small"])
def test_variants_match_golden(variant):
    golden = np.load(GOLDEN / f"upernet_{variant}.npz")
    images = synthetic_images((1, 3, 128, 160)).transpose(0, 2, 3, 1)
    decode, aux = forward(golden_model(variant), images)
    decode = np.asarray(decode).transpose(0, 3, 1, 2)[:, ::5, ::2, ::2]
    aux = np.asarray(aux).transpose(0, 3, 1, 2)[:, ::5]
    assert relative(decode, golden["128x160_decode"]) < 1e-5
    assert relative(aux, golden["128x160_aux"]) < 1e-5


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 7), (5, 5), (7, 25), (33, 131), (13, 4)])
def test_bilinear_matrix_matches_pytorch(inputs, outputs):
    x = np.random.default_rng(0).standard_normal((1, 1, inputs, 3))
    expected = torch.nn.functional.interpolate(
        torch.tensor(x), size=(outputs, 3), mode="bilinear", align_corners=False
    )
    got = upernet.bilinear_matrix(inputs, outputs) @ x[0, 0]
    np.testing.assert_allclose(got, expected[0, 0].numpy(), atol=1e-12)


def test_bilinear_matrix_of_a_traced_size_repeats_the_last_row():
    whole = upernet.bilinear_matrix(9, 30)
    traced = jax.jit(lambda size: upernet.bilinear_matrix(9, size, 40))(jnp.int32(30))
    np.testing.assert_allclose(traced[:30], whole, atol=1e-5)
    np.testing.assert_allclose(traced[30:], np.tile(whole[-1], (10, 1)), atol=1e-5)


@pytest.mark.parametrize("size", [(4, 5), (6, 12), (3, 17), (1, 1)])
@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_adaptive_average_pool_matches_pytorch(size, cells):
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(x).permute(0, 3, 1, 2), cells)
    got = upernet.adaptive_average_pool(jnp.asarray(x), cells)
    np.testing.assert_allclose(got, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_logits_have_the_images_size():
    graphdef, state = nnx.split(nano_model())
    images = jnp.asarray(synthetic_images((1, 3, 45, 70)).transpose(0, 2, 3, 1))

    @jax.jit
    def both(state, images):
        model = nnx.merge(graphdef, state)
        return model(images)[0], model.logits(images)

    decode, got = both(state, images)
    assert decode.shape == (1, 12, 18, 11)
    expected = torch.nn.functional.interpolate(
        torch.tensor(np.asarray(decode)).permute(0, 3, 1, 2), size=(45, 70), mode="bilinear"
    )
    np.testing.assert_allclose(got, expected.permute(0, 2, 3, 1).numpy(), rtol=1e-3, atol=1e-4)


def test_half_precision_keeps_parameters_and_logits_in_float32():
    model = nano_model("bfloat16")
    assert model.decode_head.classifier.kernel[...].dtype == jnp.float32
    images = jnp.asarray(synthetic_images((1, 3, 64, 96)).transpose(0, 2, 3, 1))
    decode, aux = forward(model, images)
    assert decode.dtype == aux.dtype == jnp.float32
    golden = np.load(GOLDEN / "upernet_nano.npz")
    # Some 40 layers, each rounding to 2**-9 relative.
    assert relative(np.asarray(decode).transpose(0, 3, 1, 2), golden["64x96_decode"]) < 0.05


@pytest.mark.slow
def test_every_parameter_gets_a_gradient_in_training():
    model = upernet.UperNet(upernet.UperNetConfig.nano(), rngs=nnx.Rngs(0))
    model.train()
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    images = jnp.asarray(synthetic_images((2, 3, 64, 96)).transpose(0, 2, 3, 1))

    @jax.jit
    @jax.grad
    def gradient(params):
        model = nnx.merge(graphdef, params, stats, copy=True)
        decode, aux = model(images, nnx.Rngs(dropout=0))
        return jnp.square(decode).mean() + jnp.square(aux).mean()

    for path, value in nnx.to_flat_state(gradient(params)):
        assert np.isfinite(value[...]).all(), path
        assert np.any(value[...] != 0), path
