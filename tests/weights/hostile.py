"""Checkpoints made to do harm: a payload in every place that a pickle allows.

The payloads create a file `vssd_pwned` in the working folder, set an environment variable, or
change a class or a function of this process; `effects` says what has happened.
"""

import copyreg
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from vssd_jax.weights import torch_file

MARKER = "vssd_pwned"
COMMAND = f"touch {MARKER}"
EVIL_MODULE = "vssd_evil_module"  # a module beside the checkpoint whose import is the payload
_EXTENSION = 240


# An assembler for pickles (protocol 2 and later; no PROTO opcode is needed).


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def names(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stack_names(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def items(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def call(function: bytes, *args: bytes) -> bytes:
    return function + items(*args) + b"R"


def mapping(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


_STORAGE = (b"ctorch\nFloatStorage\n", text("0"), text("cpu"), number(4))
_SQUARE = items(number(2), number(2))
_ROWS = items(number(2), number(1))
_NO_HOOKS = b"ccollections\nOrderedDict\n)R"


def storage(kind=_STORAGE[0], key=_STORAGE[1], location=_STORAGE[2], numel=_STORAGE[3]) -> bytes:
    return items(text("storage"), kind, key, location, numel) + b"Q"


_FOUR_FLOATS = storage()


def tensor(
    storage=_FOUR_FLOATS,
    offset=b"K\x00",
    shape=_SQUARE,
    stride=_ROWS,
    hooks=_NO_HOOKS,
    function=b"ctorch._utils\n_rebuild_tensor_v2\n",
) -> bytes:
    return call(function, storage, offset, shape, stride, b"\x89", hooks)


def checkpoint(model: bytes | None = None, **others: bytes) -> bytes:
    return mapping(model=model or mapping(weight=tensor()), **others) + b"."


def write_zip(path: Path, pickled: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for name, data in (records or {"archive/data/0": bytes(16)}).items():
            archive.writestr(name, data)
        archive.writestr("archive/version", b"3\n")
    return path


# The corpus.

_SYSTEM = names("posix", "system")
_PAYLOAD = call(_SYSTEM, text(COMMAND))
_LAZY = call(names("builtins", "map"), _SYSTEM, b"](" + text(COMMAND) + b"e")


def _namespace(**attributes: bytes) -> bytes:
    return call(names("types", "SimpleNamespace")) + mapping(**attributes) + b"b"


@dataclass(frozen=True)
class Hostile:
    """A pickle, and whether it names what no checkpoint needs, for which it is refused."""

    pickled: bytes
    refused: bool = True


CORPUS = {
    "value_beside_the_weights": Hostile(checkpoint(config=_PAYLOAD)),
    "value_in_place_of_a_tensor": Hostile(checkpoint(mapping(weight=_PAYLOAD))),
    "value_in_place_of_the_state_dict": Hostile(checkpoint(_PAYLOAD)),
    "whole_file": Hostile(_PAYLOAD + b"."),
    "key": Hostile(b"}" + _PAYLOAD + number(1) + b"s."),
    "element_of_a_list": Hostile(checkpoint(config=b"](" + _PAYLOAD + b"e")),
    "discarded_result": Hostile(_PAYLOAD + b"0" + checkpoint()),
    "discarded_with_a_mark": Hostile(b"(" + _PAYLOAD + b"1" + checkpoint()),
    "storage_type": Hostile(checkpoint(mapping(w=tensor(storage(kind=_PAYLOAD))))),
    "storage_key": Hostile(checkpoint(mapping(w=tensor(storage(key=_PAYLOAD))))),
    "storage_location": Hostile(checkpoint(mapping(w=tensor(storage(location=_PAYLOAD))))),
    "storage_size": Hostile(checkpoint(mapping(w=tensor(storage(numel=_PAYLOAD))))),
    "persistent_id": Hostile(checkpoint(config=_PAYLOAD + b"Q")),
    "tensor_shape": Hostile(checkpoint(mapping(w=tensor(shape=items(number(2), _PAYLOAD))))),
    "tensor_hooks": Hostile(checkpoint(mapping(w=tensor(hooks=_PAYLOAD)))),
    "tensor_function": Hostile(
        checkpoint(mapping(w=call(_SYSTEM, text(COMMAND)) + b"0" + tensor(function=_SYSTEM)))
    ),
    "tensor_subclass": Hostile(
        checkpoint(
            mapping(
                w=call(
                    names("torch._tensor", "_rebuild_from_type_v2"),
                    _SYSTEM,
                    names("torch", "Tensor"),
                    items(text(COMMAND)),
                    b"}",
                )
            )
        )
    ),
    "parameter_data": Hostile(
        checkpoint(
            mapping(w=call(names("torch._utils", "_rebuild_parameter"), _PAYLOAD, b"\x89", b"}"))
        )
    ),
    "metadata_of_the_state_dict": Hostile(
        checkpoint(
            call(names("collections", "OrderedDict"))
            + b"("
            + text("w")
            + tensor()
            + b"u"
            + mapping(_metadata=_PAYLOAD)
            + b"b"
        )
    ),
    "build_with_setstate": Hostile(
        checkpoint(config=_namespace(__setstate__=_SYSTEM) + text(COMMAND) + b"b")
    ),
    "append_method": Hostile(checkpoint(config=_namespace(append=_SYSTEM) + text(COMMAND) + b"a")),
    "extend_method": Hostile(
        checkpoint(config=_namespace(append=_SYSTEM) + b"(" + text(COMMAND) + b"e")
    ),
    "add_method": Hostile(
        checkpoint(config=_namespace(add=_SYSTEM) + b"(" + text(COMMAND) + b"\x90")
    ),
    "setitem": Hostile(checkpoint(config=names("os", "environ") + text(MARKER) + text("1") + b"s")),
    "setitems": Hostile(
        checkpoint(config=names("os", "environ") + b"(" + text(MARKER) + text("1") + b"u")
    ),
    "inst": Hostile(checkpoint(config=b"(" + text(COMMAND) + b"iposix\nsystem\n")),
    "obj": Hostile(checkpoint(config=b"(" + names("builtins", "list") + _LAZY + b"o")),
    "newobj": Hostile(checkpoint(config=names("builtins", "frozenset") + items(_LAZY) + b"\x81")),
    "newobj_ex": Hostile(
        checkpoint(config=names("builtins", "frozenset") + items(_LAZY) + b"}\x92")
    ),
    "popen": Hostile(
        checkpoint(
            config=call(
                names("subprocess", "check_call"), b"](" + text("touch") + text(MARKER) + b"e"
            )
        )
    ),
    "eval": Hostile(
        checkpoint(config=call(names("builtins", "eval"), text(f"open({MARKER!r}, 'w').close()")))
    ),
    "exec_by_its_old_name": Hostile(
        b"\x80\x02"
        + checkpoint(
            config=call(names("__builtin__", "exec"), text(f"open({MARKER!r}, 'w').close()"))
        )
    ),
    "stack_global": Hostile(
        b"\x80\x04" + checkpoint(config=call(stack_names("posix", "system"), text(COMMAND)))
    ),
    "stack_global_dotted": Hostile(
        b"\x80\x04" + checkpoint(config=call(stack_names("zipfile", "os.system"), text(COMMAND)))
    ),
    "getattr_on_a_module": Hostile(
        b"\x80\x04"
        + checkpoint(
            config=call(
                call(names("builtins", "getattr"), stack_names("zipfile", "os"), text("system")),
                text(COMMAND),
            )
        ),
        refused=False,
    ),
    "memo_that_is_overwritten": Hostile(
        names("collections", "OrderedDict")
        + b"q\x000"
        + _SYSTEM
        + b"q\x000"
        + checkpoint(config=call(b"h\x00", text(COMMAND)))
    ),
    "duplicate_on_the_stack": Hostile(
        checkpoint(config=_SYSTEM + b"2" + items(text(COMMAND)) + b"R0")
    ),
    "extension_registry": Hostile(
        call(names("copyreg", "add_extension"), text("posix"), text("system"), number(_EXTENSION))
        + b"0"
        + checkpoint(config=call(b"\x82" + bytes([_EXTENSION]), text(COMMAND)))
    ),
    "import_of_a_module": Hostile(checkpoint(config=names(EVIL_MODULE, "anything")), refused=False),
    "state_of_our_class": Hostile(
        checkpoint(
            config=names("vssd_jax.weights.torch_file", "Tensor")
            + items(b"N", mapping(vssd_pwned=b"\x88"))
            + b"b"
        ),
        refused=False,
    ),
    "state_of_our_module": Hostile(
        checkpoint(
            config=stack_names("vssd_jax.weights.torch_file", "_GLOBALS")
            + text(MARKER)
            + _SYSTEM
            + b"s"
        ),
    ),
    "state_of_the_tensor_function": Hostile(
        checkpoint(
            config=names("torch._utils", "_rebuild_tensor_v2") + mapping(vssd_pwned=b"\x88") + b"b"
        ),
        refused=False,
    ),
}


def effects() -> list[str]:
    """What a payload has done to the working folder or this process."""
    done = {
        "file": Path(MARKER).exists(),
        "environment": MARKER in os.environ,
        "class": hasattr(torch_file.Tensor, MARKER),
        "function": hasattr(torch._utils._rebuild_tensor_v2, MARKER),
        "module": MARKER in torch_file._GLOBALS,
        "extension": ("posix", "system") in copyreg._extension_registry,
    }
    return [name for name, is_done in done.items() if is_done]


def undo() -> None:
    Path(MARKER).unlink(missing_ok=True)
    os.environ.pop(MARKER, None)
    if hasattr(torch_file.Tensor, MARKER):
        delattr(torch_file.Tensor, MARKER)
    torch._utils._rebuild_tensor_v2.__dict__.pop(MARKER, None)
    torch_file._GLOBALS.pop(MARKER, None)
    if ("posix", "system") in copyreg._extension_registry:
        copyreg.remove_extension("posix", "system", _EXTENSION)
    copyreg._extension_cache.clear()


def write_evil_module(folder: Path) -> None:
    (folder / f"{EVIL_MODULE}.py").write_text(f"open({MARKER!r}, 'w').close()\nanything = None\n")
