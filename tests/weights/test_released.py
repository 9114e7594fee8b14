import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.weights.classifier_nano import NANO
from tests.weights.loopback_hub import serve
from vssd_jax import UserError, create_model, list_models
from vssd_jax.models import family
from vssd_jax.weights.released import RELEASED, TRAINING_DATA, address, tags

PAIRS = [(name, tag) for name, files in RELEASED.items() for tag in files]


def test_the_table_fits_the_models():
    assert RELEASED.keys() <= set(list_models())
    for name, files in RELEASED.items():
        known = {tag: data for tag, data in TRAINING_DATA.items() if tag in files}
        assert list(known) == list(files)
        variant = family.find(name)[1]
        assert all(variant in file.split(".")[0].split("_") for file in files.values())


def test_the_default_and_the_tags():
    assert address("vssd_tiny").endswith("/vssd_tiny_best_ema.pth")
    assert address("vssd_tiny", "mesa").endswith("/vssd_tiny_e300_with_mesa.pth")
    assert address("mask_rcnn_vssd_tiny").endswith("/mask_rcnn_vssd_fpn_coco_tiny.pth")
    assert tags(address("mask_rcnn_vssd_tiny", "3x")) == ["3x"]
    assert tags(address("mask_rcnn_vssd_small")) == ["1x", "3x"]
    assert tags("vssd_nano.pth") == []


def test_one_file_for_both_schedules_is_said(capsys):
    assert address("mask_rcnn_vssd_small", "1x") == address("mask_rcnn_vssd_small", "3x")
    out = capsys.readouterr().out
    assert out.count("links this one file for 1x and 3x") == 2
    address("mask_rcnn_vssd_tiny", "3x")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vssd_nano", {"pretrained": True}, "vssd_nano has no released weights; vssd_micro, vssd_"),
        ("upernet_vssd_small", {"pretrained": True}, "upernet_vssd_micro, upernet_vssd_tiny have"),
        ("vssd_micro", {"pretrained": "mesa"}, "no released weights 'mesa', only 'imagenet'"),
        ("vssd_tiny", {"pretrained": "3x"}, "weights '3x', only 'imagenet' and 'mesa'"),
        ("vssd_tiny", {"pretrained": 1}, "no released weights 1, only"),
        ("vssd_tini", {"pretrained": True}, "did you mean 'vssd_tiny'"),
        ("vssd_tiny", {"pretrained": True, "weights": "x"}, "weights or pretrained, not both"),
    ],
)
def test_user_errors(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        create_model(name, **options)
    assert "\n" not in str(error.value)


# The released files are large: the hub has none of them, but one that holds the nano classifier.
CREATE = """
import dataclasses, sys
from vssd_jax import UserError, create_model
from vssd_jax.models.vssd import VSSDConfig
nano = dataclasses.asdict(VSSDConfig.nano())
print(create_model("vssd_micro", pretrained=True, **nano).num_classes)
for pair in sys.argv[1:]:
    try:
        create_model(pair.split(",")[0], pretrained=pair.split(",")[1])
    except UserError as error:
        print(error)
"""


def test_each_file_is_asked_for_by_its_name(tmp_path):
    with serve() as hub:
        hub.commit("YuhengSSS/VSSD", {"vssd_micro_best.pth": NANO.read_bytes()})
        done = subprocess.run(
            [sys.executable, "-c", CREATE, *(",".join(pair) for pair in PAIRS[1:])],
            cwd=ROOT, env=hub.environment(tmp_path), capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "links this one file" not in line]
    assert lines[0] == "10"
    for (name, tag), line in zip(PAIRS[1:], lines[1:], strict=True):
        assert f"/{RELEASED[name][tag]} cannot be downloaded: YuhengSSS/VSSD has no such" in line
    for name, tag in PAIRS:
        assert ("HEAD", f"/YuhengSSS/VSSD/resolve/main/{RELEASED[name][tag]}") in hub.requests
