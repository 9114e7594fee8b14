"""Each command of the pages: run as it stands, or, where what it needs is not here, its flags."""

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests import pages, test_own_pictures
from tests.conftest import ROOT
from vssd_jax.models import family
from vssd_jax.weights.folder import Weights, write_folder
from vssd_jax.weights.state import get_state

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = PROJECT["scripts"] | {
    "train.py": "vssd_jax.commands.train:run",
    "eval.py": "vssd_jax.commands.eval:run",
    "predict.py": "vssd_jax.commands.predict:run",
    "export.py": "vssd_jax.commands.export:run",
    "convert_torch_weights.py": "vssd_jax.commands.convert:run",
}
# Sections whose commands a test runs, but for those that `elsewhere` says cannot be.
WITH_WEIGHTS = (
    ("README.md", "Commands"),
    ("docs/deploy.md", "StableHLO from Python"),
    ("docs/pretrained.md", "4. Back to PyTorch"),
)
LOOKING = (("docs/looking_inside.md", ""),)
FROM_NOTHING = (
    ("docs/getting_started.md", "Train, evaluate, predict"),
    ("docs/detection.md", "On a CPU, from nothing"),
    ("docs/segmentation.md", "On a CPU, from nothing"),
)
OWN_PICTURES = tuple(
    (test_own_pictures.PAGE, heading)
    for heading in ("Classes", "Boxes and masks", "Label maps", "The report")
)
EVERY = [command for page in pages.PAGES for command in pages.commands(page)]


def elsewhere(text):
    """Why a command of the project cannot be run in a test as it stands, or None."""
    for pattern, reason in (
        (r"[ =]/(data|shared)/", "data that is not here"),
        (r"hf://YuhengSSS|finetune\.py:\w+,(micro|tiny|small|base)", "a download"),
        (r"--(distributed|coordinator)", "several machines"),
        (r"hub push .*(?<!cc-by-4\.0)$", "the hub"),
        (r"--format onnx", "packages of an extra; tests/inference/test_export_onnx.py has them"),
        (r"^(docker|srun) ", "the program that starts it"),
    ):
        if re.search(pattern, text):
            return reason
    return None


# --- Flags --------------------------------------------------------------------------------------

# Each command in a process of its own, which begins with the imports done.
FORK = """
import json, os, sys
def each(commands, parse):
    for number, argv in enumerate(json.loads(commands)):
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            sys.argv = argv
            try:
                parse()
            except SystemExit as end:
                os._exit(end.code or 0)
            except BaseException as error:
                print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
        if os.waitpid(pid, 0)[1]:
            print("not understood:", *argv, file=sys.stderr, flush=True)
"""
# The commands' own way to read flags and configs, up to what they would do.
BY_FLAGS = """
import importlib
from absl import flags
from vssd_jax import cli
module = sys.argv[1]
importlib.import_module(module)
def main():
    if "config" in flags.FLAGS:
        from vssd_jax.config import check
        check(cli.load_config())
    read.append(True)
read = []
def parse():
    try:
        cli.run(main, module, command="push" if module.endswith("hub") else None)
    finally:
        if not read and "--help" not in sys.argv:
            os._exit(3)
each(sys.argv[2], parse)
"""
BY_ARGPARSE = """
import argparse, runpy
import jax, flax.nnx
understood = argparse.ArgumentParser.parse_args
def parse_args(*given, **named):
    understood(*given, **named)
    sys.exit(0)
argparse.ArgumentParser.parse_args = parse_args
sys.path.insert(0, os.getcwd())
def parse():
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
    os._exit(3)
each(sys.argv[2], parse)
"""


def reader(words):
    """What reads a command's flags, its module and its arguments; None if it is another's."""
    if words[0] in PROJECT["scripts"]:
        return BY_FLAGS, PROJECT["scripts"][words[0]].partition(":")[0], words
    if words[0] not in ("python", ".venv/bin/python"):
        return None
    words = words[1:]
    if words[0] in SCRIPTS:
        return BY_FLAGS, SCRIPTS[words[0]].partition(":")[0], words
    if words[0] == "-m":
        words = words[1:]
    elif words[0].startswith("benchmarks/"):
        words = [words[0].removesuffix(".py").replace("/", "."), *words[1:]]
    if words[0] in ("vssd_jax.look", "vssd_jax.hub"):
        return BY_FLAGS, words[0], words
    if re.match(r"benchmarks\.|vssd_jax\.data\.prepare_imagenet$", words[0]):
        return BY_ARGPARSE, "", words
    return None


