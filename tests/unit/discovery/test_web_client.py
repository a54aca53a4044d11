"""The requests of discovery sources."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from vllm_router.config.discovery import HttpSource
from vllm_router.config.tls import File
from vllm_router.config.types import Secret
from vllm_router.discovery.web_client import (
    READ_AT_ONCE,
    USER_AGENT,
    NoAnswer,
    decoded,
    get,
    web_transport,
)

PEM = Path(__file__).parents[2] / "data" / "localhost.pem"


def source(url: str, **more: Any) -> HttpSource:
    return HttpSource(name="s", url=url, **more)


@pytest.mark.parametrize("size", [READ_AT_ONCE, READ_AT_ONCE + 1])
async def test_decoded_long_document_is_read_in_a_thread(size: int):
    def read(data: bytes) -> tuple[int, int]:
        return len(data), threading.get_ident()

    length, thread = await decoded(read, bytes(size))
    assert length == size
    assert (thread == threading.get_ident()) is (size <= READ_AT_ONCE)


@pytest.mark.parametrize("size", [READ_AT_ONCE, READ_AT_ONCE + 1])
async def test_decoded_error_of_the_reader_is_raised(size: int):
    def read(data: bytes) -> None:
        raise NoAnswer("odd")

    with pytest.raises(NoAnswer, match="odd"):
        await decoded(read, bytes(size))


async def test_web_transport_with_missing_authority_names_the_file(tmp_path: Path):
    missing = tmp_path / "missing.pem"
    with pytest.raises(NoAnswer, match=r"missing\.pem"):
        await web_transport(source("https://s.test/", ca=File(str(missing), Secret(""))))


@pytest.mark.parametrize("url", ["http://s.test/", "https://s.test/"])
async def test_web_transport_is_made_for_plain_and_encrypted_urls(url: str):
    transport = await web_transport(source(url, ca=File(str(PEM), Secret(""))))
    await transport.aclose()


async def test_get_sends_agent_and_headers_and_follows_no_redirect():
    seen: list[httpx.Request] = []

    def redirect(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(302, headers={"location": "http://elsewhere.test/"})

    headers = {"authorization": "Bearer k", "user-agent": "mine"}
    response = await get(httpx.MockTransport(redirect), "http://s.test/list", headers)
    assert response.status_code == 302
    assert [str(request.url) for request in seen] == ["http://s.test/list"]
    assert (seen[0].headers["authorization"], seen[0].headers["user-agent"]) == ("Bearer k", "mine")
    await get(httpx.MockTransport(redirect), "http://s.test/list", {})
    assert seen[1].headers["user-agent"] == USER_AGENT
