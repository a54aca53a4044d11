"""Reading of a server's `/v1/models`: real lists, odd names, and hostile pages."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.errors import UnusablePage
from vllm_router.fleet.model_list import (
    MAX_ENTRY,
    MAX_LIST_BYTES,
    MAX_MODELS,
    MAX_NAME,
    PASSED_ON,
    ModelList,
    read_model_list,
)


def read(page: bytes | list[Any]) -> ModelList:
    if isinstance(page, list):
        page = json.dumps({"object": "list", "data": page}).encode()
    *_, found = read_model_list(page)
    return found


def entry(name: str, **more: Any) -> dict[str, Any]:
    permission = [{"id": "modelperm-1", "allow_sampling": True, "group": None}]
    return {"id": name, "object": "model", "max_model_len": 4096, "permission": permission, **more}


def test_read_model_list_keeps_entries_unchanged():
    entries = [entry("Qwen/Qwen3-8B"), entry("模型 7"), entry("/data/models/a b", parent="x")]
    found = read(entries)
    assert list(found.cards.values()) == entries
    assert (found.left_out, found.problem) == (0, "")


@pytest.mark.parametrize(
    "name",
    [
        "\ud800",
        "a\nb",
        "\x1b[31mred",
        "\x00",
        "right\u202eleft",
        "a\u2028b",
        "\ufeff",
        "",
        7,
        None,
        ["m"],
        True,
        "x" * (MAX_NAME + 1),
    ],
)
def test_read_model_list_odd_name_is_dropped_and_others_stay(name):
    found = read([entry("good"), entry(name), entry("also good")])
    assert list(found.cards) == ["good", "also good"]
    assert found.left_out == 1
    assert found.problem.isprintable()
    assert len(found.problem) < 250


@pytest.mark.parametrize("odd", [7, None, "m", [], {}, {"name": "m"}, [[[]]]])
def test_read_model_list_invalid_entry_is_dropped(odd):
    found = read([odd, entry("good")])
    assert (list(found.cards), found.left_out) == (["good"], 1)


def test_read_model_list_with_nan_is_read():
    page = b'{"data": [{"id": "m", "created": NaN}, {"id": "n", "x": -Infinity}]}'
    assert list(read(page).cards) == ["m", "n"]


@pytest.mark.parametrize(
    "odd",
    [
        {"x": "\ud800"},
        {"x": json.loads("[" * 300 + "]" * 300)},
        {"x": "y" * PASSED_ON},
    ],
)
def test_read_model_list_unserialisable_entry_keeps_only_its_name(odd):
    found = read([{**entry("m"), **odd}])
    assert found.cards == {"m": {"id": "m", "object": "model", "max_model_len": 4096}}


def test_read_model_list_yields_after_a_few_entries():
    page = json.dumps({"data": [entry(f"m{number}") for number in range(MAX_MODELS)]}).encode()
    steps = list(read_model_list(page))
    assert len(steps) > 4
    assert len(steps[-1].cards) == MAX_MODELS


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (b'{"data": [%s]}' % (b" " * MAX_LIST_BYTES), "longer than 1048576 bytes"),
        (b'{"data": [%s0]}' % (b"0," * MAX_MODELS), "more than 2048 entries"),
        (b'{"data": [%s0]}' % (b"0," * 100_000), "more than 60000 values"),
        (b'{"data": {}}', "not a JSON object with an array `data`"),
        (b"[]", "not a JSON object with an array `data`"),
        (b"<html>login</html>", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_read_model_list_page_of_other_type_is_refused(page, words):
    with pytest.raises(UnusablePage, match=words):
        read(page)


@pytest.mark.parametrize(
    "page",
    [b'{"data": [%s]}' % (b"[" * 50_000 + b"]" * 50_000), b"[" * 60_000],
    ids=["list", "open"],
)
def test_read_model_list_deep_page_has_no_models(page: bytes):
    """Up to Python 3.13, such a page cannot be parsed; 3.14 parses as deep as its stack allows."""
    try:
        found = read(page)
    except UnusablePage as refused:
        found = ModelList()
        found.leave_out(str(refused))
    assert (found.cards, found.left_out) == ({}, 1)
    problems = "nested too deeply|not JSON|an entry is longer than 65536 bytes"
    assert re.search(problems, found.problem)


def test_read_model_list_overlong_entry_is_dropped():
    found = read([entry("a", more="x" * MAX_ENTRY), entry("m")])
    assert (list(found.cards), found.left_out) == (["m"], 1)
    assert found.problem == f"an entry is longer than {MAX_ENTRY} bytes"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
_ENTRIES = st.lists(_JSON | st.fixed_dictionaries({"id": _JSON, "x": _JSON}), max_size=4)


@given(st.binary(max_size=60) | _ENTRIES.map(lambda data: json.dumps({"data": data}).encode()))
def test_read_model_list_any_page_gives_safe_names(page):
    try:
        found = read(page)
    except UnusablePage:
        return
    for name, card in found.cards.items():
        assert name.isprintable()
        assert card["id"] == name
        msgspec.json.encode(card)
        name.encode()


@pytest.mark.parametrize(
    ("length", "kept"),
    [(1, True), (2**53 - 1, True), (2**53, False), (0, False)],
)
def test_large_entry_keeps_a_context_length_that_any_client_can_read(length: int, kept: bool):
    card = read([{**entry("m"), "max_model_len": length, "x": "y" * PASSED_ON}]).cards["m"]
    assert card == {"id": "m", "object": "model"} | ({"max_model_len": length} if kept else {})
