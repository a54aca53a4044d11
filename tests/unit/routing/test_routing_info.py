"""Routing data read from a body, for any contents of the body."""

from __future__ import annotations

import codecs
import contextlib
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.errors import InvalidBody
from vllm_router.routing.prompt.blocks import Prompt
from vllm_router.routing.prompt.body_reader import read_in_slices, read_routing_info, replaced
from vllm_router.routing.prompt.form_header import boundary_and_charset
from vllm_router.routing.prompt.forms import is_true
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.prompt.session import session_hint
from vllm_router.steps import finish

JSON = b"application/json"
CHAT = b"/v1/chat/completions"
AUDIO = b"/v1/audio/transcriptions"
FORM = b"multipart/form-data; boundary=xYz"


def of(body: bytes | dict, path: bytes = CHAT, content_type: bytes = JSON) -> RoutingInfo:
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    return read_routing_info(path, content_type, body)


def test_facts_have_model_and_stream():
    facts = of({"messages": [{"role": "user", "content": "hi"}], "stream": True, "model": "m"})
    assert (facts.model, facts.stream, facts.replayable) == ("m", True, True)
    assert of({"model": "m"}).stream is False


def test_facts_model_name_may_be_any_text():
    assert of({"model": "größe/模型"}).model == "größe/模型"
    assert of(b'{"model": "\\u6a21"}').model == "模"


@pytest.mark.parametrize("model", [None, 5, "", [], {"a": 1}, True, 1.5])
def test_facts_model_of_other_type_is_none(model):
    assert of({"model": model}).model is None


@pytest.mark.parametrize("stream", [0, "false", "no", 2, None, [True], {}, False, 1.5, "x" * 9000])
def test_facts_stream_not_true_for_pydantic_is_false(stream):
    assert of({"model": "m", "stream": stream}).stream is False


@pytest.mark.parametrize("stream", [True, 1, 1.0, "true", "True", "yes", "ON", "1", "t", "y"])
def test_facts_stream_true_for_pydantic_is_true(stream):
    assert of({"model": "m", "stream": stream}).stream is True


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        *[(5, 5), ("-5", -5), (5.0, 5), ("x", 0), (5.5, 0), (True, 0), ([], 0)],
        *[("+5", 5), (" 5 ", 5), ("+-5", 0), ("--5", 0), ("+", 0), ("1_0", 0), ("²", 0)],
    ],
)
def test_facts_priority_is_read_like_pydantic_integer(priority, expected):
    assert of({"model": "m", "priority": priority}).priority == expected


@pytest.mark.parametrize("priority", [10**18 + 1, 10**40, 1e300, "9" * 40])
def test_facts_huge_priority_fits_a_word_of_64_bits(priority):
    assert of({"model": "m", "priority": priority}).priority == 10**18
    least = f"-{priority}" if isinstance(priority, str) else -priority
    assert of({"model": "m", "priority": least}).priority == -(10**18)


def test_facts_last_of_two_models_counts():
    assert of(b'{"model": "a", "model": "b"}').model == "b"


@pytest.mark.parametrize(
    "body",
    [b"", b"[1, 2]", b'"m"', b"null", b'{"model": ' + b"9" * 4000 + b"}", b'{"model": 1e999999}'],
    ids=lambda body: repr(body[:20]),
)
def test_facts_of_refused_content_type_are_empty(body):
    assert of(body) == RoutingInfo()


BROKEN = [
    (b"{", "Expecting property name enclosed in double quotes at line 1 column 2"),
    (b'{"model": "m"', "Expecting ',' delimiter"),
    (b'{"model": "m"}{', "Extra data at line 1 column 15"),
    (b'{\n"model" "m"}', "Expecting ':' delimiter at line 2 column 9"),
    (b"\xff\xfe{", "truncated data"),
    (b'{"model": "\xff"}', "not valid utf-8: invalid start byte at byte 11"),
    (b'{"model": "\\ud800"}', "surrogate pair"),
    (b'{"model": "m", "x": "\t"}', "Invalid control character"),
    (b"[" * 100_000, "The request body is n"),  # nested too deeply; or not JSON, on a large stack
    (b'{"x":' * 500_000, "deep"),
    (b'{"model":' + b"[" * 200_000, "deeper than 500 levels"),
    (b'{"model": "m", "x": ' + b"[" * 600 + b"]" * 600 + b', "y": NaN}', "500 levels"),
    (b"\x00" * 100, "Expecting value"),
]


