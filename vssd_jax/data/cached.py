"""A cache of decoded pictures, for where decoding cannot keep up with the devices."""

import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from vssd_jax.data.classification_transforms import resize_shorter_side
from vssd_jax.data.source import Source
from vssd_jax.errors import UserError

FORMAT = 1
# Pictures per file: what one worker decodes at a time, about 4 GB of ImageNet.
SHARD_LENGTH = 16_384


class CachedSource:
    """The pictures of a `DecodedSource`, decoded once and then read from memory-mapped files.

    Pictures whose shorter side exceeds `shorter_side` are shrunk to it: ImageNet's training set
    takes about 330 GB at 256. Training crops then come from the smaller picture, a small change of
    the recipe. The cache is written beside its place and renamed when complete, so that an
    interrupted run leaves nothing that looks like a cache, and several processes may start at once.

    Args:
      source: a `DecodedSource`; it is read only where the cache has to be written.
      folder: where the cache is, or is to be.
      shorter_side: the greatest shorter side in pixels.
      num_workers: processes that write the cache; 0 writes in this one.

    Raises:
      UserError: the folder holds something else, or a cache of another source or size.
    """

    def __init__(
        self,
        source: Source,
        folder: str | os.PathLike,
        *,
        shorter_side: int = 256,
        num_workers: int = 0,
    ):
        self._folder = pathlib.Path(folder)
        wanted = {"format": FORMAT, "length": len(source), "shorter_side": shorter_side}
        if not self._folder.exists():
            _write(source, self._folder, wanted, num_workers)
        try:
            found = json.loads((self._folder / "cache.json").read_text())
        except (OSError, ValueError):
            raise UserError(
                f"{self._folder} exists and holds no complete cache. Remove it, or name another "
                "folder."
            ) from None
        if found != wanted:
            changed = ", ".join(f"{k} {found.get(k)} not {v}" for k, v in wanted.items())
            raise UserError(
                f"The cache in {self._folder} was made of other pictures ({changed}). Remove it, "
                "or name another folder."
            )
        with np.load(self._folder / "index.npz") as index:
            self._index = dict(index)

    def __len__(self) -> int:
        return len(self._index["label"])

    def __getitem__(self, index: Any) -> dict[str, Any]:
        height, width = self._index["size"][index]
        start = self._index["start"][index]
        shard = _open_shard(self._folder / _shard_name(int(index) // SHARD_LENGTH))
        pixels = shard[start : start + height * width * 3]
        return {
            "image": np.array(pixels).reshape(height, width, 3),
            "label": self._index["label"][index],
            "replaced": self._index["replaced"][index],
        }


def _shard_name(number: int) -> str:
    return f"pixels-{number:05d}.bin"


# Kept outside the source, so that pickling it for a worker carries no map.
@functools.cache
def _open_shard(path: pathlib.Path) -> np.memmap:
    return np.memmap(path, np.uint8, mode="r")


def _write(source: Source, folder: pathlib.Path, description: dict, num_workers: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{folder.name}.unfinished-"
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        write = functools.partial(_write_shard, source, unfinished, description["shorter_side"])
        shards = range((len(source) + SHARD_LENGTH - 1) // SHARD_LENGTH)
        if num_workers:
            # Spawned, because a fork of a process that runs JAX's threads can hang.
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
                parts = list(pool.map(write, shards))
        else:
            parts = [write(shard) for shard in shards]
        index: dict[str, Any] = {
            key: np.concatenate([part[key] for part in parts]) for key in parts[0]
        }
        np.savez(unfinished / "index.npz", **index)
        (unfinished / "cache.json").write_text(json.dumps(description))
        unfinished.chmod(0o755)  # mkdtemp's folders are private
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process was faster; its cache holds the same.
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_shard(
    source: Source, folder: pathlib.Path, shorter_side: int, shard: int
) -> dict[str, np.ndarray]:
    first = shard * SHARD_LENGTH
    start, sizes, labels, replaced = 0, [], [], []
    starts = []
    with open(folder / _shard_name(shard), "wb") as file:
        for i in range(first, min(first + SHARD_LENGTH, len(source))):
            example = source[i]
            image = example["image"]
            if min(image.shape[:2]) > shorter_side:
                image = resize_shorter_side(image, shorter_side)
            file.write(np.ascontiguousarray(image).data)
            starts.append(start)
            start += image.size
            sizes.append(image.shape[:2])
            labels.append(example["label"])
            replaced.append(example["replaced"])
        file.flush()
        os.fsync(file.fileno())
    return {
        "start": np.array(starts, np.int64),
        "size": np.array(sizes, np.int64),
        "label": np.array(labels, np.int32),
        "replaced": np.array(replaced, np.int32),
    }
