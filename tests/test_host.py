"""The compiler's options for a CPU, and the folder of compiled programs."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from tests.conftest import ROOT
from vssd_jax.host import cache_folder, compiler_options, drop_oldest


def test_the_installed_compiler_knows_the_options():
    assert compiler_options()


def test_a_compiler_that_does_not_know_them(monkeypatch):
    jit = jax.jit
    unknown = {"xla_option_of_another_version": "1"}
    monkeypatch.setattr(jax, "jit", lambda f, compiler_options: jit(f, compiler_options=unknown))
    assert compiler_options.__wrapped__() == {}


# Compiled programs on disk

PROGRAM = """
import jax
from vssd_jax.host import keep_compiled_programs

counts = {}
def listen(event, **_):
    counts[event] = counts.get(event, 0) + 1
jax.monitoring.register_event_listener(listen)
keep_compiled_programs()
print(jax.config.jax_compilation_cache_dir)
print(float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((3, 3)))))
print(counts.get("/jax/compilation_cache/cache_hits", 0))
print(counts.get("/jax/compilation_cache/cache_misses", 0))
"""


def run(program=PROGRAM, **variables):
    """The lines that a process prints in which JAX has no folder yet."""
    environment = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    }
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | variables
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    folder = tmp_path / "new" / "cache"
    first, second = (run(VSSD_JAX_CACHE=str(folder)) for _ in range(2))
    assert pathlib.Path(first[0]).parent == folder
    assert first[1] == second[1] == "27.0"
    assert int(first[2]) == 0 < int(first[3])
    assert (int(second[2]), int(second[3])) == (int(first[3]), 0)
    assert len(list(folder.rglob("*-cache"))) == int(first[3])
    if os.name == "posix":  # what lies in it is run: others must not write to it
        assert pathlib.Path(first[0]).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("value", ["", "0"])
def test_no_programs_are_kept_where_the_user_wants_none(value, tmp_path):
    assert run(VSSD_JAX_CACHE=value, XDG_CACHE_HOME=str(tmp_path))[0] == "None"
    assert not list(tmp_path.iterdir())


def test_a_folder_given_to_jax_wins(tmp_path):
    ours, jaxs = str(tmp_path / "ours"), str(tmp_path / "jax")
    assert run(VSSD_JAX_CACHE=ours, JAX_COMPILATION_CACHE_DIR=jaxs)[0] == jaxs
    update = f"import jax; jax.config.update('jax_compilation_cache_dir', {jaxs!r})"
    assert run(update + PROGRAM, VSSD_JAX_CACHE=ours)[0] == jaxs
    assert not (tmp_path / "ours").exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    said, folder, result, *_ = run(VSSD_JAX_CACHE=str(tmp_path / "file"))
    assert said.startswith(f"compiled programs are not kept: {tmp_path / 'file'}")
    assert "VSSD_JAX_CACHE names another folder, or 0 for none" in said
    assert (folder, result) == ("None", "27.0")


def test_processes_that_compute_together_keep_none(tmp_path):
    join = """
import jax, socket
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
jax.distributed.initialize(f"localhost:{port}", 1, 0)
"""
    assert run(join + PROGRAM, VSSD_JAX_CACHE=str(tmp_path))[0] == "None"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "{home}/.cache/vssd_jax/compiled"),
        ("linux", {"XDG_CACHE_HOME": "{home}/x"}, "{home}/x/vssd_jax/compiled"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "{home}/.cache/vssd_jax/compiled"),
        ("darwin", {"XDG_CACHE_HOME": "{home}/x"}, "{home}/Library/Caches/vssd_jax/compiled"),
        ("win32", {"LOCALAPPDATA": "{home}/local"}, "{home}/local/vssd_jax/compiled"),
        ("linux", {"VSSD_JAX_CACHE": "~/mine"}, "{home}/mine"),
    ],
)
def test_the_users_folder_for_caches(platform, variables, expected, tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "VSSD_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder().parent == pathlib.Path(expected.format(home=tmp_path))


def test_the_oldest_programs_go_first(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).write_bytes(b"0123456789")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    drop_oldest(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "new"]
