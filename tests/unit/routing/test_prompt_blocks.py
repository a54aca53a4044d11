"""Routing data of a prompt: blocks, and the boundaries within a conversation."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import Any
from zlib import crc32

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.routing.prompt.blocks import (
    BLOCK_ENDS,
    NO_PROMPT,
    HashState,
    Prompt,
    block_bytes,
    blocks_in,
    extend_hashes,
    hash_blocks,
    make_block_hash,
    pack_hashes,
    unpack_hashes,
)
from vllm_router.routing.prompt.body_reader import read_routing_info
from vllm_router.routing.prompt.content import MAX_PARSED
from vllm_router.routing.prompt.conversation import plain_prompt, raw_prompt
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.steps import finish

CHAT = b"/v1/chat/completions"
TEXT = "".join(f"line {n} of a long text, all different\n" for n in range(2000))


def facts(path: bytes = CHAT, **body: Any) -> RoutingInfo:
    raw = msgspec.json.encode(body)
    return read_routing_info(path, b"application/json", raw, with_prompt=True)


def chat(*turns: tuple[str, Any], **body: Any) -> RoutingInfo:
    return facts(messages=[{"role": role, "content": text} for role, text in turns], **body)


def shared_pieces(one: RoutingInfo, other: RoutingInfo) -> int:
    pairs = zip(one.prompt.block_hashes, other.prompt.block_hashes, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min_length(one, other))


def min_length(one: RoutingInfo, other: RoutingInfo) -> int:
    return min(len(one.prompt.block_hashes), len(other.prompt.block_hashes))


def test_blocks_double_in_length_after_every_32():
    lengths = [end - start for start, end in zip((0, *BLOCK_ENDS), BLOCK_ENDS, strict=False)]
    assert lengths[:33] == [256] * 32 + [512]
    assert lengths[64] == 1024
    assert blocks_in(1 << 20) < 230


@given(st.integers(0, 1 << 64), st.integers(0, len(BLOCK_ENDS) - 1))
def test_block_hash_encodes_block_length(digest: int, index: int):
    assert block_bytes(make_block_hash(digest, index)) == BLOCK_ENDS[index] - (
        BLOCK_ENDS[index - 1] if index else 0
    )


@given(st.integers(0, 70_000), st.lists(st.integers(0, 9000), max_size=8), st.integers(0, 1 << 32))
def test_block_hashes_are_checksums_of_all_before_mixed(size: int, cuts: list[int], seed: int):
    """The definition, which other routers and old access logs rely on."""
    text = TEXT.encode()[:size]
    hashes, digest = [], 0
    for index, end in enumerate(BLOCK_ENDS):
        if end > len(text):
            break
        digest = (digest ^ crc32(text[:end], seed)) * 0x9E3779B97F4A7C15 % (1 << 60)
        hashes.append(make_block_hash(digest, index))
    pieces, place = [], 0
    for cut in cuts:
        pieces.append(text[place : place + cut])
        place += cut
    assert hash_blocks(*pieces, text[place:], seed=seed) == tuple(hashes)


def test_block_hashes_end_with_the_last_block():
    state = HashState((1,) * len(BLOCK_ENDS), BLOCK_ENDS[-1])
    assert extend_hashes(state, (b"x" * 1000, b"y")).hashes == state.hashes
    assert extend_hashes(state, (b"x" * 1000, b"y")).size == BLOCK_ENDS[-1] + 1001


@given(st.binary(min_size=600, max_size=1200), st.data())
def test_block_hash_covers_all_before_it(text: bytes, data: st.DataObject):
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :]
    same = [a == b for a, b in zip(hash_blocks(text), hash_blocks(changed), strict=True)]
    assert same == [end <= place for end in BLOCK_ENDS[: len(same)]]


def test_block_hash_is_equal_in_every_process():
    code = (
        "from vllm_router.routing.prompt.blocks import hash_blocks; print(hash_blocks(b'x' * 600))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(hash_blocks(b"x" * 600))


def test_blocks_of_next_turn_include_all_full_blocks_before():
    first = chat(("system", TEXT[:3000]), ("user", TEXT[:2000]))
    second = chat(
        ("system", TEXT[:3000]), ("user", TEXT[:2000]), ("assistant", "yes"), ("user", "more")
    )
    assert shared_pieces(first, second) == len(first.prompt.block_hashes) > 18


def test_blocks_ignore_order_and_space_of_json():
    text = b"caf\xc3\xa9 \\n" * 100
    compact = b'{"messages":[{"role":"user","content":"' + text + b'"}]}'
    spaced = b'{ "messages" : [ {"content": "' + text + b'", "role": "user"} ], "n":1 }'
    one, other = (
        read_routing_info(CHAT, b"", body, with_prompt=True).prompt for body in (compact, spaced)
    )
    assert one == other
    assert one.block_hashes


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"type": "function", "function": {"name": "other"}}]},
        {"role": "developer"},
        {"content": [{"type": "text", "text": "other"}, {"type": "text", "text": TEXT[:600]}]},
        {"image": "data:image/png;base64," + "QUJE" * 1000},
    ],
    ids=lambda change: next(iter(change)),
)
def test_blocks_differ_by_tools_roles_texts_and_images(change: dict[str, Any]):
    def asked(
        tools: Any = None,
        role: str = "user",
        content: Any = None,
        image: str = "data:" + "QUJD" * 1000,
    ) -> RoutingInfo:
        parts = [{"type": "image_url", "image_url": {"url": image}}]
        parts += content or [{"type": "text", "text": TEXT[:600]}]
        tools = tools or [{"type": "function", "function": {"name": "weather"}}]
        return facts(tools=tools, messages=[{"role": role, "content": parts}])

    assert asked() == asked()
    assert shared_pieces(asked(), asked(**change)) < len(asked().prompt.block_hashes)


def test_blocks_image_has_equal_weight_at_any_size():
    def size(pixels: int) -> int:
        url = "data:image/png;base64," + "QUJD" * pixels
        return chat(("user", [{"type": "image_url", "image_url": {"url": url}}])).prompt.size

    assert size(1000) == size(200_000) < 3000


def test_blocks_boundaries_of_conversation_are_in_bytes():
    first = chat(("system", "s" * 1000), ("user", "u" * 300)).prompt
    assert (first.shared, first.earlier) == (1000 + len("\0system\0"), 0)
    later = chat(
        ("system", "s" * 1000), ("user", "u" * 300), ("assistant", "a" * 50), ("user", "v" * 70)
    ).prompt
    assert later.earlier == first.size
    assert later.shared == first.shared


def test_blocks_conversations_with_same_system_prompt_differ():
    system = ("system", TEXT[:2000])
    first = chat(system, ("user", "tell me"))
    later = chat(system, ("user", "tell me"), ("assistant", "what?"), ("user", "all"))
    other = chat(system, ("user", "tell us"))
    assert first.prompt.conversation == later.prompt.conversation != other.prompt.conversation


def test_blocks_later_ones_of_many_messages_count():
    turns = [(("user", "assistant")[n % 2], f"{n} " * 30) for n in range(MAX_PARSED + 201)]
    whole, before = chat(*turns), chat(*turns[:-2])
    assert (
        before.prompt.block_hashes == whole.prompt.block_hashes[: len(before.prompt.block_hashes)]
    )
    assert whole.prompt.earlier == before.prompt.size
    assert whole.prompt.conversation == before.prompt.conversation
    other = turns.copy()
    other[-100] = ("user", "something else, and as long as all the others are, more or less")
    assert 0 < shared_pieces(whole, chat(*other)) < len(whole.prompt.block_hashes)


def test_blocks_images_and_calls_in_later_messages_count_fully():
    def grows_by(message: dict[str, Any]) -> list[int]:
        sizes = []
        for count in (1, MAX_PARSED + 1):
            turns = [{"role": "user", "content": "x" * 100}] * count
            before = facts(messages=turns).prompt.size
            sizes.append(facts(messages=[*turns, message]).prompt.size - before)
        return sizes

    url = "data:image/png;base64," + "QUJD" * 50_000
    part = {"type": "image_url", "image_url": {"url": url}}
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    for message in (
        {"role": "user", "content": [part]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "user", "content": [{"type": "text", "text": "x" * 5000}]},
    ):
        first, later = grows_by(message)
        assert first == pytest.approx(later, abs=16)
        assert later > 50


def test_blocks_later_ones_of_many_parts_count():
    parts = [{"type": "text", "text": f"part {n} " * 15} for n in range(MAX_PARSED + 300)]
    whole = chat(("user", parts))
    other = chat(("user", [*parts[:-50], {"type": "text", "text": "!" * 120}, *parts[-49:]]))
    assert 0 < shared_pieces(whole, other) < len(whole.prompt.block_hashes)


CROWDS = {
    "messages": (b'"messages":[', b"{},", b"{}]"),
    "numbers for messages": (b'"messages":[', b"1,", b"1]"),
    "parts": (b'"messages":[{"content":[', b"{},", b"{}]}]"),
    "numbers for parts": (b'"messages":[{"content":[', b"1,", b"1]}]"),
    "things in a part": (b'"messages":[{"content":[{"type":"x","y":[', b'"a",', b'"a"]}]}]'),
    "input": (b'"input":[', b"{},", b"{}]"),
    "models": (b'"prompt":"","model":[', b"{},", b"{}]"),
    "things of other kinds": (b'"input":[{},', b"1,", b"1]"),
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_blocks_million_items_are_not_visited_singly(crowd: str):
    before, thing, after = CROWDS[crowd]
    body = b'{"model":"m",' + before + thing * 300_000 + after + b"}"
    tracemalloc.start()
    try:
        read = read_routing_info(CHAT, b"application/json", body, with_prompt=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read.model == (None if crowd == "models" else "m")
    assert read.prompt.size < len(body) + 100
    assert read.prompt.size > len(body) - 100 or crowd == "models"
    assert peak < 4 * len(body)


def test_blocks_deep_nesting_is_not_visited():
    deep = b"[" * 300 + b'"' + b"x" * 300_000 + b'"' + b"]" * 300
    body = b'{"messages":[{"role":"user","content":[{"type":"x","y":' + deep + b"}]}]}"
    read = read_routing_info(CHAT, b"application/json", body, with_prompt=True)
    assert 2000 < read.prompt.size < 2200  # a medium


def test_blocks_token_ids_are_counted():
    prompt = facts(b"/v1/completions", prompt=list(range(5000))).prompt
    assert prompt.tokens == 5000
    assert prompt.block_hashes


def test_blocks_completion_text_is_cut_as_in_body():
    prompt = facts(b"/v1/completions", prompt=TEXT[:5000]).prompt
    written = msgspec.json.encode(TEXT[:5000])[1:-1]
    assert (prompt.size, prompt.tokens) == (len(written), None)
    assert prompt.block_hashes == hash_blocks(written)


def test_blocks_text_as_string_or_part_is_equal():
    parts = [{"type": "text", "text": TEXT[:900]}]
    assert chat(("user", TEXT[:900])).prompt == chat(("user", parts)).prompt


@pytest.mark.parametrize("text", [TEXT[:900], list(range(900)), ""])
@pytest.mark.parametrize("key", ["prompt", "input"])
def test_blocks_one_prompt_in_an_array_is_that_prompt(key: str, text: Any):
    alone = facts(b"/v1/completions", **{key: text}).prompt
    assert facts(b"/v1/completions", **{key: [text]}).prompt == alone
    both = facts(b"/v1/completions", **{key: [text, text]}).prompt
    assert both != alone


def test_blocks_one_prompt_in_a_spaced_array_is_that_prompt():
    body = b'{"prompt": [\n  ' + msgspec.json.encode(TEXT[:900]) + b"\n]}"
    read = read_routing_info(b"/v1/completions", b"application/json", body, with_prompt=True)
    assert read.prompt == facts(b"/v1/completions", prompt=TEXT[:900]).prompt


@pytest.mark.parametrize(
    "more",
    [
        {"stream": "true"},
        {"stream": 1},
        {"priority": "3"},
        {"priority": 2.0},
        {"user": 7},
        {"previous_response_id": 7},
        {"prompt_cache_key": 7},
        {"stop": "x"},
        {"stop": ["x", "y"]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "low"},
    ],
)
@pytest.mark.parametrize("size", [900, 40_000])
@pytest.mark.parametrize("path", [CHAT, b"/v1/messages", b"/v1/responses", b"/v1/completions"])
def test_blocks_do_not_depend_on_other_fields(path: bytes, size: int, more: dict[str, Any]):
    turns = [{"role": "user", "content": [{"type": "text", "text": TEXT[:size]}]}]
    system = {"system": "be kind"} if path == b"/v1/messages" else {}
    key = {b"/v1/responses": "input", b"/v1/completions": "prompt"}.get(path, "messages")
    body = {"model": "m", key: TEXT[:size] if key == "prompt" else turns, **system}
    assert facts(path, **body, **more).prompt == facts(path, **body).prompt


def test_blocks_messages_of_unexpected_type_count_as_raw_json():
    messages = [{"role": "user", "content": TEXT[:900]}, 5]
    read = facts(messages=messages, stream="true")
    assert read.stream
    assert read.prompt.size == len(msgspec.json.encode(messages))


def test_blocks_empty_tool_calls_equal_absent_ones():
    def answer(**more: Any) -> RoutingInfo:
        turns = [("user", TEXT[:900]), ("assistant", TEXT[:900])]
        messages = [{"role": role, "content": text} for role, text in turns]
        return facts(messages=[messages[0], {**messages[1], **more}])

    assert answer(tool_calls=[]).prompt == answer().prompt == answer(tool_calls=None).prompt
    assert answer(tool_calls=[{"id": "c"}]).prompt != answer().prompt


@pytest.mark.parametrize(
    "body",
    [
        {"input": [{"role": "user", "content": TEXT[:900]}], "instructions": "be kind"},
        {"input": TEXT[:900], "instructions": "be kind"},
        {"input": TEXT[:900]},
        {"input": [TEXT[:400], TEXT[:500]]},
        {"system": [{"type": "text", "text": TEXT[:300]}], "messages": TEXT[:600]},
    ],
)
def test_blocks_every_api_has_a_prompt(body: dict[str, Any]):
    assert 900 <= facts(**body).prompt.size < 1100


@pytest.mark.parametrize(
    "body",
    [{}, {"messages": 3}, {"messages": [1, None, {"content": {"a": 1}}]}, {"prompt": None}],
)
def test_blocks_odd_body_has_prompt_without_blocks(body: dict[str, Any]):
    assert facts(**body).prompt.block_hashes == ()


@pytest.mark.parametrize("body", [b"", b"[]", b'{"prompt": "\\ud800"}'])
def test_blocks_body_without_model_has_none(body: bytes):
    read = read_routing_info(CHAT, b"application/json", body, with_prompt=True)
    assert (read.model, read.prompt.block_hashes) == (None, ())


def test_blocks_are_not_computed_unless_needed():
    body = msgspec.json.encode({"model": "m", "prompt": TEXT})
    assert read_routing_info(CHAT, b"", body) == RoutingInfo("m")
    assert read_routing_info(CHAT, b"", body).prompt is NO_PROMPT


# -- salts -------------------------------------------------------------------------------------

CONVERSATION = [{"role": "user", "content": TEXT}]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": CONVERSATION}),
        (b"/v1/completions", {"prompt": TEXT}),
        (b"/v1/completions", {"prompt": list(range(500))}),
        (b"/v1/responses", {"input": TEXT}),
        (b"/v1/responses", {"input": CONVERSATION, "instructions": "Be brief."}),
        (b"/v1/messages", {"messages": CONVERSATION, "system": TEXT}),
        (b"/v1/embeddings", {"input": [TEXT, TEXT]}),
        (CHAT, {"messages": CONVERSATION, "stream": "yes"}),
        (CHAT, {"messages": [{"role": "user", "content": "a b" * 500_000}]}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_blocks_with_different_cache_salts_share_nothing(path: bytes, fields: dict[str, Any]):
    """vLLM's prefix cache shares no block between them, so the prefix index must not."""

    def prompt(**more: Any) -> Prompt:
        return facts(path, **fields, **more).prompt

    bare, empty = prompt(), prompt(cache_salt=None)
    a, again, b = prompt(cache_salt="a"), prompt(cache_salt="a"), prompt(cache_salt="b")
    assert bare == empty
    assert a == again
    assert a.block_hashes
    assert {bare.size, a.size, b.size} == {bare.size}
    for left, right in ((bare, a), (a, b), (bare, b)):
        assert not set(left.block_hashes) & set(right.block_hashes)
        assert left.conversation != right.conversation