@pytest.mark.parametrize(("body", "message"), BROKEN, ids=lambda value: repr(value[:20]))
def test_facts_body_unreadable_for_vllm_is_refused_with_reason(body, message):
    with pytest.raises(InvalidBody, match=re.escape(message)):
        of(body)


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        (CHAT, b"text/plain"),
        (CHAT, b""),
        (CHAT, b"application/x-www-form-urlencoded"),
        (CHAT, b"multipart/form-data; boundary=x"),
        (b"/v1/files", b"application/octet-stream"),
        (AUDIO, JSON),
    ],
)
def test_facts_of_perhaps_invalid_json_are_empty(path, content_type):
    """The server reports the error, or accepts the body."""
    assert of(b"{", path, content_type).model is None


def test_facts_unneeded_members_may_be_odd():
    huge = b"9" * 50_000
    assert of(b'{"seed": ' + huge + b', "model": "m"}').model == "m"
    assert of(b'{"logit_bias": {"1": -1e400}, "model": "m", "stream": true}').stream


def test_facts_stored_or_background_response_is_unrepeatable():
    responses = b"/v1/responses"
    assert of({"model": "m"}, responses).replayable
    assert of({"model": "m", "store": False}, responses).replayable
    assert not of({"model": "m", "store": True}, responses).replayable
    assert not of({"model": "m", "background": True}, responses).replayable
    assert of({"model": "m", "store": True}, CHAT).replayable
    for odd in ("yes", 1, [0], {"a": 1}, "x" * 10_000):
        assert not of({"model": "m", "store": odd}, responses).replayable
        assert of({"model": "m", "store": odd, "stream": True}, responses).stream
    for nothing in (0, "", [], None):
        assert of({"model": "m", "store": nothing}, responses).replayable


@pytest.mark.parametrize("content_type", [b"application/x-www-form-urlencoded", FORM, b"text/x"])
def test_facts_json_path_is_read_as_json_for_any_content_type(content_type):
    """vLLM's `/invocations` looks at the Content-Type, and then at the body itself."""
    body = b'{"model":"m","x":"&model=other&--xYz--"}'
    assert of(body, b"/invocations", content_type).model == "m"
    assert of(body, CHAT, content_type).model == "m"


# -- multipart ---------------------------------------------------------------------------------


def form(*parts: bytes, boundary: bytes = b"xYz") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + (
        b"--" + boundary + b"--\r\n"
    )


FILE = (
    b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\nRIFF\x00\x01\r\n"
)
MODEL = b'Content-Disposition: form-data; name="model"\r\n\r\nwhisper'


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data; boundary=xYz",
        b'multipart/form-data; boundary="xYz"',
        b"Multipart/Form-Data;charset=utf-8;Boundary=xYz",
    ],
)
def test_facts_form_model_is_found_in_any_position(content_type):
    stream = b'content-disposition: form-data; name="stream"\r\n\r\nTrue'
    for parts in ([MODEL, FILE, stream], [FILE, stream, MODEL]):
        facts = of(form(*parts), AUDIO, content_type)
        assert (facts.model, facts.stream) == ("whisper", True)


def test_facts_form_file_called_model_is_not_the_model():
    file = b'Content-Disposition: form-data; name="file"; filename="model"\r\n\r\nnot me'
    facts = of(form(file), AUDIO, FORM)
    assert facts == RoutingInfo()


def test_facts_form_inside_a_file_does_not_name_the_model():
    inner = FILE + b'name="model"\r\n\r\nevil'
    facts = of(form(inner, MODEL), AUDIO, FORM)
    assert facts.model == "whisper"


