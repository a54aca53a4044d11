"""Bodies of every form: routed to the server of the model, with no other change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import trio

from support.fleet_makers import come_up
from support.lazy_import import LazyImport
from support.proxy_harness import Got, Rig, lab
from support.scripted_server import GOOD, answering, silent
from vllm_router.config.auth import KeyConfig
from vllm_router.config.types import digest_of
from vllm_router.http.asgi_types import IDENTITY
from vllm_router.proxy.identity import Identity
from vllm_router.proxy.slices import in_slices
from vllm_router.steps import Steps

form_oracle = LazyImport("support.form_oracle")

JSON_TYPE = (b"content-type", b"application/json")
AUDIO = "/v1/audio/transcriptions"
TABLES = """
[models]
public = "big"
safe = { serves = "gone", fallback = "public" }
"""
MB = 1_000_000


def two(rig: Rig) -> None:
    """`a` has the big model, `b` the small one."""
    come_up(rig.server("a"), trio.current_time(), "big")
    come_up(rig.server("b"), trio.current_time(), "small")


def options(**more: Any) -> dict[str, Any]:
    return {"tables": TABLES, "up": False, **more}


async def post_with_key(
    rig: Rig, body: bytes, *models: str, headers: Sequence[tuple[bytes, bytes]], path: str = AUDIO
) -> Got:
    key = KeyConfig(name="k", digest=digest_of("k"), models=models)
    client = rig.client(body, path=path, headers=tuple(headers))
    client._scope[IDENTITY] = Identity(key, given=True)
    return await client.run()


def form(*parts: tuple[str, bytes], boundary: bytes = b"xYz") -> bytes:
    pieces = []
    for parameters, value in parts:
        head = b"Content-Disposition: form-data; " + parameters.encode()
        pieces.append(b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, head, value))
    return b"".join(pieces) + b"--" + boundary + b"--\r\n"


FORM_TYPE = (b"content-type", b"multipart/form-data; boundary=xYz")
FILE = ('name="file"; filename="a.wav"', b"RIFF\x00\x01")

# -- B1 ------------------------------------------------------------------------------------------

WORDS = "a b" * 400_000
"""More than is read at once: AT_ONCE of `routing_info`."""

CHAT = '{"model":"%s","messages":[{"role":"user","content":"hi"}],"temperature":%s}'
BODIES = {
    "NaN": lambda model: (CHAT % (model, "NaN")).encode(),
    "a byte order mark": lambda model: b"\xef\xbb\xbf" + (CHAT % (model, "1")).encode(),
    "UTF-16": lambda model: (CHAT % (model, "1")).encode("utf-16"),
    "UTF-32": lambda model: (CHAT % (model, "1")).encode("utf-32-be"),
    "half a surrogate pair": lambda model: (CHAT % (model, '"\\ud800"')).encode(),
    "a raw half": lambda model: (CHAT % (model, '"\ud800"')).encode("utf-8", "surrogatepass"),
    "a repeated key": lambda model: (CHAT % (model, f'1,"model":null,"model":"{model}"')).encode(),
    "long": lambda model: (CHAT % (model, '1,"x":"' + WORDS + '"')).encode(),
    "long UTF-16": lambda model: (CHAT % (model, '1,"x":"' + WORDS + '"')).encode("utf-16"),
    "long and crowded": lambda model: (CHAT % (model, '1,"x":[' + "[1]," * 90_000 + "1]")).encode(),
}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("kind", BODIES)
async def test_body_in_unusual_json_is_routed_by_its_model(autojump_clock, kind, watched):
    body = BODIES[kind]("small")
    async with lab(answering(GOOD), answering(GOOD), **options(watched=watched)) as rig:
        two(rig)
        for _ in range(2):
            assert (await rig.post(body)).status == 200
        assert rig.requests() == {"a": 0, "b": 2}
        assert {request.body for request in rig.scripted["b"].requests} == {body}
        assert rig.recorder.last.model == "small"


@pytest.mark.parametrize("kind", BODIES)
async def test_body_in_unusual_json_gets_alias_applied(autojump_clock, kind):
    body = BODIES[kind]("public")
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        two(rig)
        digest = (b"content-digest", b"sha-256=:abc=:")
        for asked in (body, BODIES[kind]("safe")):
            assert (await rig.post(asked, headers=(JSON_TYPE, digest))).status == 200
            seen = rig.scripted["a"].requests[-1]
            assert _text(json.loads(seen.body)) == _text({**json.loads(body), "model": "big"})
            assert seen[b"content-length"] == b"%d" % len(seen.body)
            assert seen[b"content-digest"] is None
        assert rig.requests() == {"a": 2, "b": 0}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@pytest.mark.parametrize("kind", BODIES)
async def test_body_in_unusual_json_is_limited_to_models_of_key(autojump_clock, kind):
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        two(rig)
        mine, other = BODIES[kind]("small"), BODIES[kind]("big")
        path = "/v1/chat/completions"
        got = await post_with_key(rig, mine, "small", headers=[JSON_TYPE], path=path)
        assert got.status == 200
        got = await post_with_key(rig, other, "small", headers=[JSON_TYPE], path=path)
        assert (got.status, got.code) == (403, "model_not_allowed")


DEEP = b"[" * 500_000 + b"]" * 500_000
"""Deeper than Python 3.14 reads on a stack of 8 MB; earlier versions read some thousand levels."""


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"model":"big",}', "Illegal trailing comma|Expecting property name"),
        (b"{", "Expecting property name enclosed in double quotes at line 1 column 2"),
        (b"\xff", "not valid utf-8: invalid start byte at byte 0"),
        (b'{"model":"big","x":' + DEEP + b"}", "nested"),
        (b'{"model":"\\ud800"}', "surrogate pair"),
    ],
    ids=["comma", "open", "bytes", "deep", "name"],
)
async def test_body_unreadable_for_vllm_is_refused_with_reason(autojump_clock, body, problem):
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        two(rig)
        got = await rig.post(body)
        assert (got.status, got.code) == (400, "invalid_body")
        assert any(part in got.json["error"]["message"] for part in problem.split("|"))
        assert rig.requests() == {"a": 0, "b": 0}


async def test_body_with_thousands_of_models_gets_no_alias(autojump_clock):
    body = b"{" + b'"model":"public",' * 5000 + b'"model":"public"}'
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        two(rig)
        got = await rig.post(body)
        assert (got.status, got.code) == (400, "invalid_body")
        assert "4096 members" in got.json["error"]["message"]


# -- B2 ------------------------------------------------------------------------------------------

SECOND = [('name="model"', b"small"), FILE]
NOT_PLAIN = {
    "another case": form(*SECOND, ('name="MODEL"', b"big")),
    "twice": form(('name="model"', b"small"), FILE, ('name="model"', b"small")),
    "twice, another one": form(('name="model"', b"big"), FILE, ('name="model"', b"small")),
    "a file as well": form(*SECOND, ('name="model"; filename="x"', b"big")),
    "an odd name": form(*SECOND, ('name="mod\\el"', b"big")),
    "a name in RFC 2231": form(*SECOND, ("name*=utf-8''model", b"big")),
    "two names": form(*SECOND, ('name="x"; name="model"', b"small")),
    "two dispositions": form((
        'name="x"\r\nContent-Disposition: form-data; name="model"', b"small"
    ), FILE),
    "an odd header": form(('name="model"\r\nX-Y: z', b"small"), FILE),
    "encoded": form(('name="model"\r\nContent-Transfer-Encoding: base64', b"small"), FILE),
    "a preamble": b"\r\npreamble" + form(*SECOND),
    "an epilogue": form(*SECOND) + form(('name="model"', b"big")),
    "no end": form(*SECOND).removesuffix(b"--xYz--\r\n") + b"--xYz\r\n",
    "line feeds": form(*SECOND, ('name="a"', b"\n--xYz\nContent-Disposition: form-data; name=b")),
    "white space": form(*SECOND).replace(b"--xYz\r\n", b"--xYz \r\n", 2),
}  # fmt: skip
TYPES = {
    "two boundaries": b"multipart/form-data; boundary=y; boundary=xYz",
    "a boundary in a parameter": b'multipart/form-data; a="; boundary=y"; boundary=xYz',
    "a charset": b"multipart/form-data; boundary=xYz; charset=latin-1",
    "RFC 2231": b"multipart/form-data; boundary*=utf-8''y; boundary=xYz",
    "another name": b"multipart/form-data; xboundary=y; boundary=xYz",
    "an odd one": b'multipart/form-data; boundary="x\\Yz"',
    "none": b"multipart/form-data",
    "none named": b"multipart/form-data; xYz",
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
async def test_form_for_key_with_models_must_be_plain(autojump_clock, kind):
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        two(rig)
        got = await post_with_key(rig, NOT_PLAIN[kind], "small", headers=[FORM_TYPE])
        assert got.status == 400
        assert got.code in ("form_not_plain", "invalid_body")
        assert rig.requests() == {"a": 0, "b": 0}
        plain = await post_with_key(rig, form(*SECOND), "small", headers=[FORM_TYPE])
        assert plain.status == 200


@pytest.mark.parametrize("kind", TYPES)
async def test_form_for_key_with_models_must_have_plain_types(autojump_clock, kind):
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        two(rig)
        headers = [(b"content-type", TYPES[kind])]
        got = await post_with_key(rig, form(*SECOND), "small", headers=headers)
        assert got.status == 400
        assert got.code in ("form_not_plain", "invalid_body")


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data; boundary=xYz",
        b'multipart/form-data; boundary="xYz"',
        b"multipart/form-data;boundary=xYz",
        b"multipart/form-data; boundary=xYz; charset=utf-8",
    ],
)
@pytest.mark.parametrize(
    "body",
    [
        form(*SECOND),
        form(FILE, ('name="model"', b"small"), ("name=stream", b"true")),
        form(("name=model", b"small"), ("name=file; filename=a.wav; filename*=utf-8''a", b"x")),
        form(('name="file"; filename="a.wav"\r\nContent-Type: audio/wav', b"x"), *SECOND),
        form(('name="model"\r\nContent-Type: text/plain; charset=utf-8', b"small"), FILE),
        form(('name="model"\r\nContent-Transfer-Encoding: binary\r\nContent-Length: 5', b"small")),
    ],
    ids=["curl", "reordered", ".NET", "httpx", "Java", "OkHttp"],
)
async def test_form_for_key_with_models_accepts_common_clients(autojump_clock, body, content_type):
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        two(rig)
        headers = [(b"content-type", content_type)]
        assert (await post_with_key(rig, body, "small", headers=headers)).status == 200
        got = await post_with_key(rig, body, "big", headers=headers)
        assert (got.status, got.code) == (403, "model_not_allowed")
        assert rig.requests() == {"a": 0, "b": 1}


# Starlette does not close the file of an unfinished part.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_form_for_key_with_models_cannot_smuggle_a_model(autojump_clock):
    """FastAPI reads the key's model in every form that reaches a server."""
    rng = Random(4)
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        come_up(rig.server("a"), trio.current_time(), "whisper")
        come_up(rig.server("b"), trio.current_time(), "a")
        for _ in range(400):
            content_type, body = form_oracle.make_form(rng)
            headers = [(b"content-type", content_type)]
            await post_with_key(rig, body, "whisper", headers=headers)
        passed = rig.scripted["a"].requests
        assert len(passed) > 10
        assert rig.requests()["b"] == 0
        for request in passed:
            assert form_oracle.model_seen_by_starlette(
                request[b"content-type"], [request.body]
            ) == ("whisper",)
            seen = form_oracle.seen_by_fastapi(request[b"content-type"], [request.body])
            assert seen is None or seen[0] == "whisper"


