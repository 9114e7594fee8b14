"""ONNX files against this project's own outputs, by way of onnxruntime."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import vssd_jax
from vssd_jax import UserError
from vssd_jax.inference.export_onnx import export_onnx
from vssd_jax.models import family
from vssd_jax.models.split import SplitModel
from vssd_jax.weights.folder import Weights, write_folder
from vssd_jax.weights.load import load

NAMES = ["ant", "bee", "дом"]
SMALL = {
    "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "d_state": 4,
    "mixers": ("ncssd", "attention", "attention", "attention"),
}  # fmt: skip
PREPROCESSING = {"image_size": 32, "eval_crop": 0.9}


@pytest.fixture(scope="module")
def onnxruntime():
    """onnxruntime, where jax2onnx is installed too."""
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnx")
    return pytest.importorskip("onnxruntime")


def save(folder, model, preprocessing, **overrides):
    """Fresh weights; scales, shifts and statistics that are not 1 and 0."""

    def build(rngs):
        return family.build(model, num_classes=3, rngs=rngs, **overrides)

    rng = np.random.default_rng(2)
    params, statistics = SplitModel(build).init(jax.random.key(1))
    arrays = {name: np.asarray(value) for name, value in {**params, **statistics}.items()}
    arrays = {
        name: value + rng.uniform(0, 0.5, value.shape).astype(np.float32)
        if value.ndim == 1
        else value
        for name, value in arrays.items()
    }
    write_folder(folder, Weights(model, 3, overrides, arrays, NAMES, preprocessing))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "weights"
    return save(folder, "vssd_nano", PREPROCESSING, **SMALL)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector") / "weights"
    shapes = {"padded_shapes": [[64, 96]], "short_sides": [64], "long_side": 96}
    return save(folder, "mask_rcnn_vssd_nano", shapes, **SMALL, fpn_channels=8, box_channels=16)


def module(folder):
    """The model of a weights folder."""
    weights = load(folder)

    def build(rngs):
        return family.build(
            weights.model, num_classes=weights.num_classes, rngs=rngs, **weights.overrides
        )

    split = SplitModel(build)
    return split.merge({name: jnp.asarray(x) for name, x in weights.params.items()}, training=False)


def outputs(onnxruntime, path, inputs):
    session = onnxruntime.InferenceSession(str(path))
    (entry,) = session.get_inputs()
    assert entry.shape[0] == "batch"
    assert all(output.shape[0] == "batch" for output in session.get_outputs())
    return dict(
        zip((o.name for o in session.get_outputs()), session.run(None, {entry.name: inputs}),
            strict=True)
    )  # fmt: skip


def call(model, function, inputs):
    """In one compiled program."""
    graph, state = nnx.split(model)
    return jax.jit(lambda state, x: function(nnx.merge(graph, state), x))(state, inputs)


def assert_close(found, expected, tolerance=1e-5):
    """Differences as a part of the greatest value."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def normal(*shape):
    return np.random.default_rng(5).standard_normal(shape, np.float32)


