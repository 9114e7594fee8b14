"""The folder of a run, which one process at a time may write to."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import filelock

from vssd_jax import strict_json
from vssd_jax.config import base_config
from vssd_jax.distributed import is_main, say
from vssd_jax.errors import UserError, describe_difference


@contextlib.contextmanager
def claim(
    workdir: pathlib.Path, config: Mapping[str, Any], *, checkpoint_bytes: int
) -> Iterator[dict[str, Any] | None]:
    """Makes and locks the folder while the context lasts, and writes the config into it.

    It gives the config that was there before, on the process that writes, or None.

    Args:
      workdir: the folder.
      config: of the run; a difference from the folder's is reported, not refused.
      checkpoint_bytes: size of a checkpoint; at least that much must be free.

    Raises:
      UserError: another process uses it, or it cannot be written, now or later.
    """
    try:
        if not is_main():
            yield None
            return
        workdir.mkdir(parents=True, exist_ok=True)
        with _lock(workdir):
            free = shutil.disk_usage(workdir).free
            if free < checkpoint_bytes:
                raise UserError(
                    f"a checkpoint takes {checkpoint_bytes / 1e6:.0f} MB, and {workdir} has "
                    f"{free / 1e6:.0f} MB left"
                )
            yield _note_config(workdir / "config.json", config)
    except OSError as error:
        if error.filename is not None and not _is_inside(error.filename, workdir):
            raise  # of something else
        raise UserError(
            f"the workdir {workdir} cannot be written: {error.strerror or error}"
        ) from error


def _is_inside(path: str | bytes | int, workdir: pathlib.Path) -> bool:
    """Whether a path is of the folder; or the folder of it, while it is being made."""
    if isinstance(path, int):
        return False
    found, root = pathlib.Path(os.fsdecode(path)).absolute(), workdir.absolute()
    return found.is_relative_to(root) or root.is_relative_to(found)


@contextlib.contextmanager
def _lock(workdir: pathlib.Path) -> Iterator[None]:
    holder = workdir / "lock.txt"  # who has the lock, for the others to say
    try:
        # The system gives the lock back however the process ends.
        with filelock.FileLock(workdir / "lock", timeout=0):
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
    except filelock.Timeout:
        name = holder.read_text() if holder.exists() else "another process"
        raise UserError(
            f"{workdir} is in use by {name}; wait for it, or use "
            "another --workdir (processes of one run need --distributed or --coordinator)"
        ) from None


def _is_default(key: str, value: Any) -> bool:
    return key in ("preprocessing", "best_metric") or not value or value == base_config().get(key)


def _note_config(path: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Writes the config, says what changed, and returns the one from before."""
    text, old = strict_json.dumps(dict(config), indent=2), None
    if path.exists():
        old, new = json.loads(path.read_text()), json.loads(text)
        for key in sorted(old.keys() | new.keys()):
            # An earlier version did not have every field; what it did is the default.
            if old.get(key) == new.get(key) or (key not in old and _is_default(key, new[key])):
                continue
            if key == "class_names" and old.get(key) and new.get(key):
                difference = describe_difference(old[key], new[key])
                raise UserError(
                    f"the run of {path.parent} has other classes than the data: {difference}; use "
                    "another --workdir"
                )
            if key != "class_names":
                before, after = (strict_json.dumps(fields.get(key)) for fields in (old, new))
                say(f"the config differs from this workdir's: {key} was {before}, is {after}")
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
    return old