@pytest.mark.parametrize("size", [3000, 65_535, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("first", [10, 40_000])
def test_blocks_conversation_is_identified_by_64_kb_at_most(size: int, first: int):
    """The checksum is taken from the one that the blocks are made of."""
    texts = [b"a" * first, memoryview(bytes(range(256)) * 800)[: size - first]]
    if first < size:
        whole = b"".join(texts)
        prompt = finish(raw_prompt(*texts, seed=7))
        assert prompt.conversation == crc32(whole[: 1 << 16], 7)
        assert prompt.block_hashes == hash_blocks(whole, seed=7)
        assert plain_prompt(b"[" + whole[1:], 7).conversation == crc32(b"[" + whole[1 : 1 << 16], 7)


# -- in the access log ---------------------------------------------------------------------------


@given(st.binary(max_size=30_000))
def test_block_hashes_survive_the_log(text: bytes):
    chain = hash_blocks(text)
    back = unpack_hashes(pack_hashes(chain))
    assert [link & 0xFFFFFFFFFFFF for link in back] == [link & 0xFFFFFFFFFFFF for link in chain]
    assert unpack_hashes(pack_hashes(back)) == back


@pytest.mark.parametrize("text", ["AAAA", "not base64!", "A" * 8 * 500])
def test_block_hashes_invalid_text_is_refused(text: str):
    with pytest.raises(ValueError, match=r".+"):
        unpack_hashes(text)
