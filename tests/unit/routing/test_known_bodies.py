"""Bodies that repeat earlier ones: the result is the same as without the memory of them."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_router.errors import InvalidBody
from vllm_router.fleet.model_seeds import seed_of_name
from vllm_router.routing.prompt import known_bodies, routing_info
from vllm_router.routing.prompt.blocks import HashState, extend_hashes, hash_blocks
from vllm_router.routing.prompt.body_reader import read_in_slices
from vllm_router.routing.prompt.conversation import continued, conversation_of, messages_in
from vllm_router.routing.prompt.crowding import MOST_OBJECTS, count_objects
from vllm_router.routing.prompt.known_bodies import LONGEST, KnownBodies
from vllm_router.routing.prompt.routing_info import (
    AT_ONCE,
    WITH_PROMPT_AT_ONCE,
    RoutingInfo,
    read_at_once,
)
from vllm_router.routing.prompt.session import SessionHint
from vllm_router.steps import finish

CHAT = b"/v1/chat/completions"
SLOW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
HINT = SessionHint(None, "", (("user", "body:user"),))


def read(body: bytes, known: KnownBodies | None = None) -> RoutingInfo | None:
    """What routing reads of a body of any length."""
    about = (CHAT, b"application/json", body, HINT)
    with patch.object(routing_info, "LONG", 0):
        found = read_at_once(*about, with_prompt=True, known=known)
        if found is None:
            with suppress(InvalidBody):
                return finish(read_in_slices(*about, with_prompt=True, known=known)).info
        return found


def body_of(
    messages: list[Any], before: str = '"model":"m"', after: str = "", key: str = "messages"
) -> bytes:
    members = (before, f'"{key}":{json.dumps(messages)}', after)
    return f"{{{','.join(filter(None, members))}}}".encode()


def turns(count: int, size: int = 300) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": f"{n} " * (size // 3)} for n in range(count)]


def hits(known: KnownBodies, body: bytes) -> bool:
    """Whether the body is read without its beginning."""
    with patch.object(KnownBodies, "_read_whole", side_effect=AssertionError("read as a whole")):
        try:
            return read(body, known) is not None
        except AssertionError:
            return False


# -- equality ----------------------------------------------------------------------------------

texts = st.text(max_size=40).map(lambda text: text * 7) | st.just("x" * 3000)
parts = st.lists(
    st.one_of(
        st.builds(lambda t: {"type": "text", "text": t}, texts),
        st.builds(lambda t: {"type": "tool_result", "tool_use_id": "c1", "content": t}, texts),
        st.builds(
            lambda t: {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": t}}, texts
        ),
        st.just({"type": "image_url", "image_url": {"url": "data:" + "A" * 2000}}),
    ),
    max_size=3,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
        optional={
            "content": texts | parts | st.none(),
            "tool_calls": st.lists(st.fixed_dictionaries({"id": texts}), max_size=1),
            "tool_call_id": st.just("c1"),
        },
    ),
    min_size=1,
    max_size=4,
)
befores = st.sampled_from(
    [
        "",
        '"model":"m"',
        '"model":"m","tools":[{"name":"f"}],"system":"be brief"',
        '"tools":[{"messages":[1,2]}]',
        '"x":"messages"',
        '"instructions":"i" ,"cache_salt":"s"',
        '"messages":[{"role":"user","content":"first"}]',
        '"mess\\u0061ges":[{"role":"user","content":"first"}]',
    ]
)
afters = st.sampled_from(
    [
        "",
        '"stream":true,"user":"someone"',
        '"tools":[{"name":"g"}]',
        '"system":[{"type":"text","text":"s"}]',
        '"cache_salt":"t"',
        '"model":null',
        '"model":"other"',
        '"kv_transfer_params":{"a":1}',
        '"messages":null',
        '"messages":[]',
        '"\\u006dessages":[{"role":"user","content":"last"}]',
        '"metadata":{"messages":1}',
        '"input":"i"',
        '"input":[{"role":"user","content":"last"}]',
        '"inp\\u0075t":[{"role":"user","content":"last"}]',
        '"stream":"yes"',
        '"broken":',
        '"stream":true}{',
    ]
)
spaces = st.sampled_from(["", " ", "\n\t "])


@SLOW
@given(
    st.lists(
        st.tuples(messages, befores, afters, spaces, st.integers(0, 3), st.booleans()),
        min_size=2,
        max_size=5,
    ),
    st.sampled_from(["messages", "input"]),
)
def test_known_bodies_give_what_the_whole_body_gives(steps: list[Any], key: str) -> None:
    known = KnownBodies()
    conversation: list[Any] = []
    before = after = ""
    for more, new_before, new_after, space, keep, changes in steps:
        if changes:
            before, after = new_before, new_after
        conversation = [*conversation[: len(conversation) - keep if keep > 2 else None], *more]
        body = body_of(conversation, before, after, key)
        given_key, blank = key.encode(), space.encode()
        body = body.replace(b'"%b":[' % given_key, b'"%b"%b:[%b' % (given_key, blank, blank), 1)
        for given_body in (body, body, body[: len(body) // 2], body.replace(b"}]", b"},]", 1)):
            assert read(given_body, known) == read(given_body)


@SLOW
@given(st.lists(messages, min_size=1, max_size=5), st.integers(0, 1 << 32))
def test_conversation_continued_equals_whole_conversation(steps: list[Any], seed: int) -> None:
    def decoded(part: list[Any]) -> Any:
        return messages_in(msgspec.Raw(json.dumps(part).encode()))

    head = [b"tools", b"system"]
    conversation = finish(conversation_of(decoded(steps[0]), head, seed))
    for number in range(1, len(steps)):
        conversation = finish(continued(conversation, decoded(steps[number])))
    whole = [message for step in steps for message in step]
    assert conversation.prompt == finish(conversation_of(decoded(whole), head, seed)).prompt


@SLOW
@given(st.lists(st.binary(max_size=2000).map(lambda text: text * 9), max_size=5), st.integers(0, 9))
def test_hashes_extended_equal_hashes_at_once(pieces: list[bytes], seed: int) -> None:
    state = HashState(checksum=seed)
    for piece in pieces:
        state = extend_hashes(state, (piece,))
    assert state.hashes == hash_blocks(b"".join(pieces), seed=seed)
    assert state.size == sum(map(len, pieces))


@pytest.mark.parametrize("first", [511, 512, 513, 700])
def test_known_bodies_with_many_messages_give_the_same(first: int) -> None:
    """Messages beyond the parsed ones are read in another way, and old answers do not count."""
    known = KnownBodies()
    conversation = turns(first)
    for more in (1, 2, 600):
        assert read(body_of(conversation), known) == read(body_of(conversation))
        conversation = [*conversation, *({"role": "user", "content": "x"} for _ in range(more))]
        body = body_of(conversation)
        assert hits(known, body)
        assert read(body, known) == read(body)


@pytest.mark.parametrize("length", [WITH_PROMPT_AT_ONCE, AT_ONCE, LONGEST - 60_000])
def test_known_body_of_any_length_is_continued(length: int) -> None:
    known = KnownBodies()
    conversation = [{"role": "user", "content": "x" * (length // 40)} for _ in range(40)]
    first = body_of(conversation)
    assert length < len(first) < LONGEST
    assert read(first, known) == read(first)
    for _ in range(2):
        conversation += turns(2, 25_000)
        longer = body_of(conversation)
        assert hits(known, longer)
        assert read(longer, known) == read(longer)


def test_long_body_is_read_in_several_slices() -> None:
    body = body_of(turns(300, 3000))
    about = (CHAT, b"application/json", body, HINT)
    known = KnownBodies()
    assert read_at_once(*about, with_prompt=True, known=known) is None
    assert len(list(read_in_slices(*about, with_prompt=True, known=known))) >= 3
    assert len(known) == 1


@pytest.mark.parametrize(
    "brace", ['{"role":"user"}', '{ "role":"user"}', '{\n"role":"user"}', "{}"]
)
def test_long_body_of_many_objects_is_not_decoded_at_once(brace: str) -> None:
    known = KnownBodies()
    body = f'{{"model":"m","messages":[{",".join([brace] * 60_000)}]}}'.encode()
    with patch.object(known_bodies, "WITH_PROMPT_AT_ONCE", 1000):
        assert finish(known.read_in_slices(body, seed_of_name)) is None


def test_long_body_of_code_is_continued() -> None:
    known = KnownBodies()
    code = "if (x) {\n  y = {a: '{'};\n}\n" * 4000
    conversation = [{"role": "user", "content": code} for _ in range(5)]
    body = body_of(conversation)
    assert body.count(b"{") > 3 * MOST_OBJECTS
    assert read(body, known) == read(body)
    longer = body_of([*conversation, *turns(1)])
    assert hits(known, longer)
    assert read(longer, known) == read(longer)


def test_known_body_is_kept_without_a_copy() -> None:
    known = KnownBodies()
    bodies = [body_of(turns(count, 3000)) for count in (298, 300)]
    read(bodies[0], known)
    tracemalloc.start()
    try:
        read(bodies[1], known)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(known) == 1
    assert peak < 50_000


@given(st.integers(0, 3000), st.binary(max_size=20))
def test_objects_are_counted(count: int, text: bytes) -> None:
    body = (text + b"{") * count + text
    assert count_objects(body) == body.count(b"{")


# -- when --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"model":"m"', ""),
        ("", '"model":"m"'),
        ('"model":"m","tools":[{"name":"f"}]', '"stream":true'),
        ('"model":"m"', '"system":"s","tools":[{"name":"f"}]'),
    ],
)
@pytest.mark.parametrize("key", ["messages", "input"])
def test_known_body_is_read_from_where_the_last_turn_ended(
    before: str, after: str, key: str
) -> None:
    known = KnownBodies()
    conversation = turns(6)
    read(body_of(conversation, before, after, key), known)
    for _ in range(5):
        # A call of a tool may have keys of the same names.
        call = {"role": "assistant", "content": "", "input": "x", "messages": 1}
        conversation = [*conversation, call, *turns(1)]
        body = body_of(conversation, before, after, key)
        assert hits(known, body)
        assert read(body, known) == read(body)
    assert len(known) == 1


@pytest.mark.parametrize("key", ["messages", "input"])
def test_known_body_with_one_message_is_continued_and_repeated(key: str) -> None:
    known = KnownBodies()
    first = body_of(turns(1), after='"stream":true', key=key)
    read(first, known)
    for count in (1, 3):
        body = body_of(turns(count), after='"stream":true', key=key)
        assert hits(known, body)
        assert read(body, known) == read(body)


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": "x"}, {}])
def test_known_body_of_short_messages_is_continued(message: dict[str, str]) -> None:
    known = KnownBodies()
    for count in (1, 2, 3):
        body = body_of([message] * count, before="", after='"system":"s"')
        assert hits(known, body) is (count > 1)
        assert read(body, known) == read(body)
    assert len(known) == 1


def test_known_body_whose_array_is_not_certain_is_forgotten() -> None:
    known = KnownBodies()
    body = body_of(turns(3), after='"x":"\\u006d"')
    for _ in range(2):
        assert not hits(known, body)
        assert read(body, known) == read(body)
    assert len(known) == 1
    assert known.bytes == len(body)


@pytest.mark.parametrize(
    "after", ['"system":"other"', '"tools":[]', '"cache_salt":"s"', '"messages":[]']
)
def test_known_body_with_another_head_is_read_as_a_whole(after: str) -> None:
    known = KnownBodies()
    read(body_of(turns(4), after='"system":"s"'), known)
    body = body_of(turns(6), after=after)
    assert not hits(known, body) or after == '"tools":[]'
    assert read(body, known) == read(body)


def test_known_bodies_are_bounded_and_the_used_ones_stay() -> None:
    known = KnownBodies(most_bytes=40_000, most_bodies=8)
    used = body_of(turns(4), before='"model":"used"')
    read(used, known)
    for number in range(50):
        read(body_of(turns(number % 9 + 2), before=f'"model":"m{number}"'), known)
        assert known.bytes <= 40_000
        assert len(known) <= 8
        assert hits(known, used)


def test_body_larger_than_the_memory_is_not_kept() -> None:
    known = KnownBodies(most_bytes=100)
    body = body_of(turns(4))
    assert read(body, known) == read(body)
    assert (len(known), known.bytes) == (0, 0)


def test_body_that_takes_much_of_the_memory_drops_no_others() -> None:
    known = KnownBodies(most_bytes=10_000)
    small, large = body_of(turns(4)), body_of(turns(40), before='"model":"large"')
    assert len(small) < 2500 < len(large)
    read(small, known)
    read(large, known)
    assert hits(known, small)
