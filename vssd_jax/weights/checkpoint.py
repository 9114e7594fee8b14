"""The form of a checkpoint on disk: named arrays, written by Orbax, with checksums.

A checkpoint is a folder `<workdir>/checkpoints/<step>` with two parts of named arrays: "ema", the
averaged weights that evaluation reads, by dotted name; and "train", the rest of the training state.
The checksums of its files are written last: a folder without them is incomplete. They are needed
because Orbax does not notice a damaged array.

Orbax spends a millisecond of Python on each array, and the training step waits for it. Arrays that
every device has whole are therefore saved as one vector for each dtype, and the checkpoint's
metadata hold the layout: for each vector the names and shapes of its members.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from vssd_jax.errors import UserError

FOLDER = "checkpoints"
_CHECKSUMS = "checksums.json"

Layout = dict[str, list[tuple[str, tuple[int, ...]]]]


# --- Reading ------------------------------------------------------------------------------------


def read_ema(
    workdir: str | os.PathLike, score: Callable[[int], float] | None = None
) -> tuple[dict[str, np.ndarray], int]:
    """The averaged weights of a complete checkpoint, and its step.

    Args:
      workdir: of the run.
      score: of a step; the checkpoint with the highest is taken, the latest of equals. None takes
        the latest.

    Raises:
      UserError: there is no checkpoint yet.
    """
    root = pathlib.Path(workdir).absolute() / FOLDER
    steps = _steps(root)
    if score is not None:
        steps = sorted(steps, key=score)  # equals stay in their order
    for step in reversed(steps):
        folder = root / str(step)
        problem = _problem(folder)
        if problem == "damaged":
            print(f"warning: {folder} is damaged and passed over", file=sys.stderr)
        if problem is None:
            return read_part(folder, "ema"), step
    raise UserError(f"{workdir} has no checkpoint yet")


def read_part(folder: pathlib.Path, part: str) -> dict[str, np.ndarray]:
    """The arrays of one part of a checkpoint, "ema" or "train", by name."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = ocp.checkpointables_metadata(folder)
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in found.metadata[part].items()
    }
    arrays = ocp.load_checkpointables(folder, {part: abstract})[part]
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    return unpack(arrays, layouts_of(found)[part])


def _steps(root: pathlib.Path) -> list[int]:
    if not root.is_dir():
        return []
    return sorted(int(entry.name) for entry in root.iterdir() if entry.name.isdigit())


# --- Completeness -------------------------------------------------------------------------------


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of each file by its path."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(_CHECKSUMS):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sums[path.relative_to(folder).as_posix()] = digest
    return sums


def write_checksums(folder: pathlib.Path) -> None:
    """Marks a checkpoint as complete."""
    part = folder / f"{_CHECKSUMS}.part"
    with part.open("w") as file:
        json.dump(_checksums(folder), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / _CHECKSUMS)


def _problem(folder: pathlib.Path) -> str | None:
    """"incomplete" or "damaged"; None if the checkpoint is good."""
    path = folder / _CHECKSUMS
    if not folder.name.isdigit() or not path.exists():
        return "incomplete"
    try:
        expected = json.loads(path.read_bytes())
    except ValueError:
        return "damaged"
    found = _checksums(folder)
    if expected.keys() - found.keys():
        return "incomplete"  # the process was killed while it removed the folder
    return None if found == expected else "damaged"


def clean_up(root: pathlib.Path) -> None:
    """Removes what a killed process left, and moves damaged checkpoints out of the way."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        problem = _problem(folder)
        if problem == "incomplete":
            print(f"warning: the checkpoint {folder} is incomplete: removed", file=sys.stderr)
            shutil.rmtree(folder)
        elif problem == "damaged":
            place = root.parent / "damaged" / folder.name
            while place.exists():
                place = place.with_name(place.name + "_")
            place.parent.mkdir(exist_ok=True)
            os.rename(folder, place)
            print(f"warning: the checkpoint {folder} is damaged: now {place}", file=sys.stderr)


# --- Packing ------------------------------------------------------------------------------------


def layout_of(arrays: Mapping[str, jax.Array]) -> Layout:
    """The vectors that `pack` makes."""
    layout: Layout = {}
    for name, array in arrays.items():
        if array.sharding.is_fully_replicated:
            layout.setdefault(f"packed_{array.dtype}", []).append((name, array.shape))
    return layout


def layouts_of(found: Any) -> dict[str, Layout]:
    """The layout of each part in a checkpoint's metadata; the first checkpoints had none."""
    return found.custom_metadata or {part: {} for part in found.metadata}


def members(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name and shape of every packed array."""
    return {name: tuple(shape) for packed in layout.values() for name, shape in packed}


@jax.jit
def _concatenate(groups: dict[str, list[jax.Array]]) -> dict[str, jax.Array]:
    return {
        vector: jnp.concatenate([array.ravel() for array in arrays])
        for vector, arrays in groups.items()
    }


def pack(arrays: Mapping[str, jax.Array], layout: Layout) -> dict[str, jax.Array]:
    """The arrays with the vectors of `layout` in place of their members."""
    packed = members(layout)
    groups = {vector: [arrays[n] for n, _ in names] for vector, names in layout.items()}
    return _concatenate(groups) | {n: array for n, array in arrays.items() if n not in packed}


def unpack(arrays: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The inverse of `pack`."""
    result = {name: array for name, array in arrays.items() if name not in layout}
    for vector, names in layout.items():
        start = 0
        for name, shape in names:
            end = start + math.prod(shape)
            result[name] = arrays[vector][start:end].reshape(shape)
            start = end
    return result
