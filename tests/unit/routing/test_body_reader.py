"""JSON is read like vLLM reads it, in any encoding, spelling and length."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_router.errors import InvalidBody
from vllm_router.routing.prompt.blocks import Prompt
from vllm_router.routing.prompt.body_reader import (
    Reading,
    read_in_slices,
    read_routing_info,
    replaced,
)
from vllm_router.routing.prompt.json_scan import DEEPEST, MOST_MEMBERS, Members, scan
from vllm_router.routing.prompt.model_name import with_model
from vllm_router.routing.prompt.routing_info import AT_ONCE, RoutingInfo, read_at_once
from vllm_router.steps import Steps, finish

CHAT = b"/v1/chat/completions"
AUDIO = b"/v1/audio/transcriptions"
JSON = b"application/json"
FORM = b"multipart/form-data; boundary="
MB = 1_000_000

ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "UTF-8": lambda text: text.encode("utf-8", "surrogatepass"),
    "with a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass"),
    **{
        name: lambda text, name=name: text.encode(name, "surrogatepass")
        for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
    },
}


def reading(body: bytes, *, with_prompt: bool = False) -> Reading:
    return finish(read_in_slices(CHAT, JSON, body, with_prompt=with_prompt))


# -- bodies that Python reads and msgspec does not ------------------------------------------


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=list(ENCODINGS))
@pytest.mark.parametrize(
    "text",
    [
        '{"model":"größe/模型","stream":true}',
        '{"temperature":NaN,"model":"größe/模型","stream":true,"top_p":-Infinity,"x":[Infinity]}',
        '{"x":"\\ud800 \udc00","\\udfff":1,"model":"größe/模型","stream":true}',
        '{"model":"a","stream":false,"model":"größe/模型","stream":true}',
        '\r\n\t {"mod\\u0065l"\n:\t"gr\\u00f6\\u00dfe/模型" ,"stream" : true}\n\n',
        '{"model":"größe/模型","stream":true,"seed":' + "9" * 4300 + "}",
        '{"model":"größe/模型","stream":true,"x":' + "[" * 300 + "]" * 300 + "}",
        '{"model":"größe/模型","stream":true,"user":"\\ud800","session_id":"\\ud800"}',
    ],
    ids=lambda text: text[:40],
)
def test_body_reader_python_readable_body_has_its_model(encode: Callable[[str], bytes], text: str):
    body = encode(text)
    assert json.loads(body)["model"] == "größe/模型"
    facts = read_routing_info(CHAT, JSON, body)
    assert (facts.model, facts.stream, facts.session) == ("größe/模型", True, None)


_NAMES = st.sampled_from(["model", "stream", "x", "messages", "user", "mode", "model "]) | st.text(
    max_size=3
)
_SPACE = st.sampled_from(["", "", " ", "\n", "\r\n\t"])


def _written(draw: st.DrawFn, value: Any) -> str:
    """The value in one of the possible JSON spellings."""

    def space() -> str:
        return draw(_SPACE)

    if isinstance(value, dict):
        members = [
            f"{_written(draw, key)}{space()}:{space()}{_written(draw, inner)}"
            for key, inner in value.items()
            for _ in range(draw(st.sampled_from([1, 1, 1, 2])))
        ]
        return "{" + space() + f"{space()},{space()}".join(members) + space() + "}"
    if isinstance(value, list):
        return "[" + f"{space()},".join(_written(draw, inner) for inner in value) + "]"
    if isinstance(value, str) and draw(st.integers(0, 3)) == 0:
        return (
            '"' + "".join(f"\\u{ord(letter):04x}" for letter in value if ord(letter) < 65536) + '"'
        )
    return json.dumps(value, ensure_ascii=draw(st.booleans()))


_ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(alphabet=st.characters(), max_size=6)
    | st.sampled_from(['"', "\\", '\\"', "{", "}]", '","model":"z"', "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=10,
)


@st.composite
def _bodies(draw: st.DrawFn) -> bytes:
    value = draw(st.dictionaries(_NAMES, _ANY, max_size=6))
    encode = ENCODINGS[draw(st.sampled_from(list(ENCODINGS)))]
    text = _written(draw, value)
    if draw(st.integers(0, 9)) == 0 and text:
        place = draw(st.integers(0, len(text) - 1))
        text = (
            text[:place] + draw(st.sampled_from(["", '"', "{", ",", "\\", "x"])) + text[place + 1 :]
        )
    return encode(text)


def _model_of(value: Any) -> str | None:
    """vLLM's reading of `model`; None also if it refuses the value."""
    model = value.get("model") if isinstance(value, dict) else None
    return model if isinstance(model, str) and model else None


