"""Exported models against `jax.jit`, in a process that has JAX alone."""

import json
import os
import re
import subprocess
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

import vssd_jax
from tests.conftest import AS_USERS, ROOT, UNOPTIMIZED
from vssd_jax import UserError
from vssd_jax.data.normalization import normalize
from vssd_jax.inference.export import export_stablehlo, make_program, parse_size
from vssd_jax.weights.folder import Weights, write_folder
from vssd_jax.weights.load import load
from vssd_jax.weights.state import get_state

# What compiles fast, with every kind of mixer that takes any size.
SMALL = {
    "embed_dim": 8, "depths": (1, 0, 0, 1), "num_heads": (1, 1, 2, 2), "d_state": 4,
}  # fmt: skip
DETECTOR = SMALL | {
    "stem": "patch", "downsample": "patch", "fpn_channels": 8, "box_channels": 16,
    "rpn_pre_nms": 40, "rpn_proposals": 20, "max_detections": 10,
}  # fmt: skip
NAMES = ["ant", "bee", "дом"]


def lines():
    """Those of the documentation, which read a file and run it."""
    text = (ROOT / "docs/deploy.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    docstring = (ROOT / "vssd_jax/inference/export.py").read_text()
    assert all(line in docstring for line in found.splitlines())
    return found


def run_alone(folder, file, cases, flags):
    """Outputs for each of `cases`, lists of inputs, by the documented lines with JAX alone."""
    for number, inputs in enumerate(cases):
        np.savez(folder / f"in{number}.npz", *inputs)
    *read, call = lines().splitlines()
    assert call == 'logits = model(images)["logits"]'
    program = (
        "import sys\n"
        "for name in ('vssd_jax', 'flax', 'optax', 'orbax', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import numpy\n"
        + "\n".join(read).replace('"vssd_tiny.zip"', "sys.argv[2]")
        + "\nfor number in range(int(sys.argv[3])):\n"
        "    inputs = numpy.load(f'{sys.argv[1]}/in{number}.npz').values()\n"
        "    outputs = model(*inputs)\n"
        "    assert [o['name'] for o in config['outputs']] == list(outputs)\n"
        "    for o in config['outputs']:\n"
        "        assert o['dtype'] == outputs[o['name']].dtype\n"
        "    numpy.savez(f'{sys.argv[1]}/out{number}.npz', **outputs)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder, file, str(len(cases))],
        cwd=folder, text=True, capture_output=True, env=os.environ | flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [dict(np.load(folder / f"out{number}.npz")) for number in range(len(cases))]


def write(folder, model, num_classes, options, preprocessing=None):
    built = vssd_jax.create_model(model, num_classes=num_classes, seed=3, **options)
    names = NAMES if num_classes == len(NAMES) else None
    given = Weights(
        model, num_classes, options, get_state(built), names, preprocessing or {},
        {"source": "fresh"},
    )  # fmt: skip
    write_folder(folder, given)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write(tmp_path_factory.mktemp("classifier") / "weights", "vssd_nano", 3, SMALL)


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentor") / "weights"
    patches = {"stem": "patch", "downsample": "patch"}
    options = SMALL | patches | {"channels": 8, "aux_channels": 8}
    return write(folder, "upernet_vssd_nano", 3, options, {"short_side": 40})


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector") / "weights"
    shapes = {"padded_shapes": [[64, 96], [96, 64]]}
    return write(folder, "mask_rcnn_vssd_nano", 3, DETECTOR, shapes)


def images(count, height, width):
    return np.random.default_rng(count).normal(size=(count, height, width, 3)).astype(np.float32)


def assert_equal_to_jit(folder, weights, file, cases, *, emitters=False, **options):
    """Compares bit for bit; returns the outputs of the last case.

    Without `emitters` XLA compiles both as in the other tests.
    """
    program = make_program(load(weights), **options)
    compiler = AS_USERS if emitters else None
    jitted = jax.jit(program.function, compiler_options=compiler)
    found = run_alone(folder, file, cases, {"XLA_FLAGS": UNOPTIMIZED} if emitters else {})
    for inputs, outputs in zip(cases, found, strict=True):
        expected = jax.device_get(jitted(*inputs))
        assert outputs.keys() == expected.keys()
        for name, value in expected.items():
            assert outputs[name].tobytes() == value.tobytes(), name
    return outputs


def test_a_classifier_is_jit_bit_for_bit(classifier, tmp_path):
    file = tmp_path / "made" / "model.zip"
    said = export_stablehlo(classifier, file)
    assert "takes images (b, h, w, 3) float32" in said
    assert "gives logits (b, 3) float32" in said
    assert list(file.parent.iterdir()) == [file]
    cases = [[images(1, 32, 32)], [images(2, 45, 38)], [images(7, 32, 32)]]
    outputs = assert_equal_to_jit(tmp_path, classifier, file, cases)
    model = vssd_jax.create_model("vssd_nano", weights=classifier, **SMALL)
    expected = jax.jit(model)(cases[-1][0])
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-5, atol=1e-6)
    with zipfile.ZipFile(file) as archive:
        config = json.loads(archive.read("config.json"))
        program = archive.read("model.stablehlo")
    assert os.fsencode(ROOT) not in program
    assert b".py" not in program
    assert (config["format"], config["format_version"]) == ("vssd_jax.stablehlo", 1)
    assert (config["model"], config["task"]) == ("vssd_nano", "classification")
    assert config["class_names"] == NAMES
    assert config["preprocessing"]["image_size"] == 224
    assert config["platforms"] == ["cpu", "cuda", "tpu"]
    assert config["versions"]["jax"] == jax.__version__
    assert config["provenance"] == {"source": "fresh"}


def test_a_segmentor_is_jit_bit_for_bit(segmentor, tmp_path):
    file = tmp_path / "model.zip"
    assert "takes images (b, 64, 64, 3) float32" in export_stablehlo(segmentor, file)
    cases = [[images(7, 64, 64)]]
    outputs = assert_equal_to_jit(tmp_path, segmentor, file, cases)
    assert outputs["logits"].shape == (7, 16, 16, 3)


def test_a_detector_is_jit_bit_for_bit(detector, tmp_path):
    """With grey levels, of which those of the padding do not count."""
    file = tmp_path / "model.zip"
    options = {"size": (64, 80), "input_dtype": "uint8"}
    said = export_stablehlo(detector, file, **options)
    assert "takes image_shapes (b, 2) int32" in said
    assert "gives masks (b, 10, 28, 28) float32" in said
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 80, 3), np.uint8)
    shapes = np.array([[64, 80], [50, 33]], np.int32)
    other = pixels.copy()
    other[1, 50:], other[1, :, 33:] = 7, 99
    cases = [[pixels, shapes], [other, shapes]]
    # In the quicker programs of other tests the last bit of some boxes differs: XLA orders sums
    # differently.
    outputs = assert_equal_to_jit(tmp_path, detector, file, cases, emitters=True, **options)
    assert outputs["valid"].any()
    assert outputs["boxes"].shape == (2, 10, 4)
    for name, value in np.load(tmp_path / "out0.npz").items():
        np.testing.assert_array_equal(outputs[name], value)


