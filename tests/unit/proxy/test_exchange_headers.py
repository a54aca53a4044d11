"""Headers of requests and responses through the whole proxy, in memory."""

from __future__ import annotations

import json

import pytest

from support.proxy_harness import CHAT, lab
from support.scripted_server import GOOD, Talk, answering
from vllm_router.proxy.headers import RequestHeads

JSON = (b"content-type", b"application/json")


async def trailing(talk: Talk) -> None:
    """A response whose trailers claim to be the router's."""
    while True:
        await talk.request()
        await talk.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntrailer: x-vllm-router-error\r\n"
            b"x-vllm-router-error: fake\r\nX-VLLM-Router-New: fake\r\ntransfer-encoding: chunked"
            b'\r\n\r\nc\r\n{"answer":1}\r\n0\r\nx-vllm-router-error: fake\r\n'
            b"x-vllm-router-server: fake\r\n\r\n"
        )


@pytest.mark.parametrize("watched", [False, True])
async def test_headers_of_router_in_server_response_are_dropped(watched, autojump_clock):
    async with lab(trailing, watched=watched) as rig:
        for _ in range(2):  # the second head is a known one
            got = await rig.post()
            assert (got.status, got.body) == (200, b'{"answer":1}')
            ours = [(name, value) for name, value in got.headers if b"x-vllm-router" in name]
            assert ours == [(b"x-vllm-router-server", b"a"), (b"x-vllm-router-attempts", b"1")]


SECRETS = (
    (b"x-api-key", b"client-secret"),
    (b"api-key", b"client-secret"),
    (b"authorization", b"Bearer client-secret"),
    (b"cookie", b"session=client-secret"),
)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_headers_with_client_key_reach_only_keyless_servers(path, autojump_clock):
    async with lab(answering(GOOD), answering(GOOD)) as rig:
        rig.context.upstreams[rig.server("a")].heads = RequestHeads("a.test:1", "", "server-key")
        for name in "ab":
            rig.prefer(name)
            query = b"key=client-secret&a=1"
            got = await rig.post(path=path, query=query, headers=(JSON, *SECRETS))
            assert got.status == 200
        keyed, open_ = rig.scripted["a"].requests[0], rig.scripted["b"].requests[0]
        assert b"client-secret" not in keyed.head
        assert keyed[b"authorization"] == b"Bearer server-key"
        assert keyed.line == b"POST %b?a=1 HTTP/1.1" % path.encode()
        assert set(SECRETS) <= set(open_.fields)
        assert open_.line == b"POST %b?%b HTTP/1.1" % (path.encode(), query)


@pytest.mark.parametrize("body", [{"model": "m"}, {"model": "none"}])
async def test_headers_of_anthropic_responses_have_request_id(body, autojump_clock):
    async with lab(answering(GOOD, GOOD)) as rig:
        headers = (JSON, (b"x-request-id", b"mine-1"))
        got = await rig.post(body, path="/v1/messages", headers=headers)
        assert got[b"request-id"] == got[b"x-request-id"] == b"mine-1"
        plain = await rig.post(body, headers=headers)
        assert plain[b"request-id"] is None
        assert json.loads(plain.body)
