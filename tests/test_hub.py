"""The command `python -m vssd_jax.hub`; what it does is tested in tests/weights/test_publish.py."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the command is 'push'; see --help"),
        (["pull", "--weights=w"], "the command is 'push', not 'pull'; see --help"),
        (["push", "--repo=a/b"], "--weights and --repo are needed"),
        (["push", "--weights=w", "--repo=a/b", "now"], "unexpected argument 'now'"),
        (["push", "--licence=mit"], "Did you mean: license"),
        (["push", "--weights=w", "--repo=ab"], "--repo=ab: write owner/name"),
    ],
)
def test_one_clear_line_and_status_2(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "vssd_jax.hub", *arguments],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert message in done.stderr
    assert done.stderr.startswith("hub.py: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2
    assert done.stdout == ""