def test_feature_maps_are_jit_bit_for_bit(detector, tmp_path):
    """Of a detector's backbone in bfloat16, with grey levels as the input."""
    file = tmp_path / "features.zip"
    options = {"part": "features", "dtype": "bfloat16", "input_dtype": "uint8"}
    said = export_stablehlo(detector, file, **options)
    assert "takes images (b, h, w, 3) uint8" in said
    assert "activations bfloat16: on 2 random pictures of 224x224, the feature maps" in said
    pixels = np.random.default_rng(0).integers(0, 256, (2, 36, 52, 3), np.uint8)
    outputs = assert_equal_to_jit(tmp_path, detector, file, [[pixels]], **options)
    maps = [outputs[f"stride{stride}"] for stride in (4, 8, 16, 32)]
    assert [x.shape[1:] for x in maps] == [(9, 13, 8), (5, 7, 16), (3, 4, 32), (2, 2, 64)]
    model = vssd_jax.create_model("mask_rcnn_vssd_nano", weights=detector, **DETECTOR)
    expected = jax.jit(model.backbone.feature_maps)(normalize(pixels))
    for got, exact in zip(maps, expected, strict=True):
        error = got.view(ml_dtypes.bfloat16).astype(np.float32) - exact
        assert np.linalg.norm(error) < 0.02 * np.linalg.norm(exact)


