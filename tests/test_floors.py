"""Imports go down the floors of docs/architecture.md, and nowhere in a circle."""

import ast
import pathlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# From the ground up; a module may import its own floor and those below, as far as ALLOWED says.
FLOORS = (
    ("errors", "host", "distributed", "config", "known_classes", "types", "strict_json"),
    ("kernels", "data"),
    ("models",),
    ("weights",),
    ("factory",),
    ("tasks",),
    ("training",),
    ("inference",),
    ("cli",),
    ("hub", "look", "commands"),
)
GROUND = FLOORS[0]
# Floors that may not use all that lies below them.
ALLOWED = {
    "kernels": {"kernels", *GROUND},
    "data": {"data", *GROUND},
    "tasks": {"tasks", "models", "data", *GROUND},
    "training": {
        "training", "tasks.protocol", "models", "weights",
        "kernels.dispatch", "kernels.multi_tensor", *GROUND,
    },
}


def modules(root: pathlib.Path) -> dict[str, ast.Module]:
    """The parsed modules of the package by dotted name without the package's own."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """The package's modules that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            package, _, rest = target.partition(".")
            if package != "vssd_jax":
                continue
            while rest and rest not in known:  # a name inside of a module
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found - {""}


def upward(root: pathlib.Path) -> list[str]:
    """The imports that the floors do not allow."""
    trees = modules(root)
    height = {place: level for level, floor in enumerate(FLOORS) for place in floor}
    wrong = []
    for name, tree in trees.items():
        place = name.partition(".")[0]
        if not place:  # vssd_jax/__init__.py is the door to all of them
            continue
        for target in imports(name, tree, set(trees)):
            target_place = target.partition(".")[0]
            allowed = ALLOWED.get(place)
            if height[target_place] > height[place] or (
                allowed is not None and target_place not in allowed and target not in allowed
            ):
                wrong.append(f"{name} imports {target}")
    return wrong


def circles(root: pathlib.Path) -> list[str]:
    """The circles of imports, those inside of functions included."""
    trees = modules(root)
    graph = {name: imports(name, tree, set(trees)) - {name} for name, tree in trees.items()}
    found, done = [], set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    return found


def test_imports_only_go_down():
    assert upward(ROOT / "vssd_jax") == []


def test_there_is_no_circle():
    assert circles(ROOT / "vssd_jax") == []


def test_every_module_has_a_floor():
    places = {name.partition(".")[0] for name in modules(ROOT / "vssd_jax")} - {""}
    assert places == {place for floor in FLOORS for place in floor}


def test_benchmarks_import_no_tests():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("tests"), path
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("tests") for alias in node.names), path


# --- The tests above find what they look for ------------------------------------------------------


def plant(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("models/a.py", "import vssd_jax.weights.b", "models.a imports weights.b"),
        ("models/a.py", "from vssd_jax.weights import b", "models.a imports weights.b"),
        ("models/a.py", "from vssd_jax.weights.b import x", "models.a imports weights.b"),
        (
            "models/a.py",
            "def f():\n    from vssd_jax.weights import b",
            "models.a imports weights.b",
        ),
        ("kernels/a.py", "from vssd_jax.data import c", "kernels.a imports data.c"),
        ("training/a.py", "from vssd_jax.tasks import d", "training.a imports tasks.d"),
        ("errors.py", "from vssd_jax import host", None),
        ("training/a.py", "from vssd_jax.tasks.protocol import Task", None),
        ("training/a.py", "from vssd_jax.weights import b", None),
    ],
)
def test_an_upward_import_is_found(tmp_path, file, text, message):
    package = {
        "weights/b.py": "x = 1", "data/c.py": "", "tasks/d.py": "", "host.py": "",
        "tasks/protocol.py": "class Task: ...", "models/__init__.py": "",
    }  # fmt: skip
    plant(tmp_path, package | {file: text})
    assert upward(tmp_path) == ([] if message is None else [message])


def test_a_circle_is_found(tmp_path):
    plant(
        tmp_path,
        {
            "models/a.py": "from vssd_jax.models import b",
            "models/b.py": "def f():\n    from vssd_jax.models.c import x",
            "models/c.py": "from vssd_jax.models.a import y",
            "models/__init__.py": "",
        },
    )
    assert circles(tmp_path) == ["models.a -> models.b -> models.c -> models.a"]


def test_workers_of_the_pipeline_do_without_jax():
    names = [f"vssd_jax.{name}" for name in modules(ROOT / "vssd_jax") if name.startswith("data")]
    needs = {"vssd_jax.data.pipeline"}  # by Grain
    program = f"import sys, {', '.join(sorted(set(names) - needs))}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
