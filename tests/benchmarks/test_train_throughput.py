"""The comparison of training steps, where there is something to compare with."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("task", "needs"), [("detection", ("mmdet", "torchvision")), ("segmentation", ("mmseg",))]
)
def test_a_small_step(tmp_path, task, needs):
    for name in needs:
        pytest.importorskip(name)
    command = [sys.executable, "-m", "benchmarks.train_throughput", f"--task={task}"]
    command += ["--image-size=64", "--rounds=1", "--seconds=0", f"--json={tmp_path / 'a.json'}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr  # it has compared sizes and losses itself
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 2
    assert all(row["images/s"] > 0 for row in rows)