def test_fewer_bytes(classifier, tmp_path):
    said = export_stablehlo(classifier, tmp_path / "model.zip", dtype="float16", size=(32, 32))
    assert re.search(r"logits differ by \S+e-0[456] at most.* for 3[012] of 32 pictures", said)
    params = load(classifier).params.values()
    saved = sum(2 * x.size for x in params if x.ndim > 1)
    sizes = [sum(x.nbytes for x in params) / 1e6, sum(x.nbytes for x in params) / 1e6 - saved / 1e6]
    assert f"({sizes[0]:.1f} -> {sizes[1]:.1f} MB), activations float32" in said
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        assert file.getinfo("model.stablehlo").file_size < sum(x.nbytes for x in params)


def test_causal_scans_need_a_size(tmp_path):
    options = SMALL | {"mixers": ("ssd", "attention", "attention", "attention")}
    folder = write(tmp_path / "weights", "vssd_nano", 3, options)
    with pytest.raises(UserError, match="cannot be exported for any size; give --size"):
        export_stablehlo(folder, tmp_path / "model.zip")
    assert not (tmp_path / "model.zip").exists()
    export_stablehlo(folder, tmp_path / "model.zip", size=(32, 32), platforms=["cpu"])


def test_what_cannot_be_exported_is_said(classifier, tmp_path):
    def refused(message, source=classifier, output=tmp_path / "model.zip", **options):
        with pytest.raises(UserError, match=message):
            export_stablehlo(source, output, **options)

    refused("unknown platform 'gpu'", platforms=["cpu", "gpu"])
    refused("no platform", platforms=[])
    refused("unknown part 'logits'", part="logits")
    refused("nowhere", source=tmp_path / "nowhere")
    (tmp_path / "file").touch()
    refused("exists already", output=tmp_path / "file")
    refused("cannot be written", output=tmp_path / "file/model.zip")
    given = load(classifier)
    headless = {k: v for k, v in given.params.items() if not k.startswith("head.")}
    write_folder(tmp_path / "headless", Weights("vssd_nano", 0, SMALL, headless))
    refused("has no head; --part features", source=tmp_path / "headless")
    large = dict(given.params) | {"head.kernel": np.full_like(given.params["head.kernel"], 1e6)}
    write_folder(tmp_path / "large", Weights("vssd_nano", 3, SMALL, large))
    refused(r"head\.kernel has values up to 1e\+06", source=tmp_path / "large", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "headless", "large"]
    for text in ("224", "0x3", "99999x3", "-1x3", "3x4x5"):
        with pytest.raises(UserError, match="must be HEIGHTxWIDTH"):
            parse_size(text)


def test_the_command(classifier, tmp_path):
    def run(*args):
        return subprocess.run(
            [sys.executable, "export.py", *args], cwd=ROOT, text=True, capture_output=True
        )

    given = ("--weights", classifier, "--output", tmp_path / "model.zip")
    done = run(*given, "--size=32x32", "--input=uint8", "--platforms=cpu,cuda")
    assert (done.returncode, done.stderr) == (0, "")
    assert "vssd_nano, model, for cpu, cuda ->" in done.stdout
    assert "takes images (b, 32, 32, 3) uint8" in done.stdout
    for wrong, message in (
        (given[:2], "--weights and --output are needed"),
        ((*given, "--size=32"), "--size=32 must be HEIGHTxWIDTH"),
        ((*given, "--format=onnx", "--input=uint8"), "--input is for --format stablehlo"),
    ):
        failed = run(*wrong)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1


def test_a_missing_package_is_named(classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match="needs the package flatbuffers: pip install flatbuffers"):
        export_stablehlo(classifier, tmp_path / "model.zip")


@pytest.mark.slow
def test_vssd_tiny_is_jit_bit_for_bit(tmp_path):
    weights = write(tmp_path / "weights", "vssd_tiny", 1000, {})
    file = tmp_path / "model.zip"
    export_stablehlo(weights, file)
    cases = [[images(1, 224, 224)], [images(2, 160, 256)], [images(7, 64, 96)]]
    assert_equal_to_jit(tmp_path, weights, file, cases)