@pytest.mark.parametrize(
    "types",
    [
        (b"multipart/form-data; boundary=a", b"multipart/form-data; boundary=xYz"),
        (b"application/json", b"multipart/form-data; boundary=xYz"),
        (b"multipart/form-data; boundary=xYz", b"application/json"),
    ],
)
async def test_form_with_two_content_types_is_refused(autojump_clock, types):
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        two(rig)
        headers = tuple((b"content-type", kind) for kind in types)
        got = await rig.post(form(*SECOND), path=AUDIO, headers=headers)
        assert (got.status, got.code) == (400, "invalid_body")
        assert "more than one Content-Type" in got.json["error"]["message"]


@pytest.mark.parametrize("key", [None, KeyConfig(name="k", digest=digest_of("k"))])
async def test_form_that_is_not_plain_is_routed_without_key_models(autojump_clock, key):
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        two(rig)
        for _ in range(4):
            client = rig.client(NOT_PLAIN["another case"], path=AUDIO, headers=(FORM_TYPE,))
            client._scope[IDENTITY] = Identity(key, given=key is not None)
            assert (await client.run()).status == 200
        assert rig.requests() == {"a": 0, "b": 4}


@pytest.mark.parametrize("size", [10, 3 * MB])
async def test_form_gets_alias_applied(autojump_clock, size):
    file = ('name="file"; filename="model"', b"\r\nmodel" * (size // 7))
    body = form(('name="model"', b"public"), file)
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        two(rig)
        assert (await rig.post(body, path=AUDIO, headers=(FORM_TYPE,))).status == 200
        (seen,) = rig.scripted["a"].requests
        assert seen.body == form(('name="model"', b"big"), file)


async def test_form_without_file_is_read(autojump_clock):
    """vLLM refuses them for the missing file: the right server reports the error."""
    kind = (b"content-type", b"application/x-www-form-urlencoded; charset=utf-8")
    async with lab(answering(GOOD), answering(GOOD), **options()) as rig:
        two(rig)
        await rig.post(b"a=b&&mod%65l=public&model=sm%61ll&", path=AUDIO, headers=(kind,))
        assert rig.requests() == {"a": 0, "b": 1}
        await rig.post(b"model=public&stream=on", path=AUDIO, headers=(kind,))
        assert rig.scripted["a"].requests[-1].body == b"model=big&stream=on"


# -- slices --------------------------------------------------------------------------------------


def _counting(log: list[str], name: str, slices: int) -> Steps[str]:
    try:
        for _ in range(slices):
            log.append(name)
            yield
        return name
    finally:
        log.append(f"{name} closed")


async def test_work_queue_alternates_slices_of_works():
    log: list[str] = []
    turns = trio.Lock()

    async def work(name: str) -> None:
        assert await in_slices(_counting(log, name, 3), turns) == name

    async def other() -> None:
        for _ in range(4):
            log.append("other")
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for name in ("a", "b"):
            nursery.start_soon(work, name)
        nursery.start_soon(other)
    slices = [name for name in log if name in ("a", "b")]
    assert slices in (["a", "b"] * 3, ["b", "a"] * 3)
    at = [place for place, name in enumerate(log) if name == "other"]
    assert all(later - earlier <= 3 for earlier, later in pairwise(at))


async def test_work_queue_cancelled_work_is_closed_and_others_go_on():
    log: list[str] = []
    turns = trio.Lock()
    with trio.CancelScope() as scope:
        scope.cancel()
        await in_slices(_counting(log, "a", 3), turns)
    assert "a" not in log
    assert await in_slices(_counting(log, "b", 1), turns) == "b"
    assert log == ["b", "b closed"]


@pytest.mark.parametrize(("policy", "needed"), [("least_load", False), ("session", True)])
@pytest.mark.parametrize("form", [False, True])
async def test_exchange_session_is_read_if_the_policy_needs_it(
    autojump_clock, policy, needed, form
):
    kind, path, body = JSON_TYPE, "/v1/chat/completions", b'{"model": "m"}'
    if form:
        kind, path = (b"content-type", b"multipart/form-data; boundary=x"), AUDIO
        body = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--x--\r\n'
    async with lab(silent, policy=policy) as rig:
        client = rig.start(body, path=path, headers=(kind, (b"x-session-id", b"talk-1")))
        await trio.sleep(1)
        (exchange,) = rig.context.exchanges
        assert exchange.request.info.model == "m"
        assert (exchange.request.info.session is not None) == needed
        client.leave()
