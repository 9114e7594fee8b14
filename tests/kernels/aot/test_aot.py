"""Programs compiled for GPUs without a GPU: they compile, and move no more than is recorded.

Needs the packages `jax-cuda12-plugin` and `jax-cuda12-pjrt` of the installed jax's version
(`pip install --no-deps`). The compilations run in a process of their own, so that the plugin
meets no other test.
"""

import functools
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

HERE = pathlib.Path(__file__).parent
RECORDED = json.loads((HERE / "recorded.json").read_text())
WITH = RECORDED.pop("jax")  # another version's compiler fuses otherwise
PTXAS = RECORDED.pop("ptxas")  # another release gives out registers otherwise


@functools.cache
def why_not():
    for package in ("jax-cuda12-plugin", "jax-cuda12-pjrt"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed"
        if version != jax.__version__:
            return f"{package} {version} is not jax's version {jax.__version__}"
    return None


WHOLE = ("step ", "optimizer ", "predict ")


@pytest.mark.parametrize("arch", list(RECORDED))
def test_compiled_programs(arch):
    check(arch, [program for program in RECORDED[arch] if not program.startswith(WHOLE)])


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(RECORDED))
def test_whole_steps(arch):
    check(arch, [program for program in RECORDED[arch] if program.startswith(WHOLE)])


def check(arch, programs):
    """Fewer kernels or bytes: record them. More: something has come apart.

    With another jax than they were recorded with: that they compile. With another ptxas, spills are
    printed.
    """
    if why_not() or not programs:
        pytest.skip(why_not() or "none is recorded")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(HERE / "programs.py"), arch, *programs]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = {line["program"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert set(found) == set(programs)
    for program in programs:
        line, figures = found[program], RECORDED[arch][program]
        # Attention over many tokens (without cuDNN), the targets and the upsampling of masks, and
        # resizing in UperNet transpose for their products.
        transposes = [] if re.search("mask_rcnn|upernet", program) else line["transposes"]
        assert not transposes, f"{program} transposes {transposes}"
        spilling = f"{program} spills registers: {line['spills']}"
        if line["spills"] and line["ptxas"] != PTXAS:
            print(f"{spilling} (ptxas {line['ptxas']}; recorded with {PTXAS})")
        else:
            assert not line["spills"], spilling
        if jax.__version__ != WITH:
            continue
        assert line["kernels"] <= figures["kernels"], program
        # A hundredth: rounding, and what the compiler adds for scratch.
        assert line["megabytes_per_image"] <= 1.01 * figures["megabytes_per_image"], program
        most = figures.get("temporary_megabytes", line["temporary_megabytes"])
        assert line["temporary_megabytes"] <= 1.02 * most, program
