"""What is read from a body, and that nothing in a body can hurt."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.routing.facts import Facts, for_model, read_facts
from vllm_router.routing.pieces import Prompt

JSON = b"application/json"
CHAT = b"/v1/chat/completions"


def of(body: bytes | dict, path: bytes = CHAT, content_type: bytes = JSON) -> Facts:
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    return read_facts(path, content_type, body)


def test_model_and_stream():
    facts = of({"messages": [{"role": "user", "content": "hi"}], "stream": True, "model": "m"})
    assert (facts.model, facts.stream, facts.replayable) == ("m", True, True)
    assert of({"model": "m"}).stream is False


def test_a_name_may_be_any_text():
    assert of({"model": "größe/模型"}).model == "größe/模型"
    assert of(b'{"model": "\\u6a21"}').model == "模"


@pytest.mark.parametrize("model", [None, 5, "", [], {"a": 1}, True, 1.5])
def test_a_model_that_is_no_name_is_none(model):
    assert of({"model": model}).model is None


@pytest.mark.parametrize("stream", [1, "true", None, [True], {}, False])
def test_only_true_is_a_stream(stream):
    assert of({"model": "m", "stream": stream}).stream is False


def test_the_last_of_two_models_counts_as_in_the_engine():
    assert of(b'{"model": "a", "model": "b"}').model == "b"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "m"',
        b'{"model": "m"}{',
        b"[1, 2]",
        b'"m"',
        b"null",
        b"\xff\xfe{",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b"[" * 200_000,
        b'{"x":' * 100_000,
        b'{"model":' + b"[" * 200_000,
        b'{"model": ' + b"9" * 50_000 + b"}",
        b'{"model": 1e999999}',
        b"\x00" * 100,
    ],
)
def test_a_body_that_cannot_be_read_has_no_facts(body):
    assert of(body) == Facts()


def test_what_routing_does_not_need_may_be_as_odd_as_it_likes():
    huge = b"9" * 50_000
    assert of(b'{"seed": ' + huge + b', "model": "m"}').model == "m"
    assert of(b'{"logit_bias": {"1": -1e400}, "model": "m", "stream": true}').stream


def test_a_stored_or_background_response_leaves_something_behind():
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
def test_a_form_names_its_model_wherever_it_stands(content_type):
    stream = b'content-disposition: form-data; name="stream"\r\n\r\nTrue'
    for parts in ([MODEL, FILE, stream], [FILE, stream, MODEL]):
        facts = of(form(*parts), content_type=content_type)
        assert (facts.model, facts.stream) == ("whisper", True)


def test_a_file_called_model_is_not_the_model():
    file = b'Content-Disposition: form-data; name="file"; filename="model"\r\n\r\nnot me'
    facts = of(form(file), content_type=b"multipart/form-data; boundary=xYz")
    assert facts == Facts()


def test_a_file_with_a_form_in_it_does_not_name_the_model():
    inner = FILE + b'name="model"\r\n\r\nevil'
    facts = of(form(inner, MODEL), content_type=b"multipart/form-data; boundary=xYz")
    assert facts.model == "whisper"


def test_of_a_form_that_names_two_models_the_last_counts_as_for_the_engine():
    """Else a key might pass off one that it may not use as another."""
    other = MODEL.replace(b"whisper", b"other")
    body, content_type = form(other, MODEL), b"multipart/form-data; boundary=xYz"
    assert of(body, content_type=content_type).model == "whisper"
    edited = for_model(body, content_type, "v3")
    assert edited == form(*[MODEL.replace(b"whisper", b"v3")] * 2)


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=no",
    ],
)
def test_a_form_without_its_boundary_has_no_facts(content_type):
    assert of(form(MODEL), content_type=content_type) == Facts()


@given(
    st.binary(max_size=300),
    st.sampled_from([JSON, b"", b"multipart/form-data; boundary=a", b"text/plain"]),
)
def test_no_body_whatever_raises(body, content_type):
    facts = of(body, content_type=content_type)
    assert facts.model is None or facts.model


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
_KEYS = st.sampled_from(["model", "stream", "store", "messages", "prompt", "input"])


@given(st.dictionaries(_KEYS | st.text(max_size=5), _VALUES, max_size=6))
def test_facts_agree_with_a_whole_decoding_of_the_body(body):
    facts = of(body)
    model = body.get("model")
    assert facts.model == (model if isinstance(model, str) and model else None)
    assert facts.stream is (body.get("stream") is True)


@pytest.mark.parametrize("body", [b'{"model":"m"}', b"not json", b""])
def test_only_what_is_known_to_leave_nothing_behind_may_be_sent_twice(body):
    for path in (CHAT, b"/v1/embeddings", b"/tokenize", b"/v1/audio/transcriptions"):
        assert of(body, path).replayable
    for path in (b"/v1/files", b"/v1/batches", b"/v1/responses/resp_1/cancel", b"/v1/anything"):
        assert not of(body, path).replayable
    assert of(body, b"/v1/responses").replayable is body.startswith(b"{")
    form = b"multipart/form-data; boundary=x"
    assert not of(b"--x\r\n\r\n--x--", b"/v1/files", form).replayable


def test_of_a_short_body_the_prompt_is_known_by_its_size_alone():
    body = json.dumps({"model": "m", "user": "u", "prompt": "x" * 600}).encode()
    facts = read_facts(b"/v1/completions", JSON, body, with_prompt=True, shortest=len(body) + 1)
    assert facts.prompt == Prompt(size=len(body))
    assert (facts.model, facts.session) == ("m", "u")
    facts = read_facts(b"/v1/completions", JSON, body, with_prompt=True, shortest=len(body))
    assert (facts.prompt.size, len(facts.prompt.chain)) == (600, 2)
