"""The client of the commands: its requests, and errors in words for the user."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import trio

from vllm_router.cli import router_client
from vllm_router.cli.common import KEY_ADVICE
from vllm_router.cli.router_client import ErrorResponse, NoRouter, RouterClient

URL = "http://192.0.2.1:8888"

Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Method, target and body of each request; none of them leaves the process."""
    monkeypatch.setattr(router_client, "find_socket", lambda url: None)
    return []


def client(asked: list[str], answer: Answer, key: str | None = None) -> RouterClient:
    made = RouterClient("192.0.2.1:8888/", key)

    def handle(request: httpx.Request) -> httpx.Response:
        target = request.url.raw_path.decode()
        asked.append(" ".join([request.method, target, *request.content.decode().split()]))
        return answer(request)

    headers = made._client.headers
    made._client = httpx.AsyncClient(transport=httpx.MockTransport(handle), headers=headers)
    return made


def says(body: Any, status: int = 200, **headers: str) -> Answer:
    return lambda request: httpx.Response(
        status, content=json.dumps(body).encode(), headers=headers
    )


async def test_router_client_asks_for_status_in_two_requests(asked: list[str]):
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer k"
        page = {"servers": []} if "load" in request.url.path else {"status": "healthy"}
        return says(page)(request)

    async with client(asked, answer, "k") as router:
        status = await router.status()
    assert (status.health, status.servers) == ({"status": "healthy"}, [])
    assert asked == ["GET /load-stats", "GET /health"]


async def test_router_client_addresses_servers_and_models_with_any_name(asked: list[str]):
    async with client(asked, says({"result": "applied", "code": "c"})) as router:
        await router.drain("gpu 1:80/a", on=True)
        await router.drain("b", on=False)
        await router.explain("org/model?", None)
        await router.explain(None, b"{}")
        assert (await router.reload(), await router.sign_in()) == ("applied", "c")
    assert asked == [
        "POST /admin/servers/gpu%201%3A80%2Fa/drain",
        "POST /admin/servers/b/undrain",
        "GET /explain?model=org%2Fmodel%3F",
        "POST /explain {}",
        "POST /admin/reload",
        "POST /admin/sign-in",
    ]


async def test_router_client_skips_decisions_that_are_no_rows(asked: list[str]):
    async with client(asked, says({"decisions": [{"server": "a"}, 3, None]})) as router:
        assert await router.decisions(7) == [{"server": "a"}]
    assert asked == ["GET /decisions?limit=7"]
    async with client(asked, says({"more": 1})) as router:
        assert await router.decisions(7) == []


async def test_router_client_follows_a_drain_to_its_end(asked: list[str], autojump_clock):
    numbers = [(2, 1), (2, 1), (1, 0), (0, 0)]

    def answer(request: httpx.Request) -> httpx.Response:
        own, elsewhere = numbers[len(asked) - 1]
        return says({"in_flight": own, "in_flight_elsewhere": elsewhere})(request)

    async with client(asked, answer) as router:
        began = trio.current_time()
        assert [number async for number in router.watch_drain("a")] == [3, 1, 0]
        assert trio.current_time() - began == pytest.approx(3 * router_client.POLL_INTERVAL)


async def test_router_client_drain_of_removed_server_is_over(asked: list[str]):
    gone = says({"error": {"message": "none"}}, 404, **{"x-vllm-router-error": "server_not_found"})
    async with client(asked, gone) as router:
        assert [number async for number in router.watch_drain("a")] == [0]
    refused = says({}, 401, **{"x-vllm-router-error": "missing_api_key"})
    async with client(asked, refused) as router:
        with pytest.raises(ErrorResponse):
            await anext(router.watch_drain("a"))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (says({}, 200), f"{URL} is not a vLLM Router: /health answered 200"),
        (says([1], 200), f"{URL} is not a vLLM Router: /health answered 200"),
        (says({"a": 1}, 404), f"{URL} is not a vLLM Router: /health answered 404"),
        (lambda _: httpx.Response(200, content=b"<html>"), f"{URL} is not a vLLM Router"),
    ],
)
async def test_router_client_other_program_is_no_router(
    asked: list[str], answer: Answer, text: str
):
    async with client(asked, answer) as router:
        with pytest.raises(NoRouter) as caught:
            await router._ask("GET", "/health")
    assert str(caught.value).startswith(text)


async def test_router_client_page_without_servers_is_of_no_router(asked: list[str]):
    async with client(asked, says({"servers": "many"})) as router:
        with pytest.raises(NoRouter, match="answers, but is not a vLLM Router"):
            await router.status()


async def test_router_client_without_answer_names_the_router(asked: list[str]):
    def fail(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async with client(asked, fail) as router:
        with pytest.raises(NoRouter, match=f"no router answers at {URL}: refused"):
            await router.status()


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        ("config_refused", {"message": "line 3", "values": {"n": 3}}, "line 3"),
        ("odd", "text", f"{URL} answered odd"),
        ("invalid_api_key", {"message": "no"}, KEY_ADVICE["invalid_api_key"]),
    ],
)
async def test_router_client_error_of_router_has_its_code(
    asked: list[str], code: str, error: Any, text: str
):
    answer = says({"error": error}, 422, **{"x-vllm-router-error": code})
    async with client(asked, answer) as router:
        with pytest.raises(ErrorResponse) as caught:
            await router.reload()
    assert (caught.value.code, str(caught.value)) == (code, text)
    assert caught.value.values == ({"n": "3"} if code == "config_refused" else {})


def test_router_client_unreadable_authorities_are_an_error_in_words(asked: list[str], tmp_path):
    with pytest.raises(NoRouter, match="cannot read the CA file: No such file"):
        RouterClient("https://192.0.2.1", ca=str(tmp_path / "none.pem"))
