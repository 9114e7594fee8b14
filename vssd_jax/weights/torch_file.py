"""PyTorch `.pth` files without PyTorch: read safely, written so that `torch.load` reads them.

A `.pth` file is a zip archive of uncompressed records: `<root>/data.pkl` is a pickle that
describes the saved object, `<root>/data/<key>` holds the bytes of one storage. A pickle is a
program, so this module does not hand it to `pickle`. It walks the opcodes (`pickletools`) and
builds plain Python data; the only calls it knows rebuild a tensor from a storage, an
`OrderedDict` or a `torch.Size`. Every other global, and whatever a file does with it, becomes an
`Inert` value that keeps only its name: configs, optimizers and NumPy objects load without their
packages, and nothing in a file can run. No other way of loading exists.

Storages are read and checked against their CRC only when a tensor's array is asked for.
"""

import contextlib
import io
import os
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vssd_jax.distributed import say
from vssd_jax.errors import UserError

# Far above any real checkpoint (base with its EMA and optimizer takes 100,000 opcodes; mmengine's
# histories a few megabytes), and low enough that a made-up pickle ends within seconds.
_MAX_PICKLE_BYTES = 256 << 20
_MAX_OPCODES = 1_000_000
# No name in a checkpoint is longer. Shorter strings cost nothing to copy, compare or hash, however
# often a made-up pickle asks for it.
_MAX_NAME = 1000
# Expanded tensors (stride 0) may add up to more bytes than the file has, up to this many.
_MAX_EXPANDED_BYTES = 64 << 20

_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

# A checkpoint that names one of these was made to do harm. Reading it would be harmless even so
# (safety does not rest on this list), but the user should know.
# fmt: off
_HARMFUL_MODULES = frozenset({
    "os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "ctypes", "_ctypes", "importlib",
    "imp", "runpy", "pty", "code", "codeop", "pdb", "bdb", "timeit", "cProfile", "profile",
    "trace", "pickle", "_pickle", "marshal", "webbrowser", "multiprocessing", "asyncio", "http",
    "urllib", "ftplib", "smtplib", "tempfile", "pip",
})
_HARMFUL_BUILTINS = frozenset({
    "eval", "exec", "execfile", "compile", "open", "__import__", "input", "breakpoint", "setattr",
    "delattr",
})
# fmt: on

# What trainers keep beside the weights: values, settings and classes that hold them. Whatever else
# a file names is reported, since loading the file elsewhere may run it.
# fmt: off
_SETTINGS = frozenset({
    "_codecs.encode", "argparse.Namespace", "collections.Counter", "collections.OrderedDict",
    "collections.defaultdict", "collections.deque", "copyreg._reconstructor", "datetime.date",
    "datetime.datetime", "datetime.time", "datetime.timedelta", "datetime.timezone",
    "decimal.Decimal", "easydict.EasyDict", "fractions.Fraction", "numpy.dtype", "numpy.ndarray",
    "torch.Generator", "torch.Tensor", "torch._C._nn.gelu", "torch.device", "torch.dtype",
    "torch.layout", "torch.memory_format", "torch.serialization._get_layout",
    "types.SimpleNamespace", "uuid.UUID", "yacs.config.CfgNode",
    *(f"torch.{name}" for name in (
        "complex32", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "qint8", "qint32",
        "quint8",
    )),
    *(f"numpy.{name}" for name in (
        "bool", "bool_", "complex128", "complex64", "float16", "float32", "float64", "int16",
        "int32", "int64", "int8", "str_", "uint16", "uint32", "uint64", "uint8",
    )),
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in (
        "multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer",
    )),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in (
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list",
        "object", "range", "set", "slice", "str", "tuple",
    )),
})
# Packages whose classes hold settings or arrays; their functions are reported all the same.
_SETTINGS_PACKAGES = (
    "addict", "ml_collections.config_dict", "mmcv.utils.config", "mmengine.config",
    "mmengine.logging", "numpy.dtypes", "omegaconf", "pathlib", "torch.nn.modules",
    "torch.nn.parameter", "torch.optim", "torch.storage",
)
# fmt: on
# Pickles are looked for in other parts of a file as well, so many in all.
_MAX_OTHER_PICKLES = 8

