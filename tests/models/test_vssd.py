"""The model against the outputs of the authors' code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden_model import (
    ABLATIONS,
    GOLDEN,
    ablation_config,
    golden_images,
    golden_model,
    relative_error,
    run,
)
from vssd_jax.models.layers import DropPath, Precision, round_kernels
from vssd_jax.models.vssd import VSSD, Stage, VSSDConfig

SLOW = pytest.mark.slow  # built of the same blocks as the others
VARIANTS = ("micro", "tiny", pytest.param("small", marks=SLOW), pytest.param("base", marks=SLOW))


def test_nano_logits_in_float64(x64):
    model = golden_model(VSSDConfig.nano(), "classification_nano", num_classes=10, dtype="float64")
    logits = run(model, golden_images((2, 3, 64, 64), dtype=np.float64))
    expected = np.load(GOLDEN / "classification_nano.npz")["logits_f64"]
    assert relative_error(logits, expected) < 1e-12


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_logits_in_float64(name, x64):
    model = golden_model(ablation_config(name), f"nano_{name}", num_classes=10, dtype="float64")
    logits = run(model, golden_images((2, 3, 64, 64), dtype=np.float64))
    expected = np.load(GOLDEN / f"ablation_nano_{name}.npz")["logits_f64"]
    assert relative_error(logits, expected) < 1e-12


@pytest.mark.parametrize("size", [(64, 96), (97, 131)])
def test_backbone_maps_in_float64(size, x64):
    model = golden_model(VSSDConfig.nano(), "backbone_nano", num_classes=None, dtype="float64")
    images = golden_images((1, 3, *size), dtype=np.float64)
    maps = nnx.jit(lambda model, images: model.feature_maps(images))(model, images)
    golden = np.load(GOLDEN / "backbone_nano.npz")
    for index, actual in enumerate(maps):
        expected = golden[f"{size[0]}x{size[1]}_out{index}"].transpose(0, 2, 3, 1)
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) < 1e-12


@functools.cache
def square_logits(variant, dtype):
    config = getattr(VSSDConfig, variant)()
    model = golden_model(config, f"classification_{variant}", num_classes=1000, dtype=dtype)
    return run(model, golden_images((2, 3, 224, 224)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_logits_in_float32(variant):
    golden = np.load(GOLDEN / f"classification_{variant}.npz")
    logits = square_logits(variant, "float32")
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits, golden["logits_f64"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", ["nano", "micro", "tiny", pytest.param("small", marks=SLOW)])
def test_rectangular_logits_in_float32(variant):
    config = getattr(VSSDConfig, variant)()
    inventory = f"classification_{variant}"
    classes, size = (10, (96, 160)) if variant == "nano" else (1000, (256, 320))
    model = golden_model(config, inventory, num_classes=classes, dtype="float32")
    logits = run(model, golden_images((1, 3, *size), salt=1))
    expected = np.load(GOLDEN / f"{inventory}.npz")["logits_rect"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_bfloat16_is_near_float32():
    exact, rounded = (square_logits("tiny", dtype) for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == np.float32
    assert np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.02


def test_state_is_float32_whatever_the_dtype():
    model = nnx.eval_shape(
        lambda: VSSD(VSSDConfig.nano(), num_classes=10, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    leaves = jax.tree.leaves(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    assert leaves
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


@pytest.mark.parametrize("mixer", ["ncssd", "ssd", "attention"])
def test_kernels_rounded_beforehand_change_nothing(mixer):
    config = dataclasses.replace(VSSDConfig.nano(), depths=(1, 0, 0, 1), mixers=(mixer,) * 4)
    model = VSSD(config, num_classes=3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model.eval()
    images = eager_images()
    expected = model(images)
    round_kernels(model)
    kernels = [model.stages[0].blocks[0].mlp.fc1.kernel, model.stages[3].blocks[0].mlp.fc2.kernel]
    assert {kernel[...].dtype for kernel in kernels} == {jnp.dtype("bfloat16")}
    assert model.head.kernel[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(model(images), expected)


def test_the_graph_is_hashable():
    """As a static argument of `jax.jit` must be."""
    def graph(seed):
        return nnx.graphdef(nnx.eval_shape(lambda: VSSD(VSSDConfig.nano(), rngs=nnx.Rngs(seed))))

    assert hash(graph(0)) == hash(graph(1))


def test_remat_changes_no_gradient(x64):
    images = golden_images((2, 3, 8, 8), dtype=np.float64)
    x = jnp.asarray(np.repeat(images, 6, axis=-1)[..., :16])

    def gradient(remat):
        options = {"precision": Precision(jnp.float64), "implementation": None, "rngs": nnx.Rngs(0)}
        config = dataclasses.replace(VSSDConfig.nano(), depths=(1, 1, 1, 2))
        stage = Stage(config, 3, remat=remat, **options)
        graph, params, rest = nnx.split(stage, nnx.Param, ...)

        def loss(params, x):
            merged = nnx.merge(graph, params, rest, copy=True)
            scales = DropPath([0.1, 0.2])(len(x), nnx.Rngs(dropout=1))
            return jnp.square(merged(jnp.tile(x, 8), scales)).sum()

        lowered = jax.jit(jax.grad(loss)).lower(params, x)
        return lowered.compile()(params, x), lowered.as_text().count("dot_general")

    (plain, products), (rematerialised, remat_products) = gradient(False), gradient(True)
    assert remat_products > products  # the forward pass again
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rematerialised), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_drop_path_rises_linearly():
    model = nnx.eval_shape(lambda: VSSD(VSSDConfig.tiny(), num_classes=10, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(model.drop_path.rates, np.linspace(0, 0.2, 18))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 2)}, "depths"),
        ({"mixers": ("ncssd", "ncssd", "ncssd", "mamba")}, "mamba"),
        ({"stem": "big"}, "stem"),
        ({"token_weight_sign": 0}, "token_weight_sign"),
        ({"ngroups": 3}, "groups"),
        ({"num_heads": (3, 4, 8, 16)}, "heads"),
    ],
)
def test_impossible_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VSSDConfig(**options)


def test_images_of_a_wrong_shape_are_refused():
    model = nnx.eval_shape(lambda: VSSD(VSSDConfig.nano(), num_classes=10, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="images"):
        model(jnp.zeros((1, 3, 32, 32)))


# Without jit: the operations are programs of their own, the model is not


def eager_model(**options):
    config = VSSDConfig(
        embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), d_state=4, drop_path=0.5,
        mixers=("ncssd", "ssd", "ncssd", "attention"),
    )  # fmt: skip
    return VSSD(config, num_classes=3, rngs=nnx.Rngs(0), **options)


def eager_images(batch=2):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((batch, 32, 32, 3)), jnp.float32)


class Doubling(nnx.Module):
    def __call__(self, x, norm, branch_scale):
        return 2 * x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_call_without_jit(dtype):
    model, images = eager_model(dtype=dtype), eager_images()
    model.eval()
    compiled = nnx.jit(lambda model, images: model(images))
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(model(images), compiled(model, images), atol=tolerance)
    # What the user changes counts at once.
    model.head.bias[...] += 1
    model.stages[0].blocks[0].mlp = Doubling()
    np.testing.assert_allclose(model(images), compiled(model, images), atol=tolerance)


def test_training_without_jit():
    """Statistics, drop path and the state of the random numbers are those with jit."""
    results = []
    for transform in (lambda f: f, nnx.jit):
        model, rngs = eager_model(), nnx.Rngs(dropout=7)
        call = transform(lambda model, rngs, images: model(images, rngs))
        logits = [call(model, rngs, eager_images()) for _ in range(2)]
        assert int(rngs.dropout.count[...]) == 2  # one draw for all blocks
        results.append((logits, nnx.state(model, nnx.BatchStat)))
    assert not np.allclose(*results[0][0])  # other samples are dropped
    for eager, compiled in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(eager, compiled, rtol=1e-4, atol=1e-5)


def test_gradients_and_vmap_without_jit():
    """Of a part: operation by operation the whole model takes minutes to compile."""

    def loss(stem, images):
        return jnp.square(stem(images)).sum()

    results = []
    for transform in (lambda f: f, nnx.jit):
        stem = eager_model().stem
        gradients = transform(lambda stem, images: nnx.grad(loss)(stem, images))(
            stem, eager_images()
        )
        results.append((gradients, nnx.state(stem, nnx.BatchStat)))
        assert np.abs(stem.conv1.norm.mean[...]).max() > 0
    for eager, compiled in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(eager, compiled, rtol=1e-3, atol=1e-3)
    stem.eval()
    mapped = jax.vmap(lambda image: stem(image[None])[0])(eager_images())
    np.testing.assert_allclose(mapped, stem(eager_images()), rtol=1e-5, atol=1e-5)