@given(_bodies())
@settings(max_examples=100, deadline=None)
@example(b'{"model":"a","model":null}')
def test_body_reader_every_body_is_read_like_python_or_refused(body: bytes):
    try:
        expected = json.loads(body)
    except (ValueError, RecursionError):
        with pytest.raises(InvalidBody):
            reading(body)
        return
    model = _model_of(expected)
    try:
        found = reading(body)
    except InvalidBody:
        assert model is not None
        assert any("\ud800" <= letter <= "\udfff" for letter in model)
        return
    assert found.info.model == model
    at_once = read_at_once(CHAT, JSON, body)
    assert at_once is None or at_once == found.info
    if model is not None:
        text = body if found.text is None else found.text
        edited, places = finish(replaced(text, found.places, found.name("neu/ü")))
        assert _same(json.loads(edited), {**expected, "model": "neu/ü"})
        assert {edited[start:end] for start, end in places} == {'"neu/ü"'.encode()}
        back, _ = finish(replaced(edited, places, found.name(model)))
        assert _same(json.loads(back), expected)


def _same(one: Any, other: Any) -> bool:
    """Equal, where NaN is equal to itself."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@pytest.mark.parametrize(
    ("members", "path"),
    [
        ('"kv_transfer_params":{"a":1}', "kv_transfer_params"),
        ('"kv_transfer_params":null', None),
        ('"ec_transfer_params":NaN', "ec_transfer_params"),
        ('"vllm_xargs":{"x":NaN,"kv_transfer_params":{}}', "vllm_xargs.kv_transfer_params"),
        ('"vllm_xargs":{"\\ud800":1,"kv_transfer_params":{}}', "vllm_xargs.kv_transfer_params"),
        ('"vllm_xargs":{"x":{"kv_transfer_params":{}}}', None),
        ('"vllm_xargs":[{"kv_transfer_params":{}}]', None),
        (
            '"vllm_xargs":{"x":"%s","ec_transfer_params":1}' % ("a " * MB),
            "vllm_xargs.ec_transfer_params",
        ),
        (
            '"sampling_params":{"a":Infinity,"extra_args":{"kv_transfer_params":0}}',
            "sampling_params.extra_args.kv_transfer_params",
        ),
        ('"sampling_params":{"kv_transfer_params":0}', None),
    ],
    ids=lambda value: str(value)[:50],
)
@pytest.mark.parametrize(
    "more", ["", ',"t":NaN', ',"x":"' + "b " * MB + '"'], ids=["", "odd", "long"]
)
def test_body_reader_transfer_parameters_in_odd_bodies_are_found(members, path, more):
    body = f'{{"model":"m",{members}{more}}}'.encode()
    assert json.loads(body)["model"] == "m"
    assert read_routing_info(b"/inference/v1/generate", JSON, body).transfer == path


# -- long bodies ---------------------------------------------------------------------------------


def long_bodies() -> dict[str, dict[str, Any]]:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVB+/" * MB}}
    sound = {"type": "input_audio", "input_audio": {"data": "UklGR" * MB, "format": "wav"}}
    text = {"type": "text", "text": "Was ist das? " * 1000}
    turns = [
        {"role": "user" if n % 2 else "assistant", "content": f"turn {n} " * 30}
        for n in range(9000)
    ]
    return {
        "pictures": {"messages": [{"role": "user", "content": [text, picture, picture, sound]}]},
        "many turns": {"messages": [{"role": "system", "content": "Be brief."}, *turns]},
        "with tools": {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": [1]}}}],
            "messages": [{"role": "user", "content": "ein langer Text \n" * 100_000}],
        },
        "completion": {"prompt": "ein langer Text \n" * 100_000},
        "token ids": {"prompt": list(range(300_000))},
        "input": {"input": "ein langer Text \n" * 100_000, "instructions": "Be brief."},
    }


@pytest.mark.parametrize("name", long_bodies())
def test_body_reader_long_body_has_facts_of_short_one(name: str, monkeypatch: pytest.MonkeyPatch):
    """A conversation keeps its block hashes when it outgrows the part that is read at once."""
    fields = {"model": "m", "stream": True, "cache_salt": "s", **long_bodies()[name]}
    body = json.dumps(fields).encode()
    assert len(body) > AT_ONCE
    assert read_at_once(CHAT, JSON, body, with_prompt=True) is None
    found = reading(body, with_prompt=True).info
    monkeypatch.setattr("vllm_router.routing.prompt.routing_info.AT_ONCE", 1 << 30)
    monkeypatch.setattr("vllm_router.routing.prompt.routing_info.in_one_slice", finish)
    assert found == read_at_once(CHAT, JSON, body, with_prompt=True)
    assert found.prompt.block_hashes


def test_body_reader_overlong_prompt_has_size_and_block_hashes():
    turn = {"role": "user", "content": "ein langer Text \n" * 400_000}
    body = json.dumps({"model": "m", "messages": [turn, {"role": "user", "content": "a"}]}).encode()
    longer = json.dumps(
        {"model": "m", "messages": [turn, {"role": "user", "content": "b"}]}
    ).encode()
    first, second = (reading(one, with_prompt=True).info.prompt for one in (body, longer))
    assert 0.9 * len(body) < first.size <= len(body)
    assert first.block_hashes == second.block_hashes
    assert first.conversation == second.conversation


def test_body_reader_odd_body_has_prompt_of_plain_one():
    fields = {"model": "m", "messages": [{"role": "user", "content": "Text " * 1000}]}
    plain = read_routing_info(CHAT, JSON, json.dumps(fields).encode(), with_prompt=True)
    odd = json.dumps({**fields, "temperature": float("nan")}).encode()
    assert read_at_once(CHAT, JSON, odd, with_prompt=True) is None
    assert read_routing_info(CHAT, JSON, odd, with_prompt=True) == plain
    marked = b"\xef\xbb\xbf" + json.dumps(fields).encode()
    assert read_routing_info(CHAT, JSON, marked, with_prompt=True) == plain
    utf16 = json.dumps(fields).encode("utf-16")
    assert read_routing_info(CHAT, JSON, utf16, with_prompt=True) == plain
    short = read_routing_info(CHAT, JSON, odd, with_prompt=True, shortest=len(odd) + 1)
    assert short.prompt == Prompt(size=len(odd))


def test_body_reader_white_space_around_long_value_is_skipped():
    body = b" " * MB + b'{"model":' + b" " * 60_000 + b'"m"' + b"\n" * MB + b"}" + b" " * MB
    found = reading(body)
    assert found.info.model == "m"
    (place,) = found.places
    assert body[slice(*place)] == b'"m"'
    with pytest.raises(InvalidBody, match="blanks"):
        reading(b'{"model":' + b" " * MB + b'"m"}')


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{" + b'"model":"m",' * 20_000 + b'"model":"m"}', f"more than {MOST_MEMBERS} members"),
        (b'{"model":"m","x":' + b"[" * MB + b"]" * MB + b"}", f"deeper than {DEEPEST} levels"),
        (b'{"model":"' + b"m" * 2 * MB + b'"}', "`model` is longer than 4096 bytes"),
        (b'{"model":"\\ud800","x":"' + b"m" * 2 * MB + b'"}', "surrogate"),
        (
            b"{" + b",".join(b'"%d":[%b0]' % (n, b"[]," * 2000) for n in range(600)) + b"}",
            "too many values",
        ),
        (b'{"model":"m","x":[' + b"[]," * 4_200_000 + b"1]}", "too many values"),
    ],
    ids=["members", "nesting", "name", "surrogate", "top values", "values"],
)
def test_body_reader_body_beyond_limit_is_refused(body: bytes, message: str):
    with pytest.raises(InvalidBody, match=message):
        reading(body)


@pytest.mark.parametrize(
    "body",
    [b"[%b]", b'{"model":"m","x":[%b1]', b'{"model":"m","x":[%b1]} x', b'{"model":"m","x":"%b'],
)
def test_body_reader_long_body_that_is_no_object_has_no_facts(body: bytes):
    """The server reports the error."""
    assert reading(body % (b"[1,2]," * (MB // 4))).info == RoutingInfo()


def test_body_reader_alias_with_too_many_members_is_refused():
    body = b"{" + b'"model":"m",' * 5000 + b'"model":"m"}'
    with pytest.raises(InvalidBody, match="members"):
        with_model(body, "other")


@given(_bodies().filter(lambda body: body[:1] in b"{ \r\n"))
@settings(max_examples=60, deadline=None)
def test_body_reader_positions_are_independent_of_slices(body: bytes):
    def places(window: int) -> tuple[dict[str, Any], list[tuple[int, int]]] | None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vllm_router.routing.prompt.json_scan._WINDOW", window)
            patch.setattr("vllm_router.routing.prompt.json_scan._STRING_WINDOW", window)
            found: Members | None = finish(scan(body, frozenset({"model", "x", "stream"})))
        return None if found is None else (found.spans, found.models)

    assert places(2) == places(7) == places(1 << 13)


# -- the loop is never blocked -------------------------------------------------------------------

SIZE = 3 * MB
HOSTILE_JSON = {
    "one string": b'{"model":"m","x":"' + b"a" * SIZE + b'"}',
    "escapes": b'{"model":"m","x":"' + b"\\n" * (SIZE // 2) + b'"}',
    "backslashes": b'{"model":"m","x":"' + b"\\\\" * (SIZE // 2) + b'"}',
    "code points": b'{"model":"m","prompt":"' + b"\\u0041" * (SIZE // 6) + b'"}',
    "a string without an end": b'{"model":"m","x":"' + b'\\"' * (SIZE // 2),
    "empty lists": b'{"model":"m","messages":[' + b"[]," * (SIZE // 3) + b"1]}",
    "empty objects": b'{"model":"m","messages":[' + b"{}," * (SIZE // 3) + b"{}]}",
    "empty strings": b'{"model":"m","input":[' + b'"",' * (SIZE // 3) + b'""]}',
    "numbers": b'{"model":"m","prompt":[' + b"1," * (SIZE // 2) + b"1]}",
    "a long number": b'{"model":"m","priority":' + b"9" * SIZE + b"}",
    "models": b"{" + b'"model":"m",' * (SIZE // 12) + b'"b":1}',
    "escaped models": b"{" + b'"m\\u006fdel":"m",' * (SIZE // 17) + b'"b":1}',
    "open lists": b'{"model":"m","x":' + b"[" * SIZE,
    "deep lists": b'{"model":"m","x":[' + (b"[" * 400 + b"]" * 400 + b",") * (SIZE // 801) + b"1]}",
    "blanks": b'{"model":"m"' + b" " * SIZE + b"}",
    "zeros": bytes(SIZE),
    "UTF-16": ('{"model":"m","x":[' + "[]," * (SIZE // 6) + "1]}").encode("utf-16"),
    "short messages": b'{"model":"m","messages":['
    + b'{"role":"user","content":"a"},' * (SIZE // 30)
    + b"{}]}",
}
HEAD = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
HOSTILE_FORMS = {
    "dashes": (b"-" * 70, b"-" * SIZE),
    "dashes in a file": (b"B", HEAD + b"-" * SIZE),
    "nearly boundaries": (b"B", HEAD + b"\r\n--" * (SIZE // 4)),
    "boundaries in a file": (b"B", HEAD + b"\r\n--Bx" * (SIZE // 6)),
    "parts": (b"B", HEAD + (b"\r\n" + HEAD) * (SIZE // 80)),
    "parameters": (b"B", (HEAD[:-4] + b';a="\\""' * 62 + b"\r\n\r\n\r\n") * (SIZE // 500)),
    "blanks behind a boundary": (b"B", HEAD + b"\r\n--B" + b" " * SIZE),
    "empty lines": (b"B", b"\r\n" * (SIZE // 2)),
    "a header without an end": (b"B", b"--B\r\n" + b"a" * SIZE),
}
HOSTILE = [
    *((name, JSON, body) for name, body in HOSTILE_JSON.items()),
    *((f"form: {name}", FORM + kind, body) for name, (kind, body) in HOSTILE_FORMS.items()),
    ("fields: separators", b"application/x-www-form-urlencoded", b"&" * SIZE),
    ("fields: escapes", b"application/x-www-form-urlencoded", b"model=" + b"%41" * (SIZE // 3)),
]

LONGEST_SLICE = 0.25
"""Seconds of CPU of this thread. About 0.007 are seen; 0.2 to 20 were without slices."""


@pytest.mark.parametrize(
    ("content_type", "body"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE]
)
def test_body_reader_hostile_body_is_read_in_short_slices(content_type: bytes, body: bytes):
    path = CHAT if content_type == JSON else AUDIO
    steps = read_in_slices(path, content_type, body, with_prompt=True, shortest=1024)
    found = _measured(steps)
    if found is not None and found.places:
        _measured(replaced(body, found.places, b'"other"'))


def _measured(steps: Steps[Any]) -> Any:
    """The result; None if the body is refused."""
    while True:
        began = time.thread_time()
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        except InvalidBody:
            return None
        finally:
            assert time.thread_time() - began < LONGEST_SLICE