def test_facts_form_last_of_two_models_counts():
    """Else a key might use a model that it may not use."""
    other = MODEL.replace(b"whisper", b"other")
    body, content_type = form(other, MODEL), b"multipart/form-data; boundary=xYz"
    assert of(body, AUDIO, content_type).model == "whisper"
    reading = finish(read_in_slices(AUDIO, content_type, body))
    edited, places = finish(replaced(body, reading.places, reading.name("v3")))
    assert edited == form(*[MODEL.replace(b"whisper", b"v3")] * 2)
    assert [edited[start:end] for start, end in places] == [b"v3", b"v3"]


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=no",
    ],
)
def test_facts_form_without_boundary_is_refused(content_type):
    assert of(form(MODEL), content_type=content_type) == RoutingInfo()
    with pytest.raises(InvalidBody):
        of(form(MODEL), AUDIO, content_type)


@given(
    st.binary(max_size=300),
    st.sampled_from([JSON, b"", b"multipart/form-data; boundary=a", b"text/plain"]),
)
def test_facts_any_body_raises_only_invalid_request(body, content_type):
    with contextlib.suppress(InvalidBody):
        facts = of(body, content_type=content_type)
        assert facts.model is None or facts.model


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
_KEYS = st.sampled_from(["model", "stream", "store", "messages", "prompt", "input"])


@given(st.dictionaries(_KEYS | st.text(max_size=5), _VALUES, max_size=6))
def test_facts_agree_with_whole_decoding(body):
    facts = of(body)
    model = body.get("model")
    assert facts.model == (model if isinstance(model, str) and model else None)
    stream = body.get("stream")
    assert facts.stream is (stream is True or is_true(stream))


@pytest.mark.parametrize("body", [b'{"model":"m"}', b"[]", b""])
def test_facts_only_known_paths_are_repeatable(body):
    for path in (CHAT, b"/v1/embeddings", b"/tokenize", b"/v1/audio/transcriptions"):
        assert of(body, path).replayable
    for path in (b"/v1/files", b"/v1/batches", b"/v1/responses/resp_1/cancel", b"/v1/anything"):
        assert not of(body, path).replayable
    assert of(body, b"/v1/responses").replayable is body.startswith(b"{")
    form = b"multipart/form-data; boundary=x"
    assert not of(b"--x--", b"/v1/files", form).replayable


def test_facts_prompt_of_short_body_is_its_size():
    body = json.dumps({"model": "m", "session_id": "session-1", "prompt": "x" * 600}).encode()
    facts = read_routing_info(
        b"/v1/completions", JSON, body, session_hint({}), with_prompt=True, shortest=len(body) + 1
    )
    assert facts.prompt == Prompt(size=len(body))
    assert (facts.model, facts.session) == ("m", "session-1")
    facts = read_routing_info(b"/v1/completions", JSON, body, with_prompt=True, shortest=len(body))
    assert (facts.prompt.size, len(facts.prompt.block_hashes)) == (600, 2)


def test_form_charset_that_nothing_knows_is_not_remembered(monkeypatch):
    asked = []
    monkeypatch.setattr(codecs, "lookup", asked.append)  # remembers unknown names for ever
    for charset in (b"x-unknown", b"utf-16", b"", b"a" * 3000):
        with pytest.raises(InvalidBody, match="charset"):
            read_routing_info(AUDIO, FORM + b"; charset=" + charset, b"--xYz--")
    assert not asked


@pytest.mark.parametrize(
    ("charset", "expected"),
    [
        *[(name, "utf-8") for name in ("utf-8", "UTF8", "utf_8", " u8 ")],
        *[(name, "iso8859-1") for name in ("latin-1", "ISO-8859-1", "l1", "iso_8859-1:1987")],
        *[(name, "ascii") for name in ("ascii", "US-ASCII", "ansi_x3.4-1968")],
    ],
)
def test_form_charset_is_found_by_all_of_its_names(charset, expected):
    assert codecs.lookup(charset).name == expected
    assert boundary_and_charset({"boundary": "x", "charset": charset}) == (b"x", expected)
