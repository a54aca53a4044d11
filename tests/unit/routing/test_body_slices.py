"""No body, however crowded, holds up the event loop: its reading is cut into short slices.

The length of a slice is measured in function calls, which do not depend on the machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from typing import Any
from unittest.mock import patch

import pytest

from vllm_router.routing.prompt import body_reader, known_bodies, long_prompt
from vllm_router.routing.prompt.body_reader import read_in_slices, read_routing_info
from vllm_router.routing.prompt.content import LARGE
from vllm_router.routing.prompt.crowding import MOST_OBJECTS, count_lists, objects_in
from vllm_router.routing.prompt.known_bodies import KnownBodies
from vllm_router.routing.prompt.routing_info import (
    WITH_PROMPT_AT_ONCE,
    RoutingInfo,
    read_at_once,
)
from vllm_router.steps import finish

CHAT = b"/v1/chat/completions"
JSON = b"application/json"

MOST_CALLS = 30_000
"""Calls of functions in a slice: 2 ms at 60 ns each. Decoders make any number of values per call;
`MOST_OBJECTS` and `MAX_VALUES` bound those."""

PLACES = {
    "messages": (b'"messages":[', b"]"),
    "parts": (b'"messages":[{"role":"user","content":[', b"]}]"),
    "later parts": (b'"messages":[{"role":"user"},{"role":"user","content":[', b"]}]"),
    "input": (b'"input":[{"role":"user"},', b"]"),
    "output": (b'"input":[{"type":"function_call_output","output":[', b"]}]"),
    "results of tools": (b'"messages":[{"content":[{"type":"tool_result","content":[', b"]}]}]"),
    "system": (b'"messages":[{"role":"user"},{"role":"user"}],"system":[', b"]"),
    "tools": (b'"messages":[{"role":"user"},{"role":"user"}],"tools":[', b"]"),
    "an odd body": (b'"model":1,"messages":[{"content":[', b"]}]"),
    "a medium": (b'"messages":[{"content":[{"type":"x","y":[', b"]}]}]"),
}
THINGS = {
    "objects": b"{}",
    "objects with blanks": b"{\n}",
    "lists": b"[]",
    "strings": b'""',
    "numbers": b"1",
    "members": b'{"a":1}',
    "parts": b'{"type":"text","text":"a"}',
    "unknown parts": b'{"type":"x","y":["a","b"]}',
    "calls": b'{"type":"tool_use","id":"a","name":"b","input":{}}',
    "results": b'{"type":"tool_result","content":[{"type":"tool_result","content":[{}]}]}',
    "pictures": b'{"type":"image_url","image_url":{"url":"a"}}',
    "messages": b'{"role":"assistant","content":[{"type":"text","text":"a"}],"tool_calls":[]}',
    "long numbers": b"9" * 4000,
    "nested lists": b"[" * 200 + b"]" * 200,
}


def calls_in_slices(body: bytes, known: KnownBodies) -> tuple[list[int], RoutingInfo]:
    """The calls of functions in each slice of reading a body, as the proxy reads it."""
    counts = [0]

    def count(_frame: object, event: str, _about: object) -> None:
        if event in ("call", "c_call"):
            counts[-1] += 1

    def reading() -> Generator[None, None, RoutingInfo]:
        found = read_at_once(CHAT, JSON, body, with_prompt=True, known=known)
        if found is not None:
            return found
        yield
        return (yield from read_in_slices(CHAT, JSON, body, with_prompt=True, known=known)).info

    steps = reading()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return counts, end.value
            counts.append(0)
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize("place", PLACES)
def test_body_slices_crowd_of_anything_anywhere_makes_no_long_slice(place: str):
    before, after = PLACES[place]
    for number, (name, thing) in enumerate(THINGS.items()):
        # Below and above what is read at once, in turns.
        size = WITH_PROMPT_AT_ONCE + (-5000 if (number + len(place)) % 2 else 20_000)
        things = b",".join([thing] * (size // (len(thing) + 1)))
        body = b"{" + before + things + after + b"}"
        counts, found = calls_in_slices(body, KnownBodies())
        assert max(counts) < MOST_CALLS, (name, size, len(counts))
        assert found.prompt.size


def test_body_slices_long_slice_of_a_crowd_is_noticed():
    """The measure sees a crowd that is read at once."""
    body = b'{"messages":[' + b",".join([b'{"role":"user"}'] * 15_000) + b"]}"
    with patch.object(known_bodies, "in_one_slice", finish):
        counts, _ = calls_in_slices(body, KnownBodies())
    assert max(counts) > MOST_CALLS


@pytest.mark.parametrize("count", [100, 1000, 3000])
def test_body_slices_give_what_is_read_at_once(count: int):
    body = json.dumps(
        {
            "model": "m",
            "system": [{"type": "text", "text": "Be brief."}] * 3,
            "messages": [
                {
                    "role": ("user", "assistant")[n % 2],
                    "content": [{"type": "text", "text": f"{n}"}],
                }
                for n in range(count)
            ],
        }
    ).encode()
    _, sliced = calls_in_slices(body, KnownBodies())
    assert sliced == read_routing_info(CHAT, JSON, body, with_prompt=True)


def test_body_slices_long_turn_after_a_known_body_is_cut():
    known = KnownBodies()
    messages: list[Any] = [{"role": "user", "content": "x" * 300} for _ in range(300)]
    calls_in_slices(json.dumps({"messages": messages}).encode(), known)
    assert len(known) == 1
    more = [{"role": "user"}] * 12_000
    body = json.dumps({"messages": [*messages, *more]}).encode()
    counts, found = calls_in_slices(body, known)
    assert max(counts) < MOST_CALLS
    assert found == read_routing_info(CHAT, JSON, body, with_prompt=True)


@pytest.mark.parametrize("separator", [",", ", ", ",\n"])
def test_crowding_finds_all_objects_and_few_braces_of_texts(separator: str):
    text = json.dumps("if (x) {\n  y = {'a': 1};\n}") + separator
    many = text * 20_000 + separator.join(['{"a":1}', "{}", "{ }", "{\n}"] * 1000)
    assert many.count("{") > MOST_OBJECTS
    assert finish(objects_in(many.encode())) == 4000


@pytest.mark.parametrize("place", PLACES)
def test_body_slices_megabyte_of_nested_lists_is_not_decoded(place: str):
    before, after = PLACES[place]
    nested = b",".join([b"[" * 400 + b"]" * 400] * 1300)
    body = b"{" + before + nested + after + b"}"
    decoded: list[int] = []

    def decode(text: bytes) -> known_bodies.AllFields:
        decoded.append(len(text))
        return known_bodies.AllFields()

    with (
        patch.object(known_bodies, "_decode", decode),
        patch.object(long_prompt, "_short_prompt", side_effect=AssertionError("parsed")),
        patch.object(long_prompt, "prompt_head", wraps=long_prompt.prompt_head) as head,
    ):
        _, found = calls_in_slices(body, KnownBodies())
    assert found.prompt.size
    assert decoded == []
    # Only a short head is decoded.
    assert all(sum(map(len, call.args)) <= LARGE for call in head.mock_calls)


def test_crowding_counts_lists_of_any_number():
    for count in (0, 1023, 1024, 5000):
        assert count_lists(b"[1," * count) == count


def test_crowding_counts_one_part_of_a_text():
    text = b"{}" * 50
    assert finish(objects_in(text, 10, 20)) == 5


def test_body_slices_crowded_conversation_counts_as_plain_text():
    things = b",".join([b"{}"] * (MOST_OBJECTS + 1))
    body = b'{"messages":[' + things + b"]}"
    with patch.object(body_reader, "long_prompt", wraps=body_reader.long_prompt) as long_prompt:
        _, found = calls_in_slices(body, KnownBodies())
    assert long_prompt.called
    assert found.prompt.size == len(things) + len("[]")