def inner(command):
    """The words of a command, without a program that only starts another one."""
    words = [re.sub(r"\$\w+", "0", word) for word in command.words]
    if words[:2] == ["docker", "run"]:
        words = words[2:]
        while words[0].startswith("-"):
            option = words.pop(0)
            if option in ("--gpus", "--user", "-v"):
                words.pop(0)
            else:
                assert option == "--rm" or option.startswith("--shm-size="), option
        image = words.pop(0)
        built = [c.text for c in pages.commands(command.page) if c.text.startswith("docker build")]
        (build,) = (text for text in built if f" -t {image} " in text)
        if "Dockerfile.cpu" in build:  # its entry point
            assert '"/vssd_jax/predict.py"' in (ROOT / "docker/Dockerfile.cpu").read_text()
            words = ["python", "predict.py", *words]
    if words[0] == "srun":
        words = words[1:]
        while words[0].startswith("--"):
            assert re.fullmatch("--kill-on-bad-exit=1", words[0]), words[0]
            words = words[1:]
    return words


def test_flags_and_configs_of_the_projects_commands():
    wanted = {}
    for command in EVERY:
        if found := reader(inner(command)):
            code, module, argv = found
            if argv[0] == "benchmarks.deploy" and not importlib.util.find_spec("onnxruntime"):
                source = (ROOT / "benchmarks/deploy.py").read_text()
                assert all(f'"{one}"' in source for one in argv[1:] if one.startswith("--"))
                continue
            if code == BY_ARGPARSE and len(argv) == 1:
                argv = [*argv, "--help"]  # named, not run: it may need arguments
            given = wanted.setdefault((code, module), [])
            if argv not in given:
                given.append(argv)
    modules = {module for _, module in wanted}
    assert {SCRIPTS[name].partition(":")[0] for name in pages.SCRIPTS} <= modules
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", FORK + code, module, json.dumps(argv)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for (code, module), argv in wanted.items()
    ]  # fmt: skip
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "".join(said)
    assert not [line for text in said for line in text.splitlines() if "understood:" in line], said


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("vssd_jax.commands.train", ["train.py", "--config=configs/tiny.py", "--config.stepz=3"]),
        ("vssd_jax.commands.train", ["train.py", "--config=configs/tiny.py", "--config.steps=0"]),
        ("vssd_jax.commands.train", ["train.py", "--config=configs/tiny.py:mega"]),
        ("vssd_jax.commands.predict", ["predict.py", "--weight=x"]),
        ("vssd_jax.hub", ["vssd_jax.hub", "pull"]),
        ("", ["benchmarks.ops", "--bach", "3"]),
    ],
)
def test_what_the_parsers_refuse(module, argv):
    code = FORK + (BY_FLAGS if module else BY_ARGPARSE)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, module, json.dumps([argv])],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "not understood:" in done.stderr


def test_fields_of_configs_that_the_pages_name():
    from configs import digits, digits_detection, digits_segmentation

    known = [one.get_config() for one in (digits, digits_detection, digits_segmentation)]
    for page in pages.PAGES:
        text = (ROOT / page).read_text()
        for field in re.findall(r"--config\.(\w+(?:\.\w+)?)", text):
            first, _, second = field.partition(".")
            assert any(first in config for config in known), f"{page}: {field}"
            if first == "mesh":
                assert second in known[0].mesh, f"{page}: {field}"


# --- Commands of other programs -----------------------------------------------------------------


def names_of(requirements):
    return {re.match(r"[\w.-]+", one)[0].lower() for one in requirements}


