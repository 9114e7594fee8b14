import argparse
import collections
import contextlib
import datetime
import os
import pathlib
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.golden import synthetic
from tests.golden.inventories import load_inventory
from tests.weights import hostile
from vssd_jax.errors import UserError
from vssd_jax.weights import torch_file
from vssd_jax.weights.torch_file import (
    Inert,
    Tensor,
    read_torch_file,
    select_state_dict,
    write_torch_file,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def load(path, which=None):
    return select_state_dict(read_torch_file(path), which, path)


def assert_one_line(error, path):
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 300


def assert_equal(array, tensor: torch.Tensor):
    """Bit for bit, dtype and shape too."""
    assert array.shape == tuple(tensor.shape)
    assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
    # NumPy cannot take every dtype of PyTorch: compare the bytes.
    tensor_bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert array.tobytes() == tensor_bytes


# Golden checkpoints


@pytest.mark.parametrize(
    ("checkpoint", "which", "salt", "taken"),
    [
        ("classification_nano", None, 1, "ema"),
        ("classification_nano", "ema", 1, "ema"),
        ("classification_nano", "model", 0, "model"),
        ("mask_rcnn_nano", None, 0, "model"),
        ("mask_rcnn_nano", "model", 0, "model"),
    ],
)
def test_golden_checkpoint(checkpoint, which, salt, taken):
    inventory = load_inventory(checkpoint)
    state, kind = load(GOLDEN / "checkpoints" / f"{checkpoint}.pth", which)
    assert kind == taken
    assert list(state) == list(inventory)
    for name, expected in synthetic.synthetic_state_dict(inventory, salt).items():
        assert state[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(state[name], expected, err_msg=name, strict=True)


def test_golden_checkpoint_around_the_weights():
    path = GOLDEN / "checkpoints" / "classification_nano.pth"
    checkpoint = read_torch_file(path)
    assert checkpoint["epoch"] == 7
    assert checkpoint["config"] == Inert("yacs.config.CfgNode")
    history = read_torch_file(GOLDEN / "checkpoints" / "mask_rcnn_nano.pth")["message_hub"]
    assert Inert("mmengine.logging.history_buffer.HistoryBuffer") in [
        value for part in history.values() if isinstance(part, dict) for value in part.values()
    ]


def test_golden_checkpoint_has_no_ema():
    path = GOLDEN / "checkpoints" / "mask_rcnn_nano.pth"
    with pytest.raises(UserError, match="only the weights of 'model', not of 'ema'") as error:
        load(path, "ema")
    assert_one_line(error, path)


# Hostile files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    hostile.write_evil_module(tmp_path)
    monkeypatch.delitem(sys.modules, hostile.EVIL_MODULE, raising=False)
    assert not hostile.effects()
    yield tmp_path
    hostile.undo()


def test_golden_hostile_file_is_refused_without_effect(folder):
    path = GOLDEN / "checkpoints" / "hostile.pth"
    with pytest.raises(UserError, match=r"posix\.system") as error:
        read_torch_file(path)
    assert_one_line(error, path)
    assert not hostile.effects()


@pytest.mark.parametrize("name", hostile.CORPUS)
def test_hostile_file_has_no_effect(name, folder):
    case = hostile.CORPUS[name]
    path = hostile.write_zip(folder / f"{name}.pth", case.pickled)
    if case.refused:
        with pytest.raises(UserError) as error:
            read_torch_file(path)
        assert_one_line(error, path)
    else:
        state, _ = load(path)
        np.testing.assert_array_equal(state["weight"], np.zeros((2, 2), np.float32))
    assert not hostile.effects()
    assert not list(folder.glob("vssd_pwned*"))


@pytest.mark.parametrize("name", hostile.CORPUS)
def test_safety_does_not_rest_on_the_list_of_harmful_names(name, folder, monkeypatch):
    monkeypatch.setattr(torch_file, "_HARMFUL_MODULES", frozenset())
    monkeypatch.setattr(torch_file, "_HARMFUL_BUILTINS", frozenset())
    path = hostile.write_zip(folder / f"{name}.pth", hostile.CORPUS[name].pickled)
    with contextlib.suppress(UserError):
        load(path)
    assert not hostile.effects()


@pytest.mark.parametrize("name", hostile.CORPUS)
def test_corpus_is_hostile(name, folder):
    """PyTorch's own careless way of loading falls for every file."""
    path = hostile.write_zip(folder / f"{name}.pth", hostile.CORPUS[name].pickled)
    with contextlib.suppress(Exception):  # the harm is done by then
        torch.load(path, weights_only=False)
    assert hostile.effects()


def test_harmless_names_are_inert(folder):
    names = [("mmengine.runner", "trace"), ("torch.profiler", "profile"), ("builtins", "getattr")]
    for module, name in names:
        config = hostile.call(hostile.names(module, name))
        path = hostile.write_zip(folder / "file.pth", hostile.checkpoint(config=config))
        assert read_torch_file(path)["config"] == Inert(f"{module}.{name}")


def test_hostile_file_that_is_no_zip(folder):
    payload = hostile.CORPUS["whole_file"].pickled
    for name, head in {"raw.pth": b"\x80\x02", "legacy.pth": torch_file._LEGACY_MAGIC}.items():
        (folder / name).write_bytes(head + payload)
        with pytest.raises(UserError) as error:
            read_torch_file(folder / name)
        assert_one_line(error, folder / name)
    assert not hostile.effects()


def test_record_names_that_leave_the_folder(folder):
    path = folder / "inner" / "file.pth"
    path.parent.mkdir()
    records = {"archive/data/0": bytes(16), "../vssd_pwned": b"x", "/vssd_pwned": b"x"}
    hostile.write_zip(path, hostile.checkpoint(), records)
    load(path)
    key = hostile.text("../../vssd_pwned")
    state = hostile.mapping(w=hostile.tensor(hostile.storage(key=key)))
    hostile.write_zip(path, hostile.checkpoint(state), records)
    with pytest.raises(UserError, match="missing"):
        load(path)
    assert not hostile.effects()


def _exponential_key() -> bytes:
    # A tuple of two of a tuple of two ...: hashing it would take 2**60 steps.
    return b"}" + b"N\x85" + b"2\x86" * 60 + b"Ns."


def _colliding_keys() -> bytes:
    prime = 2**61 - 1  # integers that differ by multiples of it have the same hash
    keys = [hostile.number(i * prime) + b"N" for i in range(20_000)]
    return b"}(" + b"".join(keys) + b"u."


def _huge_tensor(**parts) -> bytes:
    return hostile.checkpoint(hostile.mapping(w=hostile.tensor(**parts)))


_TERA = hostile.number(2**40)
BOMBS = {
    "exponential_key": _exponential_key(),
    "colliding_keys": _colliding_keys(),
    "deep_nesting": b"]" * 50_000 + b"a" * 49_999 + b".",
    "deep_tuples": b")" + b"\x85" * 50_000 + b".",
    "deep_marks": b"(" * 50_000 + b".",
    "self_reference": b"}q\x00" + hostile.text("model") + b"h\x00s.",
    "huge_memo_index": b"Nr\xff\xff\xff\xff" + b"p99999999999999999999\n" + b".",
    "terabyte_text": b"\x8d" + struct.pack("<Q", 2**42) + b"x.",
    "terabyte_bytes": b"\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "terabyte_bytearray": b"\x96" + struct.pack("<Q", 2**62) + b"x.",
    "gigabyte_integer": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "negative_integer_size": b"\x8b" + struct.pack("<i", -1) + b"x.",
    "decimal_integer": b"L" + b"9" * 100_000 + b"L\n.",
    "terabyte_storage": _huge_tensor(storage=hostile.storage(numel=_TERA)),
    "terabyte_tensor": _huge_tensor(shape=hostile.items(_TERA, _TERA)),
    "terabyte_expanded": _huge_tensor(
        shape=hostile.items(_TERA, _TERA),
        stride=hostile.items(hostile.number(0), hostile.number(0)),
    ),
    "terabyte_expanded_little_by_little": _huge_tensor(
        shape=hostile.items(hostile.number(2**15), hostile.number(2**15)),
        stride=hostile.items(hostile.number(0), hostile.number(0)),
    ),
    "empty_but_huge": _huge_tensor(
        shape=hostile.items(_TERA, hostile.number(0), _TERA),
        stride=hostile.items(_TERA, _TERA, _TERA),
    ),
    "many_axes": _huge_tensor(
        shape=hostile.items(*[hostile.number(1)] * 1000),
        stride=hostile.items(*[hostile.number(1)] * 1000),
    ),
    "buffer_outside": b"\x97.",
    "text_persistent_id": b"P0\n.",
    "unknown_opcode": b"\xff.",
    "invalid_text": b"X\x02\x00\x00\x00\xff\xff.",
    "empty_stack": b"R.",
    "empty_pickle": b"",
    "no_end": b"}",
    "long_name": hostile.stack_names("a" * 100_000, "b") + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_ends_in_one_line(name, folder):
    path = hostile.write_zip(folder / "bomb.pth", BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert_one_line(error, path)
    assert peak < 100 << 20


def test_too_many_steps(folder, monkeypatch):
    monkeypatch.setattr(torch_file, "_MAX_OPCODES", 1000)
    path = hostile.write_zip(folder / "bomb.pth", b"}0" * 600 + b"N.")
    with pytest.raises(UserError, match="too many steps"):
        load(path)


def test_names_of_a_file_cannot_garble_a_message(folder):
    state = hostile.mapping(**{"\x1b[31m\nred": hostile.tensor(), "w": hostile.tensor()})
    path = hostile.write_zip(folder / "file.pth", hostile.checkpoint(state))
    with pytest.raises(UserError) as error:
        load(path)
    assert_one_line(error, path)
    state = hostile.mapping(w=hostile.call(hostile.stack_names("a\nb\x07", "c" * 100)))
    hostile.write_zip(path, hostile.checkpoint(state))
    with pytest.raises(UserError, match="no plain tensor") as error:
        load(path)
    assert_one_line(error, path)


# Corrupt files


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small checkpoint of PyTorch's own, with its two state dicts."""
    generator = torch.Generator().manual_seed(0)

    def state():
        return OrderedDict(
            weight=torch.randn(7, 3, generator=generator),
            half=torch.randn(5, generator=generator).half(),
            count=torch.tensor(1000),
            transposed=torch.randn(4, 6, generator=generator).T,
        )

    checkpoint = {"model": state(), "model_ema": state(), "optimizer": {"state": {0: state()}}}
    path = tmp_path_factory.mktemp("small") / "small.pth"
    torch.save(checkpoint, path)
    return path, load(path)[0]


def load_or_message(path):
    """The state dict and what was taken, or None; every refusal is one line."""
    try:
        return load(path)
    except UserError as refusal:
        message = str(refusal)
    assert str(path) in message
    assert "\n" not in message
    return None


def assert_error_or_same(path, expected) -> bool:
    """Whether the file was refused; if not, it must give the right result."""
    loaded = load_or_message(path)
    if loaded is None:
        return True
    state, taken = loaded
    assert taken == "ema"
    assert list(state) == list(expected)
    for name, array in state.items():
        np.testing.assert_array_equal(array, expected[name], strict=True)
    return False


def test_truncated_files(small, tmp_path):
    data, expected = small[0].read_bytes(), small[1]
    rng = np.random.default_rng(0)
    sizes = {0, 1, 3, 4, 30, len(data) - 1, len(data) - 22, *rng.integers(0, len(data), 60)}
    path = tmp_path / "truncated.pth"
    for size in sizes:
        path.write_bytes(data[:size])
        assert assert_error_or_same(path, expected), size


def test_flipped_bits(small, tmp_path):
    data, expected = small[0].read_bytes(), small[1]
    rng = np.random.default_rng(1)
    path = tmp_path / "flipped.pth"
    refused = 0
    # The directory at the end, where structure is dense, gets half of them.
    positions = [*rng.integers(0, len(data), 200), *rng.integers(len(data) - 1500, len(data), 200)]
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        refused += assert_error_or_same(path, expected)
    assert 100 < refused < len(positions)


def test_overwritten_blocks(small, tmp_path):
    data, expected = small[0].read_bytes(), small[1]
    rng = np.random.default_rng(2)
    path = tmp_path / "overwritten.pth"
    for _ in range(60):
        damaged = bytearray(data)
        start, size = rng.integers(len(data)), rng.integers(1, 400)
        damaged[start : start + size] = rng.bytes(len(damaged[start : start + size]))
        path.write_bytes(damaged)
        assert_error_or_same(path, expected)


def rewrite(source, path, change):
    """Copies an archive; `change(name, data)` gives each record's new bytes, or None to drop it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = change(entry.filename, old.read(entry))
            if data is not None:
                new.writestr(entry.filename, data)
    return path


def test_removed_and_resized_records(small, tmp_path):
    source, expected = small
    with zipfile.ZipFile(source) as archive:
        names = archive.namelist()
    path = tmp_path / "changed.pth"
    refused = {"removed": set(), "shortened": set(), "lengthened": set(), "emptied": set()}
    for name in names:
        changes = {
            "removed": lambda data: None,
            "shortened": lambda data: data[:-1],
            "lengthened": lambda data: data + b"\0",
            "emptied": lambda data: b"",
        }
        for kind, change in changes.items():
            rewrite(
                source,
                path,
                lambda n, data, name=name, change=change: change(data) if n == name else data,
            )
            if assert_error_or_same(path, expected):
                refused[kind].add(name)
    storages = {name for name in names if "/data/" in name}
    assert len(storages) == 12
    for kind in refused:
        assert storages <= refused[kind], kind
    assert "small/data.pkl" in refused["removed"] & refused["shortened"] & refused["emptied"]


def test_changed_pickles(small, tmp_path):
    """With its checksum put right a changed pickle is another file: an error or plain arrays."""
    source, _ = small
    rng = np.random.default_rng(3)
    path = tmp_path / "changed.pth"

    def change(name, data):
        if not name.endswith("/data.pkl"):
            return data
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(len(changed))] = rng.integers(256)
        return bytes(changed)

    refused = 0
    for _ in range(300):
        rewrite(source, path, change)
        loaded = load_or_message(path)
        if loaded is None:
            refused += 1
            continue
        assert all(type(array) is np.ndarray for array in loaded[0].values())
        assert sum(array.nbytes for array in loaded[0].values()) < 10_000
    assert 50 < refused < 300


def test_corrupt_optimizer_does_not_touch_the_weights(small, tmp_path):
    source, expected = small

    def change(name, data):
        return data[::-1] if name.endswith("/data/8") else data  # a tensor of the optimizer

    # The checksums are right again, but the weights do not depend on that record at all.
    assert not assert_error_or_same(rewrite(source, tmp_path / "changed.pth", change), expected)


def test_changed_weights_are_noticed_only_when_read(small, tmp_path):
    data = bytearray(small[0].read_bytes())
    with zipfile.ZipFile(small[0]) as archive:
        start = archive.getinfo("small/data/0").header_offset
    payload = data.index(torch.load(small[0])["model"]["weight"].numpy().tobytes(), start)
    data[payload] ^= 1
    path = tmp_path / "flipped.pth"
    path.write_bytes(data)
    checkpoint = read_torch_file(path)
    select_state_dict(checkpoint, "ema", path)
    with pytest.raises(UserError, match="checksum") as error:
        select_state_dict(checkpoint, "model", path)
    assert_one_line(error, path)
    with pytest.raises(UserError, match="checksum"):
        checkpoint["model"]["weight"].array()


def test_compressed_and_duplicate_and_overlapping_records(small, tmp_path):
    path = tmp_path / "changed.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10 << 20))
    with pytest.raises(UserError, match="compressed"):
        read_torch_file(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"N.")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data.pkl", b"}.")
    with pytest.raises(UserError, match="two records"):
        read_torch_file(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"N.")
        for i in range(50):
            archive.writestr(f"archive/data/{i}", bytes(1000))
        for entry in archive.infolist()[1:]:
            entry.header_offset = archive.infolist()[1].header_offset
            entry.file_size = entry.compress_size = 40_000
    with pytest.raises(UserError, match="overlap"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello", "not a PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"PK\x03\x04", "truncated or corrupt"),
    ],
)
def test_no_pytorch_file(content, message, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_torch_file(path)
    assert_one_line(error, path)


def test_missing_file_and_folder_and_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in {"missing": "no such file", ".": "not a file", "pipe": "not a"}.items():
        with pytest.raises(UserError, match=message):
            read_torch_file(tmp_path / name)


def test_other_archives(tmp_path):
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", b"hello")
    with pytest.raises(UserError, match=r"no data\.pkl"):
        read_torch_file(path)
    hostile.write_zip(path, b"N.", {"archive/constants.pkl": b")."})
    with pytest.raises(UserError, match="TorchScript"):
        read_torch_file(path)


def test_legacy_format_is_refused(tmp_path):
    path = tmp_path / "legacy.pth"
    torch.save({"model": {"w": torch.ones(2)}}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="legacy format") as error:
        read_torch_file(path)
    assert_one_line(error, path)


def test_big_endian_is_refused(small, tmp_path):
    def change(name, data):
        return b"big" if name.endswith("/byteorder") else data

    with pytest.raises(UserError, match="big-endian"):
        read_torch_file(rewrite(small[0], tmp_path / "big.pth", change))


# What PyTorch writes


DTYPES = [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
    "bool", "complex64", "complex128",
]  # fmt: skip
NEWER_DTYPES = ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"]


def values_of(dtype, shape=(3, 4)):
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 100, shape))
    return (values % 2 if dtype == "bool" else values).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES + NEWER_DTYPES)
def test_read_dtype(dtype, tmp_path):
    state = {"matrix": values_of(dtype), "scalar": values_of(dtype, ())}
    state |= {"empty": values_of(dtype, (0, 3))}
    torch.save(state, tmp_path / "file.pth")
    read, taken = load(tmp_path / "file.pth")
    assert taken == "model"
    assert list(read) == list(state)
    for name, tensor in state.items():
        assert_equal(read[name], tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "uint16", "bool"])
def test_read_strides_and_shared_storages(dtype, tmp_path):
    base = values_of(dtype, (4, 5, 6))
    column = values_of(dtype, (5, 1))
    state = {
        "base": base,
        "slice": base[1:3, ::2, 3:],
        "transposed": base.permute(2, 0, 1),
        "flat": base.view(-1)[7:],
        "element": base[2, 3, 4],
        "expanded": column.expand(5, 7),
        "expanded_scalar": base[0, 0, 0].expand(3, 3),
        "overlapping": torch.as_strided(base, (3, 4), (1, 1), 5),
        "length_one": torch.as_strided(base, (1, 3), (10**15, 1), 2),
        "channels_last": values_of(dtype, (2, 3, 4, 5)).to(memory_format=torch.channels_last),
    }
    torch.save(state, tmp_path / "file.pth")
    read, _ = load(tmp_path / "file.pth")
    for name, tensor in state.items():
        assert_equal(read[name], tensor)
        assert read[name].flags.c_contiguous
        assert not read[name].flags.writeable
    assert np.shares_memory(read["base"], read["flat"])
    assert_equal(read_torch_file(tmp_path / "file.pth")["slice"].array(), state["slice"])


def test_read_storage_under_two_dtypes(tmp_path):
    base = torch.arange(8, dtype=torch.float32)
    # As older versions of PyTorch wrote it; the current one refuses to.
    state = hostile.mapping(
        float=hostile.tensor(
            hostile.storage(), shape=hostile.items(hostile.number(4)),
            stride=hostile.items(hostile.number(1)),
        ),
        int=hostile.tensor(
            hostile.storage(hostile.names("torch", "IntStorage")),
            shape=hostile.items(hostile.number(4)), stride=hostile.items(hostile.number(1)),
        ),
    )  # fmt: skip
    data = base[:4].numpy().tobytes()
    path = hostile.write_zip(
        tmp_path / "file.pth", hostile.checkpoint(state), {"archive/data/0": data}
    )
    read, _ = load(path)
    assert_equal(read["float"], base[:4])
    assert_equal(read["int"], base[:4].view(torch.int32))


def test_read_parameters_and_modules_state(tmp_path):
    class Tagged(torch.Tensor):
        pass

    parameter = torch.nn.Parameter(torch.randn(3))
    tagged_parameter = torch.nn.Parameter(torch.randn(3))
    tagged_parameter.note = "an attribute"
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    assert hasattr(state, "_metadata")
    state["parameter"] = parameter
    state["tagged_parameter"] = tagged_parameter
    state["subclass"] = torch.randn(4, 2).as_subclass(Tagged)
    state["buffer"] = torch.nn.Buffer(torch.randn(2))
    path = tmp_path / "file.pth"
    # A subclass defined in a test cannot be pickled by name; give it one that can be.
    Tagged.__module__, Tagged.__qualname__ = __name__, "Tagged"
    globals()["Tagged"] = Tagged
    try:
        torch.save({"state_dict": state}, path)
    finally:
        del globals()["Tagged"]
    read, _ = load(path)
    assert list(read) == list(state)
    for name, tensor in state.items():
        assert_equal(read[name], tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_read_pickle_protocols(protocol, tmp_path):
    state = OrderedDict(w=torch.randn(3, 2), count=torch.tensor(5))
    checkpoint = {"model": state, "config": Config(), "numpy": np.arange(3.0), "x": {1, 2}}
    checkpoint |= {"size": torch.Size([2, 3]), "lr": [0.1, -3, 2**70, None, True, b"bytes"]}
    torch.save(checkpoint, tmp_path / "file.pth", pickle_protocol=protocol)
    read = read_torch_file(tmp_path / "file.pth")
    assert read["size"] == (2, 3)
    assert read["lr"][:5] == [0.1, -3, 2**70, None, True]
    assert isinstance(read["config"], Inert)
    state_read, _ = select_state_dict(read)
    assert_equal(state_read["w"], state["w"])


class Config(dict):
    """A dictionary with attributes and a state, as yacs pickles it."""

    def __init__(self):
        super().__init__(a=1)
        self.self_reference = self


def test_conjugate_view_is_no_plain_tensor(tmp_path):
    torch.save({"w": torch.ones(2), "z": torch.randn(2, dtype=torch.complex64).conj()},
               tmp_path / "file.pth")  # fmt: skip
    with pytest.raises(UserError, match="entry z"):
        load(tmp_path / "file.pth")


def test_only_the_chosen_weights_are_read(tmp_path):
    n, tensors = 1 << 18, 8
    states = [{f"w{i}": torch.randn(n) for i in range(tensors)} for _ in range(4)]
    checkpoint = {"model": states[0], "model_ema": states[1], "optimizer": {"state": states[2:]}}
    torch.save(checkpoint, tmp_path / "file.pth")
    tracemalloc.start()
    try:
        state, _ = load(tmp_path / "file.pth")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for name, tensor in states[1].items():
        assert_equal(state[name], tensor)
    assert peak < 1.5 * tensors * n * 4


# Where the state dict lies


def save(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "file.pth")
    return tmp_path / "file.pth"


W, V = torch.tensor([1.0]), torch.tensor([2.0])


@pytest.mark.parametrize(
    ("checkpoint", "which", "value", "taken"),
    [
        ({"model": {"w": W}, "model_ema": {"w": V}}, None, 2, "ema"),
        ({"model": {"w": W}, "model_ema": {"w": V}}, "model", 1, "model"),
        ({"model": {"w": W}, "model_ema": None}, None, 1, "model"),
        ({"model": {"w": W}, "model_ema": {}}, None, 1, "model"),
        ({"model": {"w": W}, "model_ema": {"decay": 0.9, "module": {"w": V}}}, None, 2, "ema"),
        ({"model": {"w": W}, "model_ema": {"module.w": V}}, None, 2, "ema"),
        ({"model_ema": {"w": V}}, None, 2, "ema"),
        ({"state_dict": {"w": W}, "state_dict_ema": {"w": V}}, None, 2, "ema"),
        ({"state_dict": {"w": W}, "ema_state_dict": {"w": V}}, None, 1, "model"),
        ({"state_dict": {"module.module.w": W}, "meta": {}}, None, 1, "model"),
        ({"model": {"state_dict": {"w": W}}}, None, 1, "model"),
        ({"model_state_dict": {"_orig_mod.module.w": W}, "epoch": 3}, None, 1, "model"),
        ({"network": {"net.w": W}}, None, 1, "model"),
        ({"params": {"w": W}, "ema_model": {"model.w": V}}, None, 2, "ema"),
        ({"w": W}, None, 1, "model"),
        ({"w": W}, "model", 1, "model"),
        ({"teacher": {"w": W}, "student": {"w": V}}, "student", 2, "student"),
        ({"teacher": {"w": W}, "epoch": 3}, None, 1, "model"),
        ({"model": {"w": W}, "params": {"lr": 0.1}}, None, 1, "model"),
        ({"params": {"w": W}, "params_ema": {"w": V}}, None, 2, "ema"),
        ({"generator": {"w": W}, "epoch": 3}, "generator", 1, "generator"),
        ({"model": {"w": W}, "network": {"w": V}}, "model", 1, "model"),
        ({"ema": {"w": W}, "params_ema": {"w": V}}, "ema", 1, "ema"),
    ],
)
def test_select(checkpoint, which, value, taken, tmp_path):
    state, kind = load(save(tmp_path, checkpoint), which)
    assert list(state) == ["w"]
    assert state["w"] == value
    assert kind == taken


def test_what_was_taken_and_stripped_is_said(tmp_path, capsys):
    load(save(tmp_path, {"model": {"w": W}}))
    assert capsys.readouterr().out == ""
    load(save(tmp_path, {"network": {"_orig_mod.module.w": W, "_orig_mod.module.v": W}}))
    said = capsys.readouterr().out
    assert "took its entry 'network', stripped '_orig_mod.module.' from every name" in said


def test_settings_are_not_called_code(tmp_path, capsys):
    settings = {
        "args": argparse.Namespace(lr=0.1), "path": pathlib.Path("x"), "set": {1},
        "when": datetime.date(2024, 1, 1), "loss": np.float64(1), "device": torch.device("cpu"),
        "optimizer": torch.optim.SGD([W]).state_dict(), "counts": collections.Counter("ab"),
        "dtype": torch.float32, "array": np.ones(2), "rng": torch.get_rng_state(),
        "head": torch.nn.Linear(1, 1), "best": torch.nn.Parameter(W),
    }  # fmt: skip
    load(save(tmp_path, {"model": {"w": W}, **settings}))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("operator", "attrgetter"),
        ("glob", "glob"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.hub", "load"),
        ("pathlib", "Path.unlink"),
        ("pathlib", "_ignore_error"),
        ("mmengine.config", "Config.fromfile"),
        ("mmengine.config.evil", "evil"),
        ("pathlibs", "Path"),
        ("__main__", "Config"),
    ],
)
@pytest.mark.parametrize("names", [hostile.names, hostile.stack_names])
def test_code_that_was_not_run_is_named(module, name, names, tmp_path, capsys):
    extra = hostile.call(names(module, name), hostile.text("x"))
    path = hostile.write_zip(tmp_path / "file.pth", hostile.checkpoint(extra=extra))
    load(path)
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {path} names code: {module}.{name}; nothing of it was run")
    assert said.count("\n") == 1


def test_code_that_many_names_describe(tmp_path, capsys):
    extra = b"".join(hostile.names("m", f"f{i}") + b"0" for i in range(10)) + b"N"
    load(hostile.write_zip(tmp_path / "file.pth", hostile.checkpoint(extra=extra)))
    assert "m.f0, m.f1" in (said := capsys.readouterr().out)
    assert "m.f7 and 2 more; nothing" in said


def beside(path, place, pickled):
    """Adds a pickle to a file, in a place that the checkpoint does not reach."""
    if place == "archive":
        path.write_bytes(path.read_bytes() + pickled)
        return
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    if place == "record":
        records["file/other.pkl"] = pickled
    else:
        records["file/data.pkl"] += pickled
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)


PLACES = {
    "record": "holds further pickles: file/other.pkl",
    "pickle": "bytes after the end of its pickle",
    "archive": "bytes after the end of its archive",
}


@pytest.mark.parametrize("place", PLACES)
def test_code_beside_the_checkpoint_is_named(place, tmp_path, capsys):
    path = save(tmp_path, {"model": {"w": W}})
    # Two pickles, one after the other, of which the second breaks off.
    beside(path, place, hostile.names("glob", "glob") + b"." + hostile.names("m", "f") + b"R")
    load(path)
    said = capsys.readouterr().out
    assert f"warning: {path} names code: glob.glob, m.f and " in said
    assert PLACES[place] in said


@pytest.mark.parametrize("place", PLACES)
def test_harmful_names_beside_the_checkpoint_are_refused(place, tmp_path):
    path = save(tmp_path, {"model": {"w": W}})
    beside(path, place, hostile.names("posix", "system") + b".")
    with pytest.raises(UserError, match=r"posix\.system") as error:
        read_torch_file(path)
    assert_one_line(error, path)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_pickle_is_said(place, tmp_path, capsys):
    path = save(tmp_path, {"model": {"w": W}})
    beside(path, place, b"\xff\xfe")
    load(path)
    said = capsys.readouterr().out
    assert PLACES[place] in said
    assert "names code" not in said


def test_select_strips_module_only_from_all_names(tmp_path):
    state, _ = load(save(tmp_path, {"model": {"module.w": W, "v": V}}))
    assert list(state) == ["module.w", "v"]


@pytest.mark.parametrize(
    ("checkpoint", "which", "message"),
    [
        ({"w": W}, "ema", "only the weights of 'model', not of 'ema'"),
        ({"model_ema": {"w": W}}, "model", "only the weights of 'ema', not of 'model'"),
        ({"epoch": 3, "lr": 0.1}, None, "no weights.* epoch, lr"),
        ({"model": {}}, None, "no weights"),
        ({"model": {"state_dict": {}}}, None, "empty"),
        ({"model": {"w": W, "config": "text"}}, None, "entry config .* no plain tensor but str"),
        ({"model": {"w": np.ones(2)}}, None, r"entry w .*numpy"),
        ({"model": {"w": torch.eye(2).to_sparse()}}, None, "entry w .*sparse"),
        ({"w": W, "epoch": 3}, None, "entry epoch"),
        ({"model": torch.nn.Linear(1, 1)}, None, "pickled torch.nn.modules.linear.Linear, not a"),
        ({"model": {0: W}}, None, "name"),
        ([W], None, "no state dict"),
        (W, None, "no state dict"),
        ({"model": {"w": W}}, "weights", "unknown weights 'weights'"),
        ({"g": {"w": W}}, "weights", "choose 'model' or 'ema' or 'g'"),
        (
            {"teacher": {"w": W}, "student": {"w": V}},
            None,
            "models: teacher, student; .* --weights",
        ),
        ({"model": {"w": W}, "network": {"w": V}}, None, "models: model, network; .* --weights"),
        ({"ema": {"w": W}, "params_ema": {"w": V}}, None, "models: ema, params_ema; choose"),
    ],
)
def test_select_refuses(checkpoint, which, message, tmp_path):
    path = save(tmp_path, checkpoint)
    with pytest.raises(UserError, match=message) as error:
        load(path, which)
    assert "\n" not in str(error.value)


# What we write


def test_write_is_read_by_pytorch(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        dtype: values_of(dtype).to(torch.float32 if dtype == "bfloat16" else getattr(torch, dtype))
        for dtype in DTYPES
    }
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    arrays["bfloat16"] = arrays["bfloat16"].astype(ml_dtypes.bfloat16)
    arrays["scalar"] = np.array(1000)
    arrays["empty"] = np.zeros((2, 0, 3), np.float32)
    arrays["transposed"] = rng.standard_normal((3, 4, 5)).transpose(2, 0, 1)
    arrays["a.name.with.ümlaut"] = np.float32([1, 2])
    path = tmp_path / "file.pth"
    write_torch_file(path, arrays)

    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert type(loaded) is OrderedDict
        assert list(loaded) == list(arrays)
        for name, array in arrays.items():
            assert_equal(array, loaded[name])
            assert loaded[name].is_contiguous()
    read, taken = load(path)
    assert taken == "model"
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, strict=True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert os.listdir(tmp_path) == ["file.pth"]


def test_write_loads_into_a_module(tmp_path):
    modules = [torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)) for _ in "ab"]
    state = {name: tensor.numpy() for name, tensor in modules[0].state_dict().items()}
    write_torch_file(tmp_path / "file.pth", state)
    modules[1].load_state_dict(torch.load(tmp_path / "file.pth", weights_only=True), strict=True)
    for a, b in zip(
        modules[0].state_dict().values(), modules[1].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_write_is_deterministic_and_aligned(tmp_path):
    state = {"a": np.arange(3.0), "bc": np.arange(5)}
    for name in ("one.pth", "two.pth"):
        write_torch_file(tmp_path / name, state)
    data = (tmp_path / "one.pth").read_bytes()
    assert data == (tmp_path / "two.pth").read_bytes()
    for array in state.values():
        assert data.index(array.tobytes()) % 64 == 0


def test_write_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "file.pth"
    write_torch_file(path, {"w": np.ones(2)})
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match="No space left"):
            write_torch_file(path, {"w": np.zeros(2)})
    with pytest.raises(UserError, match="'w': dtype"):
        write_torch_file(path, {"w": np.array(["text"])})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file.pth"]
    with pytest.raises(UserError, match="cannot be written"):
        write_torch_file(tmp_path / "missing" / "file.pth", {"w": np.ones(2)})


def test_tensor_describes_itself_without_reading(small):
    tensor = read_torch_file(small[0])["model"]["transposed"]
    assert isinstance(tensor, Tensor)
    assert (tensor.shape, tensor.dtype, tensor.strides) == ((6, 4), np.float32, (1, 6))