def test_a_picture_has_the_probabilities_of_the_predictor(onnxruntime, classifier, tmp_path):
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 255, (7, 9, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    before = vssd_jax.load_predictor(classifier)(picture)
    path = export_onnx(classifier, tmp_path / "model.onnx")

    # As in docs/deploy_onnx.md, with what the file itself says.
    session = onnxruntime.InferenceSession(str(path))
    about = session.get_modelmeta().custom_metadata_map
    assert (about["model"], about["task"], about["part"]) == (
        "vssd_nano", "classification", "model",
    )  # fmt: skip
    classes, fields = json.loads(about["classes"]), json.loads(about["preprocessing"])
    assert classes == NAMES
    size, crop = fields["image_size"], fields["eval_crop"]
    image = Image.fromarray(picture)
    shorter = math.floor(size / crop)
    sides = [shorter * side // min(image.size) for side in image.size]
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    images = ((pixels - fields["mean"]) / fields["std"]).astype(np.float32)[None]
    (logits,) = session.run(["logits"], {"images": images})
    probabilities = np.exp(logits[0] - logits[0].max())
    np.testing.assert_allclose(
        probabilities / probabilities.sum(), before.probabilities, rtol=1e-4
    )

    # The converter replaces functions of JAX for a while; nothing of it stays.
    after = vssd_jax.load_predictor(classifier)(picture)
    np.testing.assert_array_equal(after.probabilities, before.probabilities)


def test_features_of_a_classifier_of_any_size(onnxruntime, classifier, tmp_path):
    path = export_onnx(classifier, tmp_path / "f.onnx", part="features", size=(37, 50))
    x = normal(2, 37, 50, 3)
    found = outputs(onnxruntime, path, x)
    expected = call(module(classifier), lambda m, x: m.feature_maps(x), x)
    assert list(found) == ["features_4", "features_8", "features_16", "features_32"]
    for ours, theirs in zip(expected, found.values(), strict=True):
        assert_close(theirs, ours)


@pytest.mark.parametrize("size", [64, 50])
def test_logits_of_a_segmentor(onnxruntime, tmp_path, size):
    fields = {"short_side": size}
    folder = save(
        tmp_path / "weights", "upernet_vssd_nano", fields, **SMALL, channels=8, aux_channels=5
    )
    path = export_onnx(folder, tmp_path / "model.onnx")
    x = normal(2, size, size, 3)
    found = outputs(onnxruntime, path, x)
    assert_close(found["logits"], call(module(folder), lambda m, x: m(x)[0], x))
    import onnx

    # The auxiliary head, the only one of a width of 5, is left out.
    assert not any(5 in tensor.dims for tensor in onnx.load(path).graph.initializer)


def test_parts_of_a_detector(onnxruntime, detector, tmp_path):
    model = module(detector)
    path = export_onnx(detector, tmp_path / "features.onnx", part="features")
    x = normal(2, 64, 96, 3)
    found = outputs(onnxruntime, path, x)

    def dense(m, x):
        maps = m.feature_maps(x)
        return maps, [m.rpn_head(x) for x in maps]

    maps, heads = call(model, dense, x)
    for stride, ours, (logits, deltas) in zip(model.strides, maps, heads, strict=True):
        assert_close(found[f"features_{stride}"], ours)
        assert_close(found[f"rpn_logits_{stride}"], logits)
        assert_close(found[f"rpn_deltas_{stride}"], deltas)

    path = export_onnx(detector, tmp_path / "box.onnx", part="box_head")
    regions = normal(5, 7, 7, 8)
    found = outputs(onnxruntime, path, regions)
    logits, deltas = call(model, lambda m, x: m.box_head(x), regions)
    assert_close(found["logits"], logits)
    assert_close(found["deltas"], deltas)

    path = export_onnx(detector, tmp_path / "mask.onnx", part="mask_head")
    regions = normal(5, 14, 14, 8)
    found = outputs(onnxruntime, path, regions)
    assert_close(found["masks"], call(model, lambda m, x: m.mask_head(x), regions))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_16_bits(onnxruntime, classifier, tmp_path, dtype):
    path = export_onnx(classifier, tmp_path / f"{dtype}.onnx", dtype=dtype)
    x = normal(2, 32, 32, 3)
    found = outputs(onnxruntime, path, x)["logits"]
    exact = call(module(classifier), lambda m, x: m(x), x)
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert 1e-6 < error < (2e-3 if dtype == "float16" else 1e-2)
    import onnx

    kinds = {t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) == 4}
    assert onnx.TensorProto.DataType.Value(dtype.upper()) in kinds


def test_other_mixers_and_stems(onnxruntime, tmp_path):
    options = SMALL | {
        "mixers": ("ncssd", "ncssd", "ncssd", "attention"), "num_heads": (2, 2, 2, 2),
        "ngroups": 2, "stem": "patch", "downsample": "patch", "token_weight_sign": -1,
    }  # fmt: skip
    folder = save(tmp_path / "weights", "vssd_nano", PREPROCESSING, **options)
    path = export_onnx(folder, tmp_path / "model.onnx")
    x = normal(2, 32, 32, 3)
    found = outputs(onnxruntime, path, x)["logits"]
    assert_close(found, call(module(folder), lambda m, x: m(x), x))


def test_what_cannot_be_exported(onnxruntime, classifier, detector, tmp_path):
    output = tmp_path / "model.onnx"
    for folder, options, message in (
        (detector, {}, "cannot be one ONNX file.* features, box_head, mask_head"),
        (detector, {"part": "mask"}, "no part 'mask'; did you mean 'mask_head'"),
        (classifier, {"part": "box_head"}, "no part 'box_head'"),
        (classifier, {"dtype": "float8"}, "dtype='float8' is not supported; did you mean 'float"),
        (classifier, {"size": 0}, "size=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            export_onnx(folder, output, **options)
    weights = load(classifier)
    large = dict(weights.params)
    large["head.kernel"] = np.full_like(large["head.kernel"], 1e6)
    write_folder(tmp_path / "large", Weights("vssd_nano", 3, weights.overrides, large))
    with pytest.raises(UserError, match=r"head\.kernel has values too great for float16"):
        export_onnx(tmp_path / "large", output, dtype="float16")
    headless = {n: x for n, x in weights.params.items() if not n.startswith("head.")}
    write_folder(tmp_path / "headless", Weights("vssd_nano", 0, weights.overrides, headless))
    with pytest.raises(UserError, match="no head in these weights: export part='features'"):
        export_onnx(tmp_path / "headless", output)
    assert not output.exists()


def test_an_existing_file_stays(classifier, tmp_path):
    output = tmp_path / "model.onnx"
    output.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"model\.onnx exists already"):
        export_onnx(classifier, output)
    assert output.read_bytes() == b"mine"


def test_missing_packages_are_named(classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install 'vssd_jax\[onnx\]'"):
        export_onnx(classifier, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vssd_nano", "vssd_tiny"])
def test_real_sizes(onnxruntime, tmp_path, model):
    folder = save(tmp_path / "weights", model, {})
    path = export_onnx(folder, tmp_path / "model.onnx")
    ours = module(folder)
    for batch in (1, 3):
        x = normal(batch, 224, 224, 3)
        assert_close(
            outputs(onnxruntime, path, x)["logits"], call(ours, lambda m, x: m(x), x)
        )
