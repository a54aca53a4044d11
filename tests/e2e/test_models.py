"""Aliases, fallbacks and policies by request, through real ports on both fronts."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.cli_process import call
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until

CHAT = "/v1/chat/completions"

TABLES = """
[models]
chat = "m"
secret = { serves = "m", hidden = true }
safe = { serves = "m", fallback = "small" }
small = { policy = "round_robin" }
[auth]
[[auth.keys]]
name = "all"
key = "sk-all"
[[auth.keys]]
name = "some"
key = "sk-some"
models = ["chat", "safe"]
"""


def ask(router: RouterProcess, body: Any, key: str = "sk-all", **headers: str) -> httpx.Response:
    fields = {"authorization": f"Bearer {key}", "content-type": "application/json", **headers}
    with router.client() as client:
        return client.post(CHAT, content=body, headers=fields)


def listed(router: RouterProcess, key: str) -> list[str]:
    answer = router.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    return sorted(card["id"] for card in answer.json()["data"])


def body_at(mock: MockProcess) -> str:
    body = mock.last()["body"]
    assert isinstance(body, str)
    return body


class Rig:
    """One server has `m`, the other `small`."""

    def __init__(self, router: RouterProcess, big: MockProcess, small: MockProcess) -> None:
        self.router, self.big, self.small = router, big, small


@pytest.fixture(scope="module", params=["lane", "hypercorn"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Rig]:
    directory: Path = tmp_path_factory.mktemp("models")
    with (
        mock_processes(1, "--model", "m") as (big,),
        mock_processes(1, "--model", "small") as (small,),
    ):
        config = servers_toml([big.url, small.url], policy_header=True) + TABLES
        with router_process(
            config, directory, "--front", request.param, "--log-format", "json"
        ) as router:
            yield Rig(router, big, small)


def test_models_alias_replaces_one_string_and_nothing_in_response(rig: Rig):
    body = json.dumps(chat(model="chat", text='é "model": "chat"'), indent=2)
    answer = ask(rig.router, body)
    assert answer.status_code == 200
    assert answer.json()["model"] == "m"
    assert body_at(rig.big) == body.replace('"model": "chat",\n', '"model": "m",\n', 1)
    plain = json.dumps(chat(), indent=3)
    assert ask(rig.router, plain).status_code == 200
    assert body_at(rig.big) == plain


def test_models_alias_applies_to_chunked_request(rig: Rig):
    body = json.dumps(chat(model="chat", stream=True)).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:9], body[9:], b""))
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-all\r\n"
        "content-type: application/json\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", rig.router.port), timeout=60) as sock:
        sock.sendall(head.encode() + chunks)
        received = b""
        while piece := sock.recv(65536):
            received += piece
    assert received.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" in received
    assert body_at(rig.big).encode() == body.replace(b'"chat"', b'"m"')


def test_models_list_has_public_names_allowed_for_key(rig: Rig):
    assert listed(rig.router, "sk-all") == ["chat", "safe", "small"]
    assert listed(rig.router, "sk-some") == ["chat", "safe"]
    answer = rig.router.get("/v1/models/chat", headers={"authorization": "Bearer sk-all"})
    assert (answer.json()["id"], answer.json()["root"]) == ("chat", "m")


@pytest.mark.parametrize(
    ("key", "model", "status"),
    [
        ("sk-all", "secret", 200),
        ("sk-all", "m", 200),
        ("sk-all", "missing", 404),
        ("sk-some", "chat", 200),
        ("sk-some", "m", 403),
        ("sk-some", "secret", 403),
        ("sk-some", "small", 403),
    ],
)
def test_models_of_keys_are_public_names(rig: Rig, key: str, model: str, status: int):
    answer = ask(rig.router, json.dumps(chat(model=model)), key)
    assert answer.status_code == status
    if status == 404:
        assert answer.json()["error"]["message"].endswith("models: chat, safe, small.")


def test_models_policy_header_is_applied_and_logged(rig: Rig):
    for name, used in (("prefix", "prefix"), (None, "round_robin")):
        fields = {"x-router-policy": name} if name is not None else {}
        answer = ask(rig.router, json.dumps(chat(model="small")), **fields)
        assert answer.status_code == 200
        assert "x-router-policy" not in dict(rig.small.last()["headers"])
        identifier = answer.headers["x-request-id"]
        until(lambda ours=identifier: any(ours in line for line in rig.router.log), "the line")
        (line,) = [json.loads(line) for line in rig.router.log if identifier in line]
        assert (line["model"], line["policy"]) == ("small", used)
    refused = ask(rig.router, json.dumps(chat()), **{"x-router-policy": "best"})
    assert refused.status_code == 400
    assert refused.headers["x-vllm-router-error"] == "unknown_policy"
    assert "round_robin" in refused.json()["error"]["message"]


def test_models_explain_follows_names_and_policies(rig: Rig):
    found = rig.router.post("/explain", chat(model="chat")).json()
    assert (found["model"], found["served_model"], found["policy"]) == ("chat", "m", "adaptive")
    assert [row["server"] for row in found["candidates"]] == [rig.big.url.removeprefix("http://")]
    found = rig.router.get("/explain?model=small").json()
    assert found["policy"] == "round_robin"
    found = rig.router.get("/explain?model=small", headers={"x-router-policy": "adaptive"}).json()
    assert found["policy"] == "adaptive"
    refused = rig.router.get("/explain", headers={"x-router-policy": "best"})
    assert refused.status_code == 400


def test_models_metrics_have_public_names(rig: Rig):
    before = rig.router.metric("vllm_router_requests_total", model="chat", status="200")
    ask(rig.router, json.dumps(chat(model="chat")))
    after = rig.router.metric("vllm_router_requests_total", model="chat", status="200")
    assert after == before + 1


@pytest.mark.parametrize("front", ["lane", "hypercorn"])
def test_models_fallback_answers_when_last_server_dies(front: str, tmp_path: Path):
    with (
        mock_processes(1, "--model", "m") as (big,),
        mock_processes(1, "--model", "small") as (small,),
    ):
        config = servers_toml([big.url, small.url])
        with router_process(config, tmp_path, "--front", front) as router:
            assert router.post(CHAT, chat(model="safe")).status_code == 404
            router.config.write_text(config + TABLES.partition("[auth]")[0])
            until(lambda: "safe" in listed(router, "x"), "the reload")
            router.wait_for_text("model +chat, model +secret")
            assert router.post(CHAT, chat(model="safe")).json()["model"] == "m"
            big.kill()
            # At once, while the router still believes the server up, and after it has found out.
            assert router.post(CHAT, chat(model="safe")).json()["model"] == "small"
            until(lambda: router.state(big.url) == "down", "the probe")
            assert router.post(CHAT, chat(model="safe")).json()["model"] == "small"
            assert json.loads(body_at(small))["model"] == "small"
            assert listed(router, "x") == ["safe", "small"]
            explained = router.get("/explain?model=safe").json()
            assert (explained["served_model"], explained["policy"]) == ("small", "round_robin")


def test_models_probe_reports_names_without_server(tmp_path: Path):
    table = '[models]\nchat = "m"\nwrong = "n"\nsafe = { serves = "m", fallback = "missing" }\n'
    with mock_processes(1, "--model", "m") as (mock,):
        file = tmp_path / "servers.toml"
        file.write_text(servers_toml([mock.url]) + table)
        done = call("check-config", "--probe", "--config", str(file))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "models.wrong: no server has 'n'",
        "models.safe.fallback: no server has 'missing'",
    ]
