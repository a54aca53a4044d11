"""The simulated server accepts and refuses bodies like the captured real server."""

from __future__ import annotations

import gzip
import json

import pytest

from support.mock_memory import running_mock

PATH = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
TEXT = json.dumps(BODY)


def plus(more: str) -> bytes:
    return f"{TEXT[:-1]}, {more}}}".encode()


READ = {
    "byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "UTF-16 with a mark": TEXT.encode("utf-16"),
    "UTF-16LE": TEXT.encode("utf-16-le"),
    "UTF-16BE": TEXT.encode("utf-16-be"),
    "UTF-32": TEXT.encode("utf-32"),
    "UTF-32LE": TEXT.encode("utf-32-le"),
    "NaN in unknown fields": plus('"x": NaN, "y": -Infinity'),
    "lone surrogate in an unknown field": plus(r'"x": "\ud800"'),
    "surrogate bytes": TEXT[:-1].encode() + b', "user": "\xed\xa0\x80"}',
    "number beyond a double": plus('"x": 1e400'),
    "integer of 4000 digits": plus(f'"x": {"9" * 4000}'),
    "another key in capitals": plus('"MODEL": "nope"'),
    "the last of two models": b'{"model": "nope", ' + TEXT[1:].encode(),
    "white space behind": TEXT.encode() + b"\n\n  ",
    "no model": plus('"model": null'),
    "empty model": plus('"model": ""'),
}
UNREADABLE = {
    "no UTF-8": TEXT[:-1].encode() + b', "user": "\xff"}',
    "latin-1": TEXT.replace("Hello", "gr\xfcn").encode("latin-1"),
    "packed": gzip.compress(TEXT.encode()),
    "integer of 5000 digits": plus(f'"x": {"9" * 5000}'),
    "100 000 levels": plus(f'"x": {"[" * 100_000}{"]" * 100_000}'),
}
NO_JSON = {
    "newline in a string": plus('"x": "a\nb"'),
    "garbage behind": TEXT.encode() + b"x",
    "NUL behind": TEXT.encode() + b"\0",
    "comma behind": plus("")[:-2] + b",}",
    "single quotes": TEXT.replace('"', "'").encode(),
    "leading zero": plus('"x": 01'),
    "nan": plus('"x": nan'),
    "blank": b" ",
}
WRONG_KINDS = ["text/plain", "application/vnd.x+json", "application/json ; charset=utf-8", ""]
RIGHT_KINDS = ["application/json", "APPLICATION/JSON; charset=UTF-8", "application/json;x"]


@pytest.mark.parametrize("case", READ)
async def test_mock_body_readable_for_real_server_is_answered(case, autojump_clock):
    async with running_mock() as mock:
        assert (await mock.ask("POST", PATH, READ[case])).status == 200


@pytest.mark.parametrize("case", UNREADABLE)
async def test_mock_body_not_utf8_is_refused_by_framework(case, autojump_clock):
    async with running_mock() as mock:
        answer = await mock.ask("POST", PATH, UNREADABLE[case])
    assert (answer.status, answer.json) == (
        400,
        {"detail": "There was an error parsing the body"},
    )


@pytest.mark.parametrize("case", NO_JSON)
async def test_mock_body_invalid_json_is_refused_with_position(case, autojump_clock):
    async with running_mock() as mock:
        answer = await mock.ask("POST", PATH, NO_JSON[case])
    error = answer.json["error"]
    assert (answer.status, error["type"], error["code"]) == (400, "Bad Request", 400)
    assert "json_invalid" in error["message"]
    assert error["param"].startswith("body.")


@pytest.mark.parametrize("body", [b"null", b"", b'"text"', b"[1]"])
async def test_mock_body_not_an_object_is_refused(body, autojump_clock):
    async with running_mock() as mock:
        answer = await mock.ask("POST", PATH, body, "content-type: application/json")
    assert answer.status == 400
    kind = "missing" if body in (b"null", b"") else "model_attributes_type"
    assert kind in answer.json["error"]["message"]


async def test_mock_body_lone_surrogate_in_prompt_is_bad_request(autojump_clock):
    message = {"role": "user", "content": "\ud800"}
    async with running_mock() as mock:
        answer = await mock.ask("POST", PATH, BODY | {"messages": [message]})
    assert answer.status == 400
    assert answer.json["error"]["message"].startswith("TextEncodeInput must be Union[")


@pytest.mark.parametrize("kind", RIGHT_KINDS + WRONG_KINDS)
async def test_mock_body_content_type_must_be_exactly_json(kind, autojump_clock):
    async with running_mock() as mock:
        answer = await mock.ask("POST", PATH, TEXT.encode(), kind=kind)
    assert answer.status == (200 if kind in RIGHT_KINDS else 400)


@pytest.mark.parametrize(
    ("value", "stream"),
    [(True, True), ("true", True), ("yes", True), (1, True), ("false", False), (0, False)],
)
async def test_mock_body_stream_is_read_like_pydantic_boolean(value, stream, autojump_clock):
    async with running_mock() as mock:
        answer = await mock.ask("POST", PATH, BODY | {"stream": value})
    assert answer["content-type"].startswith("text/event-stream") == stream


@pytest.mark.parametrize("value", [2, "maybe", []])
async def test_mock_body_invalid_stream_boolean_is_refused(value, autojump_clock):
    async with running_mock() as mock:
        answer = await mock.ask("POST", PATH, BODY | {"stream": value})
    assert answer.status == 400
    assert answer.json["error"]["param"] == "body.stream"