_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


class _Refused(ValueError):
    """A file that is not read, and why; the message is for the user."""


class _Harmful(_Refused):
    """A file that names what only a harmful one would."""


def _show(text: str, limit: int = 80) -> str:
    """Text of a file for a message: one line, plain ASCII, of limited length."""
    plain = ascii(text[: limit + 1])[1:-1]
    return plain if len(plain) <= limit else plain[:limit] + "..."


@dataclass(frozen=True, slots=True)
class Inert:
    """Stands for anything in a file that is not plain data or a tensor. It does nothing."""

    name: str


class _Archive:
    """The records of one zip file, checked so that nothing larger than the file is ever read."""

    def __init__(self, path: str) -> None:
        self.path = path
        if not os.path.exists(path):
            raise _Refused("no such file")
        if not os.path.isfile(path):
            raise _Refused("not a file")
        self.file_size = size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(64)
        if not head.startswith(b"PK\x03\x04"):
            raise _Refused(_describe_other_format(head))
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except Exception as error:
            raise _Refused("the zip archive is truncated or corrupt") from error

        self.records: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            name = entry.filename
            if name in self.records:
                raise _Refused(f"corrupt: two records are named {_show(name)}")
            if entry.flag_bits & 1:
                raise _Refused(f"record {_show(name)} is encrypted")
            if name.endswith("/constants.pkl") or "/code/" in name:
                raise _Refused(
                    "a TorchScript program (of torch.jit.save), not a checkpoint; save its "
                    "state_dict() by torch.save(torch.jit.load(file).state_dict(), other_file)"
                )
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise _Refused(f"record {_show(name)} is compressed, which PyTorch never does")
            if entry.header_offset < 0 or entry.header_offset + entry.file_size > size:
                raise _Refused(f"truncated or corrupt: record {_show(name)} is not all there")
            self.records[name] = entry
        # Records that overlap could add up to far more memory than the file's size.
        if sum(entry.file_size for entry in entries) > size:
            raise _Refused("corrupt: records overlap")

        roots = [name[: -len("data.pkl")] for name in self.records if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise _Refused("not a PyTorch file: a zip archive with no data.pkl, or with several")
        self.root = roots[0]
        if self.root + "constants.pkl" in self.records:
            raise _Refused("a TorchScript archive: save the model's state_dict() instead")

    def size(self, name: str) -> int:
        """The size of record `name` in bytes."""
        if self.root + name not in self.records:
            raise _Refused(f"truncated or corrupt: record {_show(name)} is missing")
        return self.records[self.root + name].file_size

    def read(self, name: str) -> bytes:
        """The bytes of record `name`, checked against their CRC."""
        size, entry = self.size(name), self.records[self.root + name]
        try:
            with open(self.path, "rb") as file:
                file.seek(entry.header_offset)
                # The local header repeats the central one; only its length is of use.
                magic, name_size, extra_size = struct.unpack("<4s22xHH", file.read(30))
                local_name = file.read(name_size)
                file.seek(extra_size, os.SEEK_CUR)
                data = file.read(size)
        except (OSError, struct.error) as error:
            raise _Refused(f"record {_show(name)} cannot be read") from error
        encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
        same_name = local_name.decode(encoding, "replace") == entry.orig_filename
        if magic != b"PK\x03\x04" or not same_name or zlib.crc32(data) != entry.CRC:
            raise _Refused(f"corrupt: record {_show(name)} does not match its checksum")
        return data

    def tail(self) -> bytes:
        """The bytes after the end of the archive, at most some 64 kB: a longer one hides it."""
        with open(self.path, "rb") as file:
            file.seek(-min(self.file_size, 22 + 2 * 65535), os.SEEK_END)
            end = file.read()
        record = end.rfind(b"PK\x05\x06")
        if record < 0 or len(end) < record + 22:
            return b""
        comment_size = int.from_bytes(end[record + 20 : record + 22], "little")
        return end[record + 22 + comment_size :]


def _describe_other_format(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if head.startswith(_LEGACY_MAGIC):
        return (
            "written in PyTorch's legacy format (before 1.6), which is not read; load it with "
            "PyTorch and save it again with torch.save"
        )
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    return "not a PyTorch file (a .pth file is a zip archive)"


@dataclass(frozen=True, eq=False)
class _Storage:
    archive: _Archive
    key: str
    dtype: np.dtype | None  # None: untyped bytes; the tensor has the dtype
    nbytes: int


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor in the file. `array()` reads it.

    `offset` and `strides` count elements, as in PyTorch.
    """

    storage: _Storage
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """The values: a C-contiguous, read-only array of `shape` and `dtype`.

        Raises:
          UserError: the storage is corrupt.
        """
        return _read_tensors({"": self})[""]


def _read_tensors(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Arrays by name; each storage is read once, and tensors that share it may share memory."""
    buffers: dict[tuple[_Archive, str], bytes] = {}
    arrays = {}
    copied = 0
    for name, tensor in tensors.items():
        archive, key = tensor.storage.archive, tensor.storage.key
        try:
            if (archive, key) not in buffers:
                buffers[archive, key] = archive.read(f"data/{key}")
            array = _view(tensor, buffers[archive, key])
            if not array.flags.c_contiguous:
                copied += array.nbytes
                if copied > (limit := archive.file_size + _MAX_EXPANDED_BYTES):
                    raise _Refused(f"its tensors are expanded to more than {limit} bytes")
                array = array.copy()
        except _Refused as error:
            raise UserError(f"{archive.path}: {error}") from error
        array.flags.writeable = False
        arrays[name] = array
    return arrays


def _view(tensor: Tensor, buffer: bytes) -> np.ndarray:
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, tensor.dtype)
    itemsize = tensor.dtype.itemsize
    # The stride of an axis of length 1 is never used and may be anything.
    strides = [
        stride * itemsize if n > 1 else 0
        for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    return np.ndarray(tensor.shape, tensor.dtype, buffer, tensor.offset * itemsize, strides)


def _size(shape: Iterable[int]) -> int:
    """The number of elements, in exact integers."""
    size = 1
    for n in shape:
        size *= n
    return size


def _is_counts(values: Any) -> bool:
    if type(values) is not tuple or len(values) > 32:
        return False
    return all(type(n) is int and 0 <= n < 2**62 for n in values)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None
) -> Tensor:
    """A tensor whose every element is known to lie inside its storage."""
    if not isinstance(storage, _Storage):
        raise _Refused("corrupt: a tensor without a storage")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, np.dtype):
        raise _Refused("corrupt: a tensor without a dtype")
    if not (_is_counts((offset,)) and _is_counts(shape) and _is_counts(strides)):
        raise _Refused("corrupt: a tensor with an impossible shape, stride or offset")
    if len(shape) != len(strides):
        raise _Refused("corrupt: a tensor's shape and strides do not agree")
    size = _size(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if size and (last + 1) * dtype.itemsize > storage.nbytes:
        raise _Refused("corrupt: a tensor reaches outside its storage")
    if _size(max(n, 1) for n in shape) * dtype.itemsize >= 2**62:
        raise _Refused("corrupt: a tensor with an impossible shape, stride or offset")
    return Tensor(storage, dtype, shape, offset, strides)


# The known calls. Each takes the arguments of the pickled call.


def _call_tensor_v2(args: Sequence[Any]) -> Tensor | Inert:
    if len(args) == 7 and args[6]:  # metadata: a conjugate or negative view
        return Inert("torch.Tensor")
    storage, offset, shape, strides, _requires_grad, _hooks = args[:6]
    return _rebuild_tensor(storage, offset, shape, strides)


def _call_tensor_v3(args: Sequence[Any]) -> Tensor | Inert:
    if len(args) == 8 and args[7]:
        return Inert("torch.Tensor")
    storage, offset, shape, strides, _requires_grad, _hooks, dtype = args[:7]
    return _rebuild_tensor(storage, offset, shape, strides, dtype)


def _call_tensor_v1(args: Sequence[Any]) -> Tensor:
    storage, offset, shape, strides = args
    return _rebuild_tensor(storage, offset, shape, strides)


def _call_parameter(args: Sequence[Any]) -> Any:
    return args[0]


def _call_from_type(args: Sequence[Any]) -> Any:
    # A tensor subclass: its data without the class and its attributes.
    function, _type, inner_args, _state = args
    if isinstance(function, _Function) and function.call is _call_from_type:
        raise _Refused("corrupt: a tensor subclass inside a tensor subclass")
    return _call(function, inner_args)


def _call_dict(args: Sequence[Any]) -> dict[Any, Any]:
    if args:  # Python 3 sets the items afterwards
        raise _Refused("corrupt: an OrderedDict with arguments")
    return {}


def _call_size(args: Sequence[Any]) -> tuple[int, ...]:
    (shape,) = args
    if not _is_counts(shape):
        raise _Refused("corrupt: an impossible torch.Size")
    return shape


@dataclass(frozen=True)
class _Function:
    name: str
    call: Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype | None


_GLOBALS = {
    ("collections", "OrderedDict"): _Function("OrderedDict", _call_dict),
    ("torch", "Size"): _Function("torch.Size", _call_size),
    ("torch._utils", "_rebuild_tensor"): _Function("tensor", _call_tensor_v1),
    ("torch._utils", "_rebuild_tensor_v2"): _Function("tensor", _call_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Function("tensor", _call_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Function("parameter", _call_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function("parameter", _call_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Function("tensor", _call_from_type),
    ("torch.storage", "UntypedStorage"): _StorageType(None),
    **{("torch", name): _StorageType(_DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


def _find_global(module: Any, name: Any, named: set[str]) -> Any:
    """What a global stands for; one that may be code is added to `named`."""
    if type(module) is not str or type(name) is not str:
        raise _Refused("corrupt: a global without a name")
    if len(module) + len(name) > _MAX_NAME // 4:
        raise _Refused("corrupt: a global with a name of unlikely length")
    if (module, name) in _GLOBALS:
        return _GLOBALS[module, name]
    root, path = module.split(".")[0], name.split(".")
    if (
        not _HARMFUL_MODULES.isdisjoint([root, *path[:-1]])  # a dotted name reaches into modules
        or (root in ("builtins", "__builtin__") and not _HARMFUL_BUILTINS.isdisjoint(path))
    ):
        raise _Harmful(
            f"refused: it calls for {_show(f'{module}.{name}')}, which has no place in a "
            "checkpoint; nothing of it was run. Get the file from a source you trust"
        )
    if not _is_settings(module, name):
        named.add(f"{module}.{name}")
    return Inert(f"{module}.{name}")


def _is_settings(module: str, name: str) -> bool:
    if f"{module}.{name}" in _SETTINGS or (module, name[:9]) == ("torch._utils", "_rebuild_"):
        return True
    # A name with a dot reaches from a class into its functions and modules.
    is_class = name.lstrip("_")[:1].isupper() and "." not in name
    return is_class and any(f"{module}.".startswith(f"{p}.") for p in _SETTINGS_PACKAGES)


def _call(function: Any, args: Any) -> Any:
    if isinstance(function, Inert):
        return function
    if not isinstance(function, _Function) or type(args) not in (tuple, list):
        raise _Refused("corrupt: a call of something that is no function")
    return function.call(args)


def _key(key: Any) -> Any:
    """A dictionary key that is quick to hash and compare; others a file can make take for ever."""
    if type(key) is str and len(key) <= _MAX_NAME:
        return key
    if key is None or (type(key) is int and -(2**31) < key < 2**31):
        return key
    return Inert(f"{type(key).__name__} key")


# Opcodes whose argument is the value itself.
# fmt: off
_LITERALS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
})
# fmt: on
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GETS = frozenset({"BINGET", "LONG_BINGET", "GET"})
_PUTS = frozenset({"BINPUT", "LONG_BINPUT", "PUT"})


def _set_items(target: Any, items: list) -> None:
    if type(target) is dict:
        if len(items) % 2:
            raise _Refused("corrupt: a key without a value")
        target.update((_key(items[i]), items[i + 1]) for i in range(0, len(items), 2))
    elif not isinstance(target, Inert):
        raise _Refused("corrupt: items set on something that is no dictionary")


def _append(target: Any, items: list) -> None:
    if type(target) is list:
        target.extend(items)
    elif not isinstance(target, Inert):
        raise _Refused("corrupt: items appended to something that is no list")


def _interpret(
    pickled: bytes, find_storage: Callable[[Any], Any], named: set[str]
) -> tuple[Any, int]:
    """The data that a pickle describes: dict, list, tuple, atoms, `Tensor` and `Inert`.

    A machine of its own, in which no opcode reaches a Python object that can act: a reduced,
    built or instantiated `Inert` stays what it is, and state set on any value is dropped.

    Args:
      pickled: the pickle; bytes may follow it.
      find_storage: what a persistent id stands for.
      named: gets the names of what may be code.

    Returns:
      The data, and how many bytes follow the pickle's end.
    """
    stack: list = []
    marks: list[list] = []  # the stacks below each MARK
    memo: dict[int, Any] = {}

    def pop_mark() -> list:
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    arg: Any  # its type is that of the opcode
    for count, (opcode, arg, place) in enumerate(pickletools.genops(io.BytesIO(pickled))):
        if count >= _MAX_OPCODES:
            raise _Refused("its pickle has too many steps for a checkpoint")
        name = opcode.name
        if name in _PUTS:
            memo[arg] = stack[-1]
        elif name in _LITERALS:
            stack.append(arg)
        elif name in _GETS:
            stack.append(memo[arg])
        elif name in _TUPLES:
            n = _TUPLES[name]
            if len(stack) < n:
                raise _Refused("corrupt: a tuple of too few items")
            stack[-n:] = [tuple(stack[-n:])]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        else:
            match name:
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "MARK":
                    marks.append(stack)
                    stack = []
                case "TUPLE":
                    items = pop_mark()
                    stack.append(tuple(items))
                case "REDUCE" | "NEWOBJ":
                    args = stack.pop()
                    stack[-1] = _call(stack[-1], args)
                case "GLOBAL":
                    module, attribute = arg.split(" ", 1)
                    stack.append(_find_global(module, attribute, named))
                case "BINPERSID":
                    stack.append(find_storage(stack.pop()))
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "SETITEMS":
                    items = pop_mark()
                    _set_items(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _set_items(stack[-1], [key, value])
                case "APPENDS":
                    items = pop_mark()
                    _append(stack[-1], items)
                case "APPEND":
                    item = stack.pop()
                    _append(stack[-1], [item])
                case "BUILD":
                    stack.pop()
                case "DICT":
                    items = pop_mark()
                    stack.append({})
                    _set_items(stack[-1], items)
                case "LIST":
                    items = pop_mark()
                    stack.append(items)
                case "EMPTY_SET":
                    stack.append(Inert("set"))
                case "FROZENSET":
                    pop_mark()
                    stack.append(Inert("frozenset"))
                case "ADDITEMS":
                    items = pop_mark()
                    if not isinstance(stack[-1], Inert):
                        raise _Refused("corrupt: items added to something that is no set")
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(_find_global(module, attribute, named))
                case "NEWOBJ_EX":
                    kwargs, args = stack.pop(), stack.pop()
                    if kwargs and isinstance(stack[-1], _Function):
                        raise _Refused("corrupt: a call with unknown arguments")
                    stack[-1] = _call(stack[-1], args)
                case "INST":
                    args = pop_mark()
                    module, attribute = arg.split(" ", 1)
                    stack.append(_call(_find_global(module, attribute, named), args))
                case "OBJ":
                    function, *args = pop_mark()
                    stack.append(_call(function, args))
                case "DUP":
                    stack.append(stack[-1])
                case "POP":
                    # Of an empty stack it takes the mark, as pickle does.
                    if stack:
                        stack.pop()
                    else:
                        pop_mark()
                case "POP_MARK":
                    pop_mark()
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop(), len(pickled) - int(place or 0) - 1
                case _:  # EXT1 EXT2 EXT4 PERSID NEXT_BUFFER READONLY_BUFFER
                    raise _Refused(f"its pickle uses {name}, which PyTorch never writes")
    raise _Refused("truncated: its pickle has no end")


def _storage_finder(archive: _Archive) -> Callable[[Any], _Storage]:
    def find_storage(pid: Any) -> _Storage:
        if type(pid) is not tuple or len(pid) != 5 or type(pid[0]) is not str:
            raise _Refused("corrupt: a storage that is described in an unknown way")
        tag, storage_type, key, _location, numel = pid
        known_key = type(key) is str and len(key) <= _MAX_NAME
        if tag != "storage" or not known_key or not _is_counts((numel,)):
            raise _Refused("corrupt: a storage that is described in an unknown way")
        if not isinstance(storage_type, _StorageType):
            what = _show(storage_type.name) if isinstance(storage_type, Inert) else "another type"
            raise _Refused(f"a storage of {what}, which is not supported")
        dtype = storage_type.dtype
        nbytes = numel * (1 if dtype is None else dtype.itemsize)
        if nbytes != archive.size(f"data/{key}"):
            raise _Refused(f"truncated or corrupt: record data/{_show(key)} has the wrong size")
        return _Storage(archive, key, dtype, nbytes)

    return find_storage


def read_torch_file(path: str | os.PathLike) -> Any:
    """Reads the object saved in a PyTorch file (zip format, little-endian).

    Args:
      path: a file that `torch.save` wrote.

    Returns:
      Nested dicts (also for `OrderedDict`), lists, tuples, numbers, strings, bytes and None, with
      a `Tensor` for each tensor or parameter and an `Inert` for everything else. The tensors'
      values stay in the file until `Tensor.array` or `select_state_dict` reads them.

    Raises:
      UserError: the file is missing, truncated, corrupt, hostile, in the legacy format, or no
        PyTorch file. Nothing in a file is ever run.
    """
    path = os.fspath(path)
    try:
        archive = _Archive(path)
        if archive.root + "byteorder" in archive.records:
            order = archive.read("byteorder") if archive.size("byteorder") < 16 else b""
            if order != b"little":
                raise _Refused("written on a big-endian machine, which is not supported")
        if archive.size("data.pkl") > _MAX_PICKLE_BYTES:
            raise _Refused("its pickle is far too large for a checkpoint")
        named: set[str] = set()
        pickled = archive.read("data.pkl")
        data, rest = _interpret(pickled, _storage_finder(archive), named)
        others = _find_others(archive, pickled[len(pickled) - rest :], named)
    except _Refused as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # any failure means that this pickle is no checkpoint's
        raise UserError(
            f"{path}: corrupt: its pickle cannot be interpreted ({type(error).__name__})"
        ) from error
    found = [f"names code: {', '.join(_show(name) for name in sorted(named)[:8])}"] if named else []
    if len(named) > 8:
        found[0] += f" and {len(named) - 8} more"
    if found or others:
        say(
            f"warning: {path} {' and '.join(found + others)}; nothing of it was run here. Loading "
            "the file with torch.load or pickle may run it"
        )
    return data


def _find_others(archive: _Archive, rest: bytes, named: set[str]) -> list[str]:
    """Describes what has no place beside the checkpoint; `named` gets the code that it names."""
    found, pickles = [], []
    if rest:
        found.append(f"has {len(rest)} bytes after the end of its pickle")
        pickles.append(rest)
    if tail := archive.tail():
        found.append(f"has {len(tail)} bytes after the end of its archive")
        pickles.append(tail)
    others = [n for n in archive.records if n.endswith(".pkl") and n != archive.root + "data.pkl"]
    if others:
        found.append(f"holds further pickles: {', '.join(_show(n) for n in others[:8])}")
    for name in others[:_MAX_OTHER_PICKLES]:
        # Only names inside the root are read; the others are reported all the same.
        inside = name.startswith(archive.root)
        if inside and archive.records[name].file_size <= _MAX_PICKLE_BYTES:
            pickles.append(archive.read(name.removeprefix(archive.root)))
    for _ in range(_MAX_OTHER_PICKLES):
        if not pickles:
            break
        pickled = pickles.pop()
        try:
            _, size = _interpret(pickled, lambda _: Inert("storage"), named)
        except _Harmful:
            raise
        except Exception:  # it is no pickle
            continue
        if size:
            pickles.append(pickled[len(pickled) - size :])
    return found


# The keys of the state dict: the authors' classification trainer writes `model` and `model_ema`,
# mmengine writes `state_dict`, timm `state_dict` and `state_dict_ema`. (mmengine's
# `ema_state_dict` is no EMA: it swaps the two on saving.)
_PLAIN = ("model", "state_dict", "model_ema", "state_dict_ema")
_ENTRIES = {
    "model": (
        "model", "state_dict", "model_state_dict", "network", "net", "params", "module", "teacher",
        "student",
    ),
    "ema": ("model_ema", "state_dict_ema", "ema_model", "ema", "params_ema"),
}  # fmt: skip
# What wrappers of a model put before every name: DistributedDataParallel, torch.compile, Lightning
# and others.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "encoder.")
_WRAPPERS = ("state_dict", "model", "ema", "module")


def _unwrap(value: Any) -> Any:
    """The dictionary of tensors inside wrappers such as `{"state_dict": {...}}`."""
    for _ in range(3):
        if type(value) is not dict or any(isinstance(v, Tensor) for v in value.values()):
            break
        inner = [value[key] for key in _WRAPPERS if type(value.get(key)) is dict]
        if len(inner) != 1:
            break
        value = inner[0]
    return value


def shared_prefix(names: Iterable[str]) -> str:
    """What stands before all names and is made of `_PREFIXES`, or nothing."""
    names, found = list(names), ""
    while names:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) and name != prefix for name in names):
                names = [name.removeprefix(prefix) for name in names]
                found += prefix
                break
        else:
            break
    return found


def select_state_dict(
    checkpoint: Any, which: str | None = None, path: str | os.PathLike = "checkpoint"
) -> tuple[dict[str, np.ndarray], str]:
    """Finds the state dict in what `read_torch_file` gave, and reads its tensors.

    Args:
      checkpoint: a classification checkpoint (`model`, `model_ema`), a detector's or segmentor's
        (`state_dict`), or a bare state dict.
      which: "model", "ema", the file's own name of an entry, or None for the EMA where the file
        has one, else the model.
      path: the file's name, for messages.

    Returns:
      The arrays by PyTorch name, in the file's order, without prefixes that wrappers of the model
      put before every name; and which was taken, "model", "ema" or the entry's name. The arrays
      are read-only and C-contiguous; those that share a storage may share memory. What is not
      plainly named is printed.

    Raises:
      UserError: no such state dict or several, an entry that is no tensor, or a corrupt storage.
    """
    path = os.fspath(path)
    if type(checkpoint) is not dict:
        raise UserError(f"{path}: holds no state dict; save a model's state_dict()")

    taken, entry = _choose(checkpoint, which, path)
    notes = [] if entry in (None, *_PLAIN) else [f"took its entry {entry!r}"]
    state = checkpoint if entry is None else _unwrap(checkpoint[entry])
    if isinstance(state, Inert):
        raise UserError(
            f"{path}: its {taken!r} entry is a pickled {_show(state.name)}, not a state dict"
        )
    if not state:
        raise UserError(f"{path}: its state dict is empty")
    for key, value in state.items():
        if type(key) is not str or not key.isprintable():
            raise UserError(f"{path}: its state dict has an entry whose name is no plain text")
        if not isinstance(value, Tensor):
            kind = value.name if isinstance(value, Inert) else type(value).__name__
            raise UserError(
                f"{path}: entry {_show(key)} of its state dict is no plain tensor but {_show(kind)}"
            )
    if prefix := shared_prefix(state):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        notes.append(f"stripped {prefix!r} from every name")
    if notes:
        say(f"{path}: {', '.join(notes)}")
    return _read_tensors(state), taken


def _choose(checkpoint: dict, which: str | None, path: str) -> tuple[str, str | None]:
    """What is taken, see `select_state_dict`, and its entry; None: the file is the state dict."""
    found = {
        kind: [
            name
            for name in names
            if isinstance(value := checkpoint.get(name), Inert) or (type(value) is dict and value)
        ]
        for kind, names in _ENTRIES.items()
    }
    if which is not None and _holds_tensors(checkpoint.get(which)):
        return which, which
    if which not in (None, *found):
        raise UserError(f"{path}: unknown weights {which!r}: choose {_choices(checkpoint)}")
    if not any(found.values()) and any(isinstance(v, Tensor) for v in checkpoint.values()):
        if which == "ema":
            raise UserError(f"{path}: holds only the weights of 'model', not of 'ema'")
        return "model", None
    taken = which or ("ema" if found["ema"] else "model")
    if not found[taken]:
        there = [repr(kind) for kind, names in found.items() if names]
        what = f"only the weights of {' and '.join(there)}" if there else "no weights"
        keys = ", ".join(_show(key, 30) for key in list(checkpoint)[:8] if type(key) is str)
        raise UserError(f"{path}: holds {what}, not of {taken!r} (its entries: {keys or 'none'})")
    names = [name for name in found[taken] if _holds_tensors(checkpoint[name])] or found[taken]
    if len(names) > 1:
        raise UserError(
            f"{path}: holds several models: {', '.join(names)}; choose one of them with --weights "
            "of convert_torch_weights.py"
        )
    return taken, names[0]


def _choices(checkpoint: dict) -> str:
    names = [str(name) for name, value in checkpoint.items() if _holds_tensors(value)]
    others = [_show(name, 30) for name in names if name not in _ENTRIES]
    return " or ".join(map(repr, [*_ENTRIES, *others[:8]]))


def _holds_tensors(value: Any) -> bool:
    inner = _unwrap(value)
    return type(inner) is dict and any(isinstance(v, Tensor) for v in inner.values())


def _pickle_state_dict(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Protocol 2 opcodes for an `OrderedDict` of tensors, storage i holding the i-th tensor."""

    def text(value: str) -> bytes:
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    def number(value: int) -> bytes:
        if value < 2**31:
            return b"J" + struct.pack("<i", value)
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values: Iterable[int]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    empty_dict = b"ccollections\nOrderedDict\n)R"
    storage_names = {_DTYPES[dtype]: name for name, dtype in _STORAGES.items()}
    out = [b"\x80\x02", empty_dict, b"("]
    for i, (name, array) in enumerate(tensors.items()):
        if array.dtype not in storage_names:
            raise UserError(f"tensor {name!r}: dtype {array.dtype} cannot be written")
        strides = [_size(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        out += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        out += [text("storage"), f"ctorch\n{storage_names[array.dtype]}\n".encode(), text(str(i))]
        out += [text("cpu"), number(array.size), b"tQ", number(0)]
        out += [numbers(array.shape), numbers(strides), b"\x89", empty_dict, b"tR"]
    return b"".join([*out, b"u."])


def write_torch_file(path: str | os.PathLike, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as a `.pth` file that `torch.load(path, weights_only=True)` reads.

    The file is written beside `path` and then renamed: it is there whole or not at all.

    Args:
      path: the file to write; an older file of that name is replaced.
      state_dict: arrays by PyTorch name, of any dtype PyTorch can store (also
        `ml_dtypes.bfloat16`).

    Raises:
      UserError: a dtype that PyTorch cannot store, or a path that cannot be written.
    """
    path = os.fspath(path)
    arrays = {name: np.asarray(array) for name, array in state_dict.items()}
    temporary = f"{path}.{os.getpid()}.tmp"
    records = [("data.pkl", _pickle_state_dict(arrays)), ("byteorder", b"little")]
    try:
        with open(temporary, "wb") as file:
            try:
                with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                    for name, data in records:
                        _write_record(archive, file, name, data)
                    for i, array in enumerate(arrays.values()):
                        if sys.byteorder == "big":
                            array = array.byteswap()
                        values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                        _write_record(archive, file, f"data/{i}", values.data)
                    _write_record(archive, file, "version", b"3\n")
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _write_record(
    archive: zipfile.ZipFile, file: BinaryIO, name: str, data: bytes | memoryview
) -> None:
    # No date, so that the same weights give the same file. An extra field pads each record to a
    # multiple of 64 bytes, as PyTorch does, so that it can be mapped into memory.
    entry = zipfile.ZipInfo(f"archive/{name}")
    padding = -(file.tell() + 30 + len(entry.filename) + 4) % 64
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(entry, data)
