"""The command `python -m vssd_jax.look`; what it does is tested in tests/inference/test_look.py."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights=w", "--input=i"], "--weights, --input and --output are needed"),
        (["--wieghts=w"], "Did you mean: weights"),
        (["--weights=w", "--input=i", "--output=o", "--token=3"], "--token=3 must be X,Y"),
        (["--weights=w", "--input=i", "--output=o", "--stage=last"], "last"),
        (["--weights=w", "--input=nowhere", "--output=o"], "there is no file or folder nowhere"),
        (["--weights=w", "--input=README.md", "--output=o", "--what=maps"], "unknown kind"),
    ],
)
def test_one_clear_line_and_status_2(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "vssd_jax.look", *arguments],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert message in done.stderr
    assert done.stderr.startswith("look.py: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2
    assert done.stdout == ""
