"""The folder of a run, which one process at a time may write to."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from vssd_jax.distributed import is_main, say
from vssd_jax.errors import UserError


@contextlib.contextmanager
def claim(
    workdir: pathlib.Path, config: Mapping[str, Any], *, checkpoint_bytes: int
) -> Iterator[None]:
    """Makes and locks the folder while the context lasts, and writes the config into it.

    Args:
      workdir: the folder.
      config: of the run; a difference from the folder's is reported, not refused.
      checkpoint_bytes: size of a checkpoint; at least that much must be free.

    Raises:
      UserError: another process uses it, or it cannot be written, now or later.
    """
    try:
        if not is_main():
            yield
            return
        workdir.mkdir(parents=True, exist_ok=True)
        with _lock(workdir):
            free = shutil.disk_usage(workdir).free
            if free < checkpoint_bytes:
                raise UserError(
                    f"a checkpoint takes {checkpoint_bytes / 1e6:.0f} MB, and {workdir} has "
                    f"{free / 1e6:.0f} MB left"
                )
            _note_config(workdir / "config.json", config)
            yield
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written: {error.strerror or error}"
        ) from error


@contextlib.contextmanager
def _lock(workdir: pathlib.Path) -> Iterator[None]:
    # The system gives the lock back however the process ends.
    with (workdir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{workdir} is in use by {file.read() or 'another process'}; wait for it, or use "
                "another --workdir (processes of one run need --distributed or --coordinator)"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _note_config(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(dict(config), indent=2)
    if path.exists():
        old, new = json.loads(path.read_text()), json.loads(text)
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            say(f"the config differs from this workdir's in {', '.join(changed)}")
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
