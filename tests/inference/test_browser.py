"""The programs of docs/deploy/ on one picture: in a browser, and compiled as C++.

They need what no package of this project installs, and are skipped without it:
ONNXRUNTIME_WEB is the folder `dist` of the npm package onnxruntime-web, for a `chromium` that is
found; ONNXRUNTIME the folder of a release of onnxruntime's C++ library, with include/ and lib/.
"""

import html
import json
import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

import vssd_jax
from tests.browser import dump_dom, find, served
from tests.conftest import ROOT
from tests.inference.test_export_onnx import NAMES, PREPROCESSING, SMALL, save
from vssd_jax.inference.export_onnx import export_onnx

PROGRAMS = ROOT / "docs/deploy"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with model.onnx, about.json and a picture; and the predictor's result."""
    for package in ("jax2onnx", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("exported")
    weights = save(folder / "weights", "vssd_nano", PREPROCESSING, **SMALL)
    path = export_onnx(weights, folder / "model.onnx")
    import onnxruntime

    about = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    fields = {key: json.loads(about[key]) for key in ("classes", "preprocessing")}
    (folder / "about.json").write_text(json.dumps(fields))
    rng = np.random.default_rng(4)
    pixels = np.kron(rng.integers(0, 255, (9, 7, 3)), np.ones((9, 9, 1))).astype(np.uint8)
    for name in ("picture.png", "picture.ppm"):
        Image.fromarray(pixels).save(folder / name)
    return folder, vssd_jax.load_predictor(weights)(pixels)


def test_a_browser_finds_the_same_classes(exported, tmp_path):
    browser, runtime = find(), os.environ.get("ONNXRUNTIME_WEB")
    if not runtime:
        pytest.skip("needs ONNXRUNTIME_WEB, the dist folder of onnxruntime-web")
    folder, expected = exported
    site = tmp_path / "site"
    site.mkdir()
    for name in ("model.onnx", "about.json", "picture.png"):
        shutil.copy(folder / name, site)
    for name in ("index.html", "classify.mjs"):
        shutil.copy(PROGRAMS / name, site)
    (site / "ort").symlink_to(pathlib.Path(runtime).resolve())
    with served(site) as address:
        done = dump_dom(browser, f"{address}/index.html", tmp_path / "profile")
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    text = html.unescape(found[1])
    assert text.startswith("[["), text
    result = json.loads(text)
    assert [name for name, _ in result] == expected.names
    np.testing.assert_allclose([score for _, score in result], expected.scores, rtol=0.01)


def test_a_program_in_cpp_finds_the_same_classes(exported, tmp_path):
    compiler, runtime = shutil.which("g++"), os.environ.get("ONNXRUNTIME")
    if not compiler or not runtime:
        pytest.skip("needs g++, and ONNXRUNTIME, the folder of a release of onnxruntime")
    folder, expected = exported
    program = tmp_path / "classify"
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", PROGRAMS / "classify.cpp",
         "-o", program, f"-I{runtime}/include", f"-L{runtime}/lib", "-lonnxruntime",
         f"-Wl,-rpath,{runtime}/lib"],
        check=True,
    )  # fmt: skip
    fields = [str(PREPROCESSING[key]) for key in ("image_size", "eval_crop")]
    command = [program, folder / "model.onnx", folder / "picture.ppm", *fields]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    first, *lines = done.stdout.splitlines()
    assert first == f"classes: {json.dumps(NAMES, ensure_ascii=False)}"
    labels, scores = zip(*(line.split() for line in lines), strict=True)
    assert list(map(int, labels)) == expected.labels
    np.testing.assert_allclose(np.array(scores, float), expected.scores, rtol=0.01)
    missing = subprocess.run([program, *command[1:2], "none.ppm", *fields], capture_output=True)
    assert missing.returncode == 1
    assert b"no binary PPM" in missing.stderr
