"""The lists of a large JSON object, entry by entry: all of it as objects would take gigabytes."""

import codecs
import json
import mmap
import os
import re
from collections.abc import Iterator
from typing import Any

_LEVELS = 8  # of brackets inside of a value that `_VALUE` sees; others are found by the parser
_FIRST_TRY = 2**12  # bytes
_SPACE = re.compile(rb"[ \t\n\r]*+")
_AFTER_VALUE = frozenset(",:]} \t\n\r")  # a number may go on where a piece ends
_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character


def _balanced() -> bytes:
    plain = rb'[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+"'
    inside = rb"(?:" + plain + rb")*+"
    for _ in range(_LEVELS):
        inside = rb"(?:" + plain + rb"|[\[{]" + inside + rb"[\]}])*+"
    return rb"[\[{]" + inside + rb"[\]}]"


# Where an object or a list ends; whether it is good JSON is for the parser to say.
_VALUE = re.compile(_balanced(), re.DOTALL)
_raw_decode = json.JSONDecoder().raw_decode


class JsonLists:
    """The members of a JSON object that are lists; iterating gives their names.

    What is inside of a list is parsed, and its faults are found, when its `entries` are asked for.
    The messages of errors are those of `json.load`.

    Args:
      path: a file in UTF-8, which may begin with a byte-order mark.

    Attributes:
      stat: of the file.

    Raises:
      OSError: it cannot be read.
      ValueError, RecursionError: it is no JSON.
    """

    def __init__(self, path: str | os.PathLike):
        with open(path, "rb") as file:
            self.stat = os.fstat(file.fileno())
            self._data: mmap.mmap | bytes = b""  # an empty file cannot be mapped
            if self.stat.st_size:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._begin = len(codecs.BOM_UTF8) if self._data[:3] == codecs.BOM_UTF8 else 0
        self._lists: dict[str, int] = {}  # where each begins
        try:
            self._find_lists()
        except ValueError:
            # The first fault counts, which may be in a list that was passed over.
            for begin in self._lists.values():
                self._pass_over(begin)
            raise

    def __iter__(self) -> Iterator[str]:
        return iter(self._lists)

    def entries(self, key: str) -> Iterator[tuple[Any, int, int]]:
        """Each entry of a list, with the places in the file of its first byte and behind its last.

        Raises:
          ValueError, RecursionError: it is no JSON.
        """
        return self._entries(self._lists[key])

    def _find_lists(self) -> None:
        place = self._space(self._begin)
        if self._at(place) == b"[":
            return  # a list has no members
        if self._at(place) != b"{":
            self._check_end(self._parse(place)[1])
            return
        place = self._space(place + 1)
        first = True
        while not (first and self._at(place) == b"}"):
            if self._at(place) != b'"':
                raise self._error("Expecting property name enclosed in double quotes", place)
            key, place = self._parse(place)
            place = self._space(place)
            if self._at(place) != b":":
                raise self._error("Expecting ':' delimiter", place)
            place = self._space(place + 1)
            self._lists.pop(key, None)  # of members of one name the last counts
            if self._at(place) == b"[":
                self._lists[key] = place
                place = self._end(place) or self._pass_over(place)
            else:
                _, place = self._parse(place)
            place = self._space(place)
            if self._at(place) == b"}":
                break
            if self._at(place) != b",":
                raise self._error("Expecting ',' delimiter", place)
            place, first = self._space(place + 1), False
        self._check_end(place + 1)

    def _check_end(self, place: int) -> None:
        place = self._space(place)
        if place < len(self._data):
            raise self._error("Extra data", place)

    def _entries(self, begin: int) -> Iterator[tuple[Any, int, int]]:
        place = self._space(begin + 1)
        if self._at(place) == b"]":
            return
        while True:
            value, end = self._read(place)
            yield value, place, end
            place = self._space(end)
            if self._at(place) == b"]":
                return
            if self._at(place) != b",":
                raise self._error("Expecting ',' delimiter", place)
            place = self._space(place + 1)

    def _pass_over(self, begin: int) -> int:
        """Parses the list that begins there, and says where it ends."""
        last = begin + 1
        for _, _, end in self._entries(begin):
            last = end
        return self._space(last) + 1

    def _read(self, begin: int) -> tuple[Any, int]:
        """The value that begins there, and where it ends."""
        end = self._end(begin)
        if end is not None:
            try:
                text = str(self._data[begin:end], "utf-8")
                value, count = _raw_decode(text)
                if count == len(text):
                    return value, end
            except ValueError:
                pass  # said by `_parse`
        return self._parse(begin)

    def _parse(self, begin: int) -> tuple[Any, int]:
        """`_read` of a value of any kind, by trying ever longer pieces of the file."""
        size = _FIRST_TRY
        while True:
            piece, last = self._data[begin : begin + size], begin + size >= len(self._data)
            try:
                text, _ = codecs.utf_8_decode(piece, "strict", last)
            except UnicodeDecodeError as error:
                raise self._error(f"{error.reason} of UTF-8", begin + error.start) from None
            try:
                value, count = _raw_decode(text)
                if last or text[count : count + 1] in _AFTER_VALUE:
                    return value, begin + len(text[:count].encode())
            except json.JSONDecodeError as error:
                if last:
                    place = begin + len(text[: error.pos].encode())
                    raise self._error(error.msg, place) from None
            size *= 4

    def _end(self, begin: int) -> int | None:
        """Where the object or list that begins there ends, if that is plain to see."""
        match = _VALUE.match(self._data, begin)
        return match.end() if match else None

    def _space(self, place: int) -> int:
        """The first place from there on that is no white space."""
        match = _SPACE.match(self._data, place)
        assert match is not None
        return match.end()

    def _at(self, place: int) -> bytes:
        return self._data[place : place + 1]

    def _error(self, text: str, place: int) -> ValueError:
        """With line, column and character as `json` counts them."""
        lines = characters = 0
        begin = self._begin
        column = 1
        while begin < place:
            piece = self._data[begin : min(begin + 2**20, place)]
            characters += len(piece.translate(None, _CONTINUATION))
            lines += piece.count(b"\n")
            tail = piece[piece.rfind(b"\n") + 1 :]
            column = len(tail.translate(None, _CONTINUATION)) + (1 if b"\n" in piece else column)
            begin += 2**20
        return ValueError(f"{text}: line {lines + 1} column {column} (char {characters})")
