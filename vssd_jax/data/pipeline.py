"""Batches by Grain, a function of seed and step alone.

Batch i of the training stream holds the same samples, in the same order and with the same
random transforms, whatever the number of workers and processes, and also after a resume.
"""

import contextlib
import errno
import gc
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from vssd_jax.data.source import Source
from vssd_jax.errors import UserError


def _iterate(dataset: grain.MapDataset, num_workers: int) -> Iterator[dict]:
    threads = grain.ReadOptions(num_threads=0 if num_workers else 2, prefetch_buffer_size=16)
    batches = dataset.to_iter_dataset(threads)
    if num_workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    iterator = None
    try:
        iterator = iter(batches)
        yield from iterator
    except OSError as error:
        if num_workers and error.errno == errno.ENOSPC and error.filename is None:
            raise UserError(f"no worker process can start: {_full_memory()}") from error
        raise
    except Exception as error:
        ended = re.search(r"Worker process was terminated .* exit code (-?\d+)", str(error))
        if ended is None:
            raise
        raise UserError(_describe_end(int(ended[1]))) from error
    finally:  # ends the workers and frees the memory that they share
        getattr(iterator, "close", lambda: None)()
        del iterator
        gc.collect()  # Grain's threads end in a reference cycle that holds the last batches


def _describe_end(exit_code: int) -> str:
    """Why a worker ended, and what to do."""
    if exit_code == -signal.SIGBUS:
        return f"a worker process of the data pipeline was ended: {_full_memory()}"
    if exit_code == -signal.SIGKILL:
        return (
            "a worker process of the data pipeline was killed, probably for lack of memory; take "
            "fewer config.num_workers"
        )
    how = f"exit code {exit_code}"
    if -exit_code in set(signal.Signals):
        how = signal.Signals(-exit_code).name
    return (
        f"a worker process of the data pipeline ended with {how}; its own messages are above, and "
        "config.num_workers=0 reads without workers"
    )


def _full_memory() -> str:
    size = ""
    with contextlib.suppress(OSError):
        size = f"of {shutil.disk_usage('/dev/shm').total / 2**20:.0f} MiB "
    return (
        f"the shared memory in /dev/shm {size}has no room left; raise it (Docker: --shm-size=16g, "
        "Kubernetes: an emptyDir with medium Memory), or take fewer config.num_workers (0 uses "
        "threads)"
    )


def train_batches(
    source: Source,
    transform: Callable[[dict, np.random.Generator], dict],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    shuffle: bool = True,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict]:
    """Batches of this process's share: endless, and reshuffled every epoch.

    Args:
      source: the samples.
      transform: element and random generator -> dict of arrays of fixed shape.
      batch_size: global; each process gets its contiguous rows of every global batch.
      seed: of the order and the transforms.
      start_step: the first batch to yield.
      shuffle: False takes the elements once and in order, from a source that shuffles and repeats
        by itself.
      num_workers: worker processes; 0 reads in threads of this process.
      process_index, process_count: which share.
    """
    dataset = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        dataset = dataset.shuffle().repeat()
    # drop_remainder: rounding up the endless length would overflow.
    dataset = dataset.random_map(transform).batch(batch_size // process_count, drop_remainder=True)
    return _iterate(
        dataset[start_step * process_count + process_index :: process_count], num_workers
    )


class _Padded:
    """A source whose length is a multiple of the batch size; says which elements are real.

    A source with padding of its own says so by `valid` of its elements.
    """

    def __init__(self, source: Source, batch_size: int):
        self.source, self.batch_size = source, batch_size

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size) * self.batch_size

    def __getitem__(self, index: Any) -> dict[str, Any]:
        valid = index < len(self.source)
        return {"valid": np.bool_(valid), **self.source[index if valid else 0]}


def eval_batches(
    source: Source,
    transform: Callable[[dict], dict],
    *,
    batch_size: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict]:
    """Every element once, in order; the last batch is padded and `valid` masks the padding."""

    def apply(element: dict) -> dict:
        return {"valid": element.pop("valid"), **transform(element)}

    dataset = (
        grain.MapDataset.source(_Padded(source, batch_size))
        .map(apply)
        .batch(batch_size // process_count)
    )
    return _iterate(dataset[process_index::process_count], num_workers)
