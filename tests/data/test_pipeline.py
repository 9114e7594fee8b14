"""Grain's batches: shares of processes, workers, and what they leave behind."""

import errno
import gc
import os
import signal
import weakref

import numpy as np
import pytest
from absl import flags

from tests.data.pictures import jpeg
from vssd_jax.data import pipeline
from vssd_jax.data.classification_transforms import EvalTransform, TrainTransform
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.image_folder import ImageFolder
from vssd_jax.data.pipeline import eval_batches, train_batches
from vssd_jax.errors import UserError


@pytest.fixture(autouse=True, scope="module")
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tests"])  # Grain's workers read absl flags


class Numbers:
    """Element i holds i."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"index": np.int64(index)}


def unchanged(element):
    return element


def drawn(element, rng):
    return {**element, "draw": rng.random()}


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 23, 24, 25])
def test_evaluation_counts_every_element_once(length, processes):
    """Over all processes, whether the last batch is full, short or nearly empty."""
    shares = [
        list(
            eval_batches(
                Numbers(length),
                unchanged,
                batch_size=12,
                process_index=process,
                process_count=processes,
            )
        )
        for process in range(processes)
    ]
    # Every process takes part in every step, with its rows of the global batch.
    assert {len(share) for share in shares} == {-(-length // 12)}
    assert {len(batch["index"]) for share in shares for batch in share} == {12 // processes}
    seen = [batch["index"][batch["valid"]] for step in zip(*shares, strict=True) for batch in step]
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(length))


@pytest.mark.parametrize("processes", [2, 3])
def test_training_shares_make_up_the_global_batch(processes):
    """Also after a resume, over the border of an epoch."""

    def take(count, **options):
        batches = train_batches(Numbers(40), drawn, batch_size=12, seed=5, **options)
        return [next(batches) for _ in range(count)]

    expected = take(6)[2:]
    shares = [
        take(4, start_step=2, process_index=process, process_count=processes)
        for process in range(processes)
    ]
    for step, batches in enumerate(zip(*shares, strict=True)):
        for key in ("index", "draw"):
            whole = np.concatenate([batch[key] for batch in batches])
            np.testing.assert_array_equal(whole, expected[step][key])


def test_a_users_error_leaves_the_workers_as_it_is():
    source = DecodedSource([{"image": b"broken", "label": 0}] * 8)
    batches = eval_batches(source, unchanged, batch_size=4, num_workers=1)
    with pytest.raises(UserError, match="8 pictures in a row cannot be read"):
        next(batches)


def test_workers_memory_is_freed():
    """Grain's arrays lie in shared memory, which outlives what nobody deletes."""
    gc.disable()  # a collection may come too late
    try:
        held = []
        for batch in eval_batches(Numbers(24), unchanged, batch_size=4, num_workers=2):
            held.append(weakref.ref(batch["index"]))
        assert hasattr(batch["index"], "shm")
        del batch
        assert len(held) == 6
        assert not any(reference() is not None for reference in held)
    finally:
        gc.enable()


def write_pictures(root, split, per_class):
    for label in range(3):
        folder = root / split / f"n{label:08d}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            (folder / f"{i}.JPEG").write_bytes(jpeg(10 * label + i, 30 + i, 40))
    (root / split / "n00000001" / "0.JPEG").write_bytes(jpeg(99)[:-100])  # truncated


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_equal(batches, expected):
    for batch, reference in zip(batches, expected, strict=True):
        assert set(batch) == set(reference)
        for key in reference:
            np.testing.assert_array_equal(batch[key], reference[key])


def test_training_batches_of_pictures(tmp_path):
    write_pictures(tmp_path, "train", 4)
    source = DecodedSource(ImageFolder(tmp_path / "train"))
    transform = TrainTransform(image_size=24)
    settings = {"batch_size": 4, "seed": 3}
    expected = take(train_batches(source, transform, **settings), 6)
    for batch in expected:
        assert batch["image"].shape == (4, 24, 24, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["erase"].shape == (4, 4)
        assert batch["label"].dtype == batch["replaced"].dtype == np.int32
    # Two epochs: the truncated picture came up twice, and is counted.
    assert sum(batch["replaced"].sum() for batch in expected) == 2
    # The same batches with workers, and after a resume.
    assert_equal(take(train_batches(source, transform, **settings, num_workers=2), 4), expected[:4])
    assert_equal(take(train_batches(source, transform, **settings, start_step=4), 2), expected[4:])
    other = next(train_batches(source, transform, batch_size=4, seed=4))
    assert not np.array_equal(other["image"], expected[0]["image"])


def test_evaluation_batches_of_pictures(tmp_path):
    write_pictures(tmp_path, "val", 3)
    source = DecodedSource(ImageFolder(tmp_path / "val"))
    batches = list(eval_batches(source, EvalTransform(image_size=16), batch_size=4))
    assert [b["image"].shape for b in batches] == [(4, 16, 16, 3)] * 3
    valid = np.concatenate([b["valid"] for b in batches])
    labels = np.concatenate([b["label"] for b in batches])
    replaced = np.concatenate([b["replaced"] for b in batches])
    np.testing.assert_array_equal(valid, [True] * 9 + [False] * 3)
    np.testing.assert_array_equal(labels[valid], [0, 0, 0, 1, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(replaced[valid], [0, 0, 0, 1, 0, 0, 0, 0, 0])


class Ends:
    """A transform that ends its own process, by a signal or with an exit code."""

    def __init__(self, number):
        self.number = number

    def __call__(self, element, rng):
        if isinstance(self.number, signal.Signals):
            os.kill(os.getpid(), self.number)
        os._exit(self.number)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGBUS, r"/dev/shm of \d+ MiB has no room left; raise it \(Docker"),
        (signal.SIGKILL, "killed, probably for lack of memory; take fewer config.num_workers"),
        (signal.SIGSEGV, "ended with SIGSEGV; "),
        (3, "ended with exit code 3; .* config.num_workers=0"),
    ],
)
def test_a_worker_that_is_ended_is_one_line(number, message):
    source = [{"label": i} for i in range(8)]
    batches = train_batches(source, Ends(number), batch_size=4, seed=0, num_workers=1)
    with pytest.raises(UserError, match=message):
        next(batches)


def test_no_room_to_start_a_worker_is_one_line():
    """As where a semaphore finds no place in /dev/shm; other errors are left as they are."""

    class Full:
        def __init__(self, *error):
            self.error = OSError(*error)

        def to_iter_dataset(self, options):
            return self

        def mp_prefetch(self, options):
            return self

        def __iter__(self):
            raise self.error

    full = "No space left on device"
    with pytest.raises(UserError, match=r"no worker process can start: .* /dev/shm"):
        next(pipeline._iterate(Full(errno.ENOSPC, full), 1))
    for error, workers in (((errno.ENOSPC, full), 0), ((errno.ENOSPC, full, "/a/file"), 1)):
        with pytest.raises(OSError, match=full):
            next(pipeline._iterate(Full(*error), workers))
