"""Lists of a JSON file, one entry at a time: `json` gives the same entries and messages."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vssd_jax.data import json_lists
from vssd_jax.data.json_lists import JsonLists

DEEP = [[[[[[[[[[[[1]]]]]], "]"]]]]]]  # more levels than the pattern sees
CONTENT = {
    "info": {"a": [1, {"b": '}\\"]é😀'}]},
    "images": [{"id": 1, "é": "ü\n"}, {"id": 2.5e3}],
    "nothing": None,
    "annotations": [[1, 2, 3], {"a": [[1.5, 2], [3]], "d": DEEP}, "s", 12, -1.5, True, {}, []],
    "categories": [],
}
TEXTS = [json.dumps(CONTENT, ensure_ascii=False), json.dumps(CONTENT, indent=1)]


def read(path):
    lists = JsonLists(path)
    return {key: list(lists.entries(key)) for key in lists}


@pytest.mark.parametrize("text", [*TEXTS, "\ufeff" + TEXTS[0]])
def test_entries_and_where_they_stand(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    found, data = read(path), path.read_bytes()
    assert list(found) == ["images", "annotations", "categories"]
    for key, entries in found.items():
        assert [entry for entry, _, _ in entries] == CONTENT[key]
        for entry, begin, end in entries:
            assert json.loads(data[begin:end]) == entry


EDIT = st.tuples(
    st.integers(0, 1000), st.integers(0, 2), st.sampled_from([*'[]{},:"\\ 1e.-é\t\n', ""])
)


# Pieces of one byte end in the midst of characters, numbers and strings.
@given(st.sampled_from(TEXTS), st.lists(EDIT, max_size=2), st.integers(8, 1000), st.integers(1, 99))
def test_faults_are_said_as_json_says_them(tmp_path_factory, text, edits, length, first_try):
    for place, removed, added in edits:
        place %= len(text)
        text = text[:place] + added + text[place + removed :]
    text = text[:length] if length < 500 else text
    path = tmp_path_factory.getbasetemp() / "edited.json"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "_FIRST_TRY", first_try)
        found, message = outcome(read, path)
    content, expected = outcome(json.loads, text)
    if text.lstrip().startswith("["):  # known for no object, and not read further
        assert found == {}
        return
    if "Illegal trailing comma" in expected:  # of newer Pythons, which also count another place
        assert "Expecting" in message
        return
    assert message == expected
    if not expected:
        lists = content if isinstance(content, dict) else {}
        lists = {key: value for key, value in lists.items() if isinstance(value, list)}
        assert {key: [entry for entry, _, _ in found[key]] for key in found} == lists


def outcome(function, argument):
    try:
        return function(argument), ""
    except ValueError as error:
        return None, str(error)


def test_what_is_no_text_or_too_deep(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": [],\n "annotations": ["\xff"]}')
    with pytest.raises(ValueError, match=r"invalid start byte.*line 2 column 19 \(char 28\)"):
        read(path)
    path.write_text('{"annotations": [' + "[" * 100_000)
    with pytest.raises(RecursionError):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"Expecting value: line 1 column 1 \(char 0\)"):
        read(path)