def check_pip(words):
    assert words.pop(0) == "install"
    extras = PROJECT["optional-dependencies"]
    known = names_of(PROJECT["dependencies"]).union(*map(names_of, extras.values()))
    for word in words:
        if word.startswith("-"):
            assert word in ("-e", "--no-deps"), word
        elif own := re.fullmatch(r"(?:\.|vssd_jax)(?:\[([\w,]+)\])?", word):
            assert set((own[1] or "train").split(",")) <= set(extras), word
        else:
            assert names_of([word]) <= known, word


def check_make(words):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words
    assert set(words) <= set(targets)


def check_pytest(words):
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    if words[0] == "-m":
        assert words[1] in [marker.partition(":")[0] for marker in options["markers"]]
        words = words[2:]
    assert all((ROOT / word).exists() for word in words)


def check_programs(words):
    """tests/kernels/aot/programs.py"""
    recorded = json.loads((ROOT / "tests/kernels/aot/recorded.json").read_text())
    if words != ["--record"]:
        assert len(words) > 1
        assert set(words[1:]) <= set(recorded[words[0]])


def check_docker(words):
    assert (words[0], words[1], words[3], words[5:]) == ("build", "-f", "-t", ["."])
    assert (ROOT / words[2]).is_file()


def check_compiler(words):
    assert [(ROOT / "docs/deploy" / word).is_file() for word in words if word.endswith(".cpp")]


def check_hub(words):
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert "hf" in {script.name for script in scripts}
    assert words == ["auth", "login"]


OTHERS = {
    ("pip",): check_pip,
    ("make",): check_make,
    ("python", "-m", "pytest"): check_pytest,
    (".venv/bin/python", "-m", "pytest"): check_pytest,
    ("python", "tests/kernels/aot/programs.py"): check_programs,
    ("docker",): check_docker,
    ("g++",): check_compiler,
    ("./classify",): lambda words: None,  # tests/inference/test_browser.py runs it
    ("hf",): check_hub,
    ("pre-commit",): lambda words: None,
    (".ci/run",): lambda words: None,
}


def test_every_other_command_is_known():
    for command in EVERY:
        words = inner(command)
        if reader(words):
            continue
        start = next((start for start in OTHERS if tuple(words[: len(start)]) == start), None)
        assert start is not None, f"{command.page}: nothing here checks: {command.text}"
        assert "/" not in words[0] or start[0] != ".ci/run" or (ROOT / words[0]).is_file()
        OTHERS[start](words[len(start) :])


def test_files_of_the_repository_that_commands_name():
    for command in EVERY:
        for word in command.words:
            if re.match(r"(configs|docs|docker|tests|benchmarks|examples)/", word):
                path = word.partition(":")[0]
                assert (ROOT / path).exists(), f"{command.page}: {path}"


# --- Runs ---------------------------------------------------------------------------------------


def test_what_can_be_run_is_run():
    executed = {
        command.text
        for page, heading in (*WITH_WEIGHTS, *LOOKING, *FROM_NOTHING, *OWN_PICTURES)
        for command in pages.commands(page, heading)
    }
    for command in EVERY:
        found = reader(inner(command))
        if found and found[0] == BY_FLAGS and not elsewhere(command.text):
            assert command.text in executed, f"{command.page}: no test runs {command.text}"


# A model of the kind, as small as it gets; of as many classes as ImageNet has.
SMALL = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "d_state": 4}


def write_weights(folder, **overrides):
    overrides = SMALL | overrides
    module = family.build("vssd_nano", num_classes=1000, rngs=nnx.Rngs(0), **overrides)
    preprocessing = {"image_size": 128, "eval_crop": 1.0}
    names = [f"class {number}" for number in range(1000)]
    write_folder(
        folder, Weights("vssd_nano", 1000, overrides, get_state(module), names, preprocessing)
    )


@pytest.fixture
def place(tmp_path):
    """A clone with weights and pictures of the names that the pages use."""
    place = pages.clone(tmp_path)
    write_weights(place / "weights/vssd_tiny")
    (place / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name in ("dog.jpg", "photos/a.jpg", "photos/b.jpg"):
        Image.fromarray(rng.integers(0, 255, (140, 150, 3), np.uint8)).save(place / name)
    return place


def run_sections(place, sections):
    """Runs what can be run of them, each command once; how many there were."""
    done = set()
    for page, heading in sections:
        for command in pages.commands(page, heading):
            if not elsewhere(command.text) and command.text not in done:
                pages.run(place, command)
                done.add(command.text)
    return len(done)


def test_commands_with_weights(place):
    assert run_sections(place, WITH_WEIGHTS) == 4
    assert (place / "predictions/contact_sheet.png").is_file()
    assert list((place / "looks").rglob("token_weights*.png"))
    assert (place / "vssd_tiny.zip").is_file()
    assert (place / "vssd_tiny.pth").is_file()


@pytest.mark.slow
def test_commands_that_look_inside(place):
    write_weights(place / "runs/causal", mixers=("ssd", "ssd", "ssd", "attention"))
    (place / "runs/nc_ssd").symlink_to(place / "weights/vssd_tiny")
    assert run_sections(place, LOOKING) == 5
    looks = {path.name for path in (place / "looks").rglob("*.png")}
    for kind in ("token_weights", "receptive_field", "grad_cam", "attention", "features"):
        assert any(name.startswith(kind) for name in looks), kind


@pytest.mark.slow
@pytest.mark.parametrize(("page", "heading"), FROM_NOTHING)
def test_commands_from_nothing(tmp_path, page, heading):
    place = pages.clone(tmp_path)
    train, evaluate, *others = pages.commands(page, heading)
    pages.run(place, train)
    metrics = json.loads(pages.run(place, evaluate).splitlines()[-1])
    for name, least in (("val/top1", 0.97), ("val/box_ap50", 0.9), ("val/miou", 0.78)):
        assert metrics.get(name, 1) > least
    (workdir,) = (place / "runs").iterdir()
    assert (workdir / "report.html").is_file()
    if page == "docs/getting_started.md":
        (place / "digits.py").write_text(pages.program(page, heading))
        pages.run(place, "python digits.py")
        for command in others:
            pages.run(place, command)
        lines = (place / "predictions/predictions.csv").read_text().splitlines()
        assert len(lines) == 13
        assert (place / "digits.zip").is_file()
        (place / "use.py").write_text(pages.program(page, "In Python"))
        assert "vssd_tiny" in pages.run(place, "python use.py")


# --- Python -------------------------------------------------------------------------------------


def test_python_of_the_pages():
    """It compiles, and what it takes from this package is there, arguments included."""
    for page in pages.PAGES:
        for text in pages.programs(page):
            for node in ast.walk(ast.parse(text)):
                check_names(node, f"{page}: {ast.unparse(node)}")


def test_reference_of_the_api():
    """Each of its names is there, and each operation is among them."""
    text = (ROOT / "docs/api.md").read_text()
    names = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    for name in names:
        resolve(name, "docs/api.md")
    for part in re.findall(
        r"^::: (\S+)\n    options:\n      members: \[(.*)\]$", text, re.MULTILINE
    ):
        for member in part[1].split(", "):
            resolve(f"{part[0]}.{member}", "docs/api.md")
    operations = {path.parent.name for path in (ROOT / "vssd_jax/kernels").glob("*/api.py")}
    for operation in operations:
        assert f"vssd_jax.kernels.{operation}.api.{operation}" in names


def check_names(node, where):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vssd_jax"):
        for alias in node.names:
            resolve(f"{node.module}.{alias.name}", where)
    if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("vssd_jax."):
        resolve(ast.unparse(node), where)
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("vssd_jax."):
        parameters = inspect.signature(resolve(ast.unparse(node.func), where)).parameters
        for keyword in node.keywords:
            assert keyword.arg in parameters, where


def resolve(name, where):
    """What a dotted name stands for."""
    found = importlib.import_module("vssd_jax")
    path = "vssd_jax"
    for part in name.split(".")[1:]:
        path += f".{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(path)
            except ModuleNotFoundError as error:
                raise AssertionError(f"{where}: there is no {path}") from error
        found = getattr(found, part)
    return found
