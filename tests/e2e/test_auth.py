"""Keys, listeners and origins at real ports: access rights and leaks (B4, B6, B7)."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from trio_websocket import open_websocket_url

from support.cli_process import call
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until
from vllm_router.config.source import ConfigSource
from vllm_router.runtime.serve import LocalMonitorAccess, ServeOptions, serve

ADMIN, STATUS, ALICE, BOB = "sk-ADMIN-1", "sk-STATUS-2", "sk-ALICE-3", "sk-BOB-4"
SECRETS = (ADMIN, STATUS, ALICE, BOB, "sk-SERVER-5")

AUTH = f"""
[auth]
admin_key = "{ADMIN}"
status_key = "{STATUS}"
protect_status = true
[[auth.keys]]
name = "alice"
key = "{ALICE}"
[[auth.keys]]
name = "bob"
key = "{BOB}"
models = ["other"]
"""

UPGRADE = {
    "connection": "upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
}
INFERENCE = ("/v1/chat/completions", "/v1/embeddings", "/tokenize", "/v1/anything")
READING = ("/metrics", "/load-stats", "/server-models", "/explain", "/decisions", "/version")
ADMINISTRATION = ("/admin/servers",)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class Locked:
    """A router with keys in front of one server with a key of its own."""

    def __init__(self, router: RouterProcess, mock: MockProcess) -> None:
        self.router, self.mock = router, mock

    def ask(self, method: str, path: str, key: str | None = None, **more: Any) -> httpx.Response:
        headers = {**(bearer(key) if key else {}), **more.pop("headers", {})}
        with self.router.client() as client:
            return client.request(method, path, headers=headers, **more)

    def chat(self, key: str | None, **more: Any) -> httpx.Response:
        return self.ask("POST", "/v1/chat/completions", key, json=chat(**more))


@pytest.fixture(scope="module", params=["lane", "hypercorn"])
def locked(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Locked]:
    with mock_processes(1, "--model", "m", "--api-key", "sk-SERVER-5") as (mock,):
        config = servers_toml([mock.url]) + AUTH
        config = config.replace("max_concurrent", 'api_key = "sk-SERVER-5", max_concurrent')
        with router_process(
            config, tmp_path_factory.mktemp("locked"), "--front", request.param
        ) as router:
            yield Locked(router, mock)


# -- keys ---------------------------------------------------------------------------------


WRONG = {
    "none": {},
    "empty": {"authorization": "Bearer"},
    "wrong": bearer("sk-unknown"),
    "beginning": bearer(ALICE[:-1]),
    "longer": bearer(ALICE + "x"),
    "long": bearer("x" * 30_000),
    "without scheme": {"authorization": ALICE},
    "basic": {"authorization": "Basic " + base64.b64encode(f":{ALICE}".encode()).decode()},
    "cookie": {"cookie": f"key={ALICE}"},
    "admin's": bearer(ADMIN),
    "reader's": bearer(STATUS),
}


@pytest.mark.parametrize("kind", WRONG)
def test_auth_inference_needs_client_key(locked: Locked, kind: str):
    locked.mock.reset()
    for path in INFERENCE:
        answer = locked.ask("POST", path, headers=WRONG[kind], json=chat())
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["x-vllm-router-error"] in ("missing_api_key", "invalid_api_key")
    assert [entry for entry in locked.mock.log() if entry["path"] in INFERENCE] == []


def test_auth_key_in_query_is_ignored(locked: Locked):
    answer = locked.ask("POST", f"/v1/chat/completions?key={ALICE}", json=chat())
    assert answer.status_code == 401


def test_auth_refused_request_is_answered_before_its_body(locked: Locked):
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: r\r\nContent-Length: 50000000\r\n"
        b"Expect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", locked.router.port), timeout=60) as sock:
        sock.sendall(head)
        received = b""
        while b"\r\n\r\n" not in received:
            received += (more := sock.recv(65536))
            assert more
        assert received.startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_auth_client_key_admits_and_is_not_forwarded(locked: Locked, header: str):
    value = f"Bearer {ALICE}" if header == "authorization" else ALICE
    answer = locked.ask("POST", "/v1/chat/completions", headers={header: value}, json=chat())
    assert answer.status_code == 200
    seen = dict(locked.mock.last()["headers"])
    assert seen["authorization"] == "Bearer sk-SERVER-5"
    assert "x-api-key" not in seen
    assert ALICE not in json.dumps(locked.mock.last())


def test_auth_key_with_models_sees_no_others(locked: Locked):
    assert locked.ask("GET", "/v1/models").status_code == 401
    for key, models in ((ALICE, ["m"]), (BOB, []), (ADMIN, ["m"]), (STATUS, ["m"])):
        cards = locked.ask("GET", "/v1/models", key).json()["data"]
        assert [card["id"] for card in cards] == models
    assert locked.ask("GET", "/v1/models/m", ALICE).status_code == 200
    hidden = locked.ask("GET", "/v1/models/m", BOB)
    assert hidden.status_code == 404
    assert hidden.json()["error"]["message"].endswith("Available models: .")


@pytest.mark.parametrize(
    "body",
    [
        chat(),
        {"messages": []},
        {"model": ["m"], "messages": []},
        b'{"model": "other", "model": "m", "messages": []}',
        b"not json",
        json.dumps(chat()).encode("utf-16"),
    ],
    ids=["another", "none", "a list", "twice", "no JSON", "UTF-16"],
)
def test_auth_key_with_models_gets_no_other_model(locked: Locked, body: Any):
    locked.mock.reset()
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = locked.ask("POST", "/v1/chat/completions", BOB, **sent)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "model_not_allowed"
    assert not locked.mock.log("/v1/chat/completions")


def test_auth_unknown_model_error_names_allowed_models_only(locked: Locked):
    answer = locked.chat(BOB, model="other")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].endswith("Available models: .")


@pytest.mark.parametrize("path", READING)
def test_auth_status_pages_need_status_or_admin_key(locked: Locked, path: str):
    for key in (None, ALICE, "sk-unknown"):
        assert locked.ask("GET", path, key).status_code == 401
    for key in (STATUS, ADMIN):
        assert locked.ask("GET", path, key).status_code == 200


@pytest.mark.parametrize("path", ["/%6detrics", "/metrics/", "/./metrics", "/nothing"])
def test_auth_path_spellings_do_not_bypass_keys(locked: Locked, path: str):
    assert locked.ask("GET", path).status_code == 401


@pytest.mark.parametrize(
    "path", ["/admin/servers", "/%61dmin/servers", "/admin/reload", "/admin/servers/x/drain"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_auth_admin_needs_key_even_from_loopback(locked: Locked, method: str, path: str):
    for key in (None, ALICE, STATUS, ADMIN[:-1]):
        answer = locked.ask(method, path, key)
        assert answer.status_code in (401, 405), (key, answer.text)
        assert locked.mock.name not in answer.text


def test_auth_admin_key_works_through_proxy(locked: Locked):
    name = locked.ask("GET", "/admin/servers", ADMIN).json()["servers"][0]["name"]
    for action in ("drain", "undrain"):
        answer = locked.ask(
            "POST", f"/admin/servers/{name}/{action}", ADMIN, headers={"x-forwarded-for": "8.8.8.8"}
        )
        assert answer.status_code == 200
    assert locked.ask("POST", "/admin/reload", ADMIN).status_code == 200


def test_auth_liveness_is_open_and_reveals_nothing_else(locked: Locked):
    for path in ("/livez", "/ping", "/readyz", "/health", "/"):
        answer = locked.ask("GET", path)
        assert answer.status_code == 200
        for word in (locked.mock.url, "127.0.0.1", "version", "0.1.0"):
            assert word not in answer.text, path
    assert locked.ask("GET", "/health", STATUS).json()["servers"]
    page = locked.ask("GET", "/", headers={"accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")
    assert locked.mock.url not in page.text


async def test_auth_feed_accepts_key_in_header_or_subprotocol(locked: Locked):
    url = locked.router.url.replace("http", "ws") + "/ws/load"

    def token(key: str) -> str:
        return "vllm-router.key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")

    refused = [
        {},
        bearer(ALICE),
        {"sec-websocket-protocol": "vllm-router.feed"},
        {"sec-websocket-protocol": f"vllm-router.feed, {token(ALICE)}"},
        {"sec-websocket-protocol": f"vllm-router.feed, vllm-router.key.{STATUS}"},
    ]
    for headers in refused:
        answer = locked.ask("GET", "/ws/load", headers=UPGRADE | headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"
    assert locked.ask("GET", f"/ws/load?key={STATUS}", headers=UPGRADE).status_code == 401
    for key, admin in ((STATUS, False), (ADMIN, True)):
        for options in (
            {"extra_headers": [(b"authorization", b"Bearer " + key.encode())]},
            {"subprotocols": ["vllm-router.feed", token(key)]},
        ):
            async with open_websocket_url(url, **options) as feed:
                hello = json.loads(await feed.get_message())
                assert hello["admin"] is admin
                wanted = "vllm-router.feed" if "subprotocols" in options else None
                assert feed.subprotocol == wanted


def test_auth_no_output_has_a_key_or_an_address(locked: Locked):
    pages = []
    for path in (*INFERENCE, *READING, *ADMINISTRATION, "/ws/load", "/sleep", "/v1/models/x", "/x"):
        for method in ("GET", "POST", "DELETE", "OPTIONS", "BREW"):
            for headers in ({}, bearer("sk-unknown"), bearer(ALICE), bearer(BOB)):
                answer = locked.ask(method, path, headers=headers, content=b'{"model": "x"')
                if answer.status_code >= 400:
                    pages.append(f"{answer.headers}\n{answer.text}")
    locked.mock.set(mode="500")
    try:
        pages += [locked.chat(ALICE).text]
    finally:
        locked.mock.set(mode="ok")
    pages.append(locked.ask("GET", "/metrics", STATUS).text.replace(locked.mock.url, ""))
    pages.append(locked.router.text)
    for page in pages:
        for secret in (*SECRETS, "Traceback", 'File "'):
            assert secret not in page
    for page in pages[:-2]:
        assert locked.mock.url not in page
        assert "vLLM Router/" not in page


def test_auth_requests_are_counted_by_key_name(locked: Locked):
    before = locked.ask("GET", "/metrics", STATUS).text
    assert locked.chat(ALICE).status_code == 200
    after = locked.ask("GET", "/metrics", STATUS).text

    def count(page: str) -> float:
        found = re.search(r'key_requests_total\{key="alice",status="2xx"\} (\S+)', page)
        return float(found[1]) if found else 0.0

    assert count(after) == count(before) + 1
    assert re.search(r'refusals_total\{code="missing_api_key"\} [1-9]', after)


def test_auth_commands_send_their_key(locked: Locked):
    url = locked.router.url
    refused = call("status", url)
    assert refused.returncode == 2
    assert "this router needs a key" in refused.stderr
    assert call("status", url, "--key", STATUS).returncode == 0
    name = locked.ask("GET", "/admin/servers", ADMIN).json()["servers"][0]["name"]
    os.environ["VLLM_ROUTER_KEY"] = ADMIN
    try:
        assert call("drain", name, "--url", url).returncode == 0
        assert call("undrain", name, "--url", url).returncode == 0
    finally:
        del os.environ["VLLM_ROUTER_KEY"]


# -- limits of a key --------------------------------------------------------------------------


def test_auth_key_beyond_limits_gets_429_and_others_go_on(tmp_path: Path):
    keys = f"""
[[auth.keys]]
name = "slow"
key = "{BOB}"
requests_per_minute = 2
[[auth.keys]]
name = "free"
key = "{ALICE}"
"""
    with (
        mock_processes(1, "--model", "m") as (mock,),
        router_process(servers_toml([mock.url]) + keys, tmp_path) as router,
    ):
        lab = Locked(router, mock)
        assert [lab.chat(BOB).status_code for _ in range(3)] == [200, 200, 429]
        over = lab.chat(BOB)
        assert over.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(over.headers["retry-after"]) <= 30
        assert lab.chat(ALICE).status_code == 200


# -- reload -----------------------------------------------------------------------------------


def test_auth_keys_added_and_removed_by_reload_apply(tmp_path: Path):
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[keys]]\nname = "a"\nkey = "{ALICE}"\n')
    keys.chmod(0o644)
    with mock_processes(1, "--model", "m") as (mock,):
        config = servers_toml([mock.url]) + f'[auth]\nkeys_file = "keys.toml"\n'  # noqa: F541
        with router_process(config, tmp_path) as router:
            lab = Locked(router, mock)
            router.wait_for_text("keys.toml: holds keys, but other users may read")
            assert (lab.chat(ALICE).status_code, lab.chat(BOB).status_code) == (200, 401)
            keys.write_text(f'[[keys]]\nname = "b"\nkey = "{BOB}"\n')
            until(lambda: lab.chat(BOB).status_code == 200, "the new key")
            assert lab.chat(ALICE).status_code == 401
            router.wait_for_text("key +b, key -a")
            keys.write_text("[[keys]]\nname = 3\n")
            until(lambda: "configuration refused" in router.text, "the refusal")
            assert lab.chat(BOB).status_code == 200
            assert BOB not in router.text


# -- without [auth] ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lane", "hypercorn"])
def open_router(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Locked]:
    with mock_processes(1, "--model", "m") as (mock,):
        config = servers_toml(
            [mock.url],
            cors_origins=["https://good.test"],
            allowed_hosts=["llm.test"],
            max_body_mb=2,
            max_bodies_mb=3,
        )
        with router_process(
            config, tmp_path_factory.mktemp("open"), "--front", request.param
        ) as router:
            yield Locked(router, mock)


def test_auth_without_keys_passes_client_key_on(open_router: Locked):
    assert open_router.chat("sk-of-the-server").status_code == 200
    assert dict(open_router.mock.last()["headers"])["authorization"] == "Bearer sk-of-the-server"


# -- browsers -----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.test", "evil.test:80", "llm.test.evil", "127.0.0.1.evil"])
def test_host_unknown_is_refused(open_router: Locked, host: str):
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/")):
        answer = open_router.ask(method, path, headers={"host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (421, "misdirected_request")


@pytest.mark.parametrize(
    "host", ["llm.test", "LLM.test:8888", "localhost:1", "[::1]:9", "10.0.0.1"]
)
def test_host_known_names_and_addresses_are_served(open_router: Locked, host: str):
    assert open_router.ask("GET", "/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.test", "null", "https://good.test.evil", "http://good.test", "x"]
)
def test_origin_unlisted_is_refused(open_router: Locked, origin: str):
    open_router.mock.reset()
    path = "/v1/chat/completions"
    answer = open_router.ask("POST", path, headers={"origin": origin}, json=chat())
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_origin")
    ask = {"origin": origin, "access-control-request-method": "POST"}
    preflight = open_router.ask("OPTIONS", path, headers=ask)
    assert (preflight.status_code, preflight.json()["error"]["code"]) == (403, "cross_origin")
    models = open_router.ask("GET", "/v1/models", headers={"origin": origin})
    for each in (answer, preflight, models):
        assert not [name for name in each.headers if name.startswith("access-control-")]
    assert not open_router.mock.log(path)


def test_origin_listed_is_served(open_router: Locked):
    path, origin = "/v1/chat/completions", "https://good.test"
    preflight = open_router.ask(
        "OPTIONS",
        path,
        headers={
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type, x-stainless-os",
        },
    )
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == origin
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in preflight.headers
    for method, more in (("POST", {"json": chat()}), ("POST", {"json": chat(model="none")})):
        answer = open_router.ask(method, path, headers={"origin": origin}, **more)
        assert answer.headers.get_list("access-control-allow-origin") == [origin]
        assert "origin" in answer.headers["vary"].lower().split(", ")
    for path in ("/metrics", "/admin/servers", "/load-stats"):
        answer = open_router.ask("GET", path, headers={"origin": origin})
        assert "access-control-allow-origin" not in answer.headers


def test_origin_of_router_is_served(open_router: Locked):
    answer = open_router.ask(
        "POST",
        "/v1/chat/completions",
        headers={"origin": open_router.router.url},
        json=chat(),
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"origin": "https://evil.test"}, 403),
        ({"host": "evil.test"}, 421),
    ],
)
def test_feed_refuses_other_origins(open_router: Locked, headers: dict[str, str], code: int):
    answer = open_router.ask("GET", "/ws/load", headers=UPGRADE | headers)
    assert answer.status_code == code


# -- bodies (L2) ------------------------------------------------------------------------------


def test_bodies_total_size_is_limited(open_router: Locked):
    """Two clients that send slowly hold the memory that a third one would need."""
    port = open_router.router.port
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1500000\r\n\r\n"
    )
    with contextlib.ExitStack() as held:
        for _ in range(2):
            sock = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            sock.sendall(head + b" " * 1_400_000)
        metric = "vllm_router_request_body_bytes_held"
        until(lambda: open_router.router.metric(metric) >= 2_700_000, "the bodies")
        refused = open_router.chat(None, text="x" * 500_000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "bodies_full")
        assert refused.headers["retry-after"] == "1"
        assert open_router.chat(None).status_code == 200
    until(lambda: open_router.router.metric(metric) == 0, "the bodies to go")
    assert open_router.chat(None, text="x" * 100_000).status_code == 200


# -- two tenants --------------------------------------------------------------------------


def test_clients_share_no_headers_or_bodies(open_router: Locked):
    mock, own = open_router.mock, {"alice": ALICE, "bob": BOB}
    mock.reset()
    with (
        httpx.Client(base_url=open_router.router.url, trust_env=False) as one,
        httpx.Client(base_url=open_router.router.url, trust_env=False) as two,
    ):
        for turn in range(100):
            for name, client in (("alice", one), ("bob", two)):
                answer = client.post(
                    "/v1/chat/completions",
                    json=chat(text=f"{name} {turn}", max_tokens=1),
                    headers={
                        **bearer(own[name]),
                        "cookie": f"user={name}",
                        "x-request-id": f"{name}-{turn}",
                        "x-of": name,
                    },
                )
                assert answer.headers["x-request-id"] == f"{name}-{turn}"
    entries = mock.log("/v1/chat/completions")
    assert len(entries) == 200
    for entry in entries:
        seen = dict(entry["headers"])
        name = seen["x-of"]
        assert seen["authorization"] == f"Bearer {own[name]}"
        assert seen["cookie"] == f"user={name}"
        assert seen["x-request-id"].startswith(name)
        known = {"authorization", "cookie", "x-request-id", "x-of", "via", "host", "user-agent"}
        known |= {"accept", "accept-encoding", "content-type", "content-length"}
        assert set(seen) - known == {"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"}


# -- a listener of its own --------------------------------------------------------------------


@pytest.mark.parametrize("front", ["lane", "hypercorn"])
def test_admin_listener_serves_administration_alone(tmp_path: Path, front: str):
    with mock_processes(1, "--model", "m") as (mock,):
        config = servers_toml([mock.url], admin_listen="127.0.0.1:0")
        with router_process(config, tmp_path, "--front", front) as router:
            router.wait_for_text("administration on http://")
            found = re.search(r"administration on (http://\S+)", router.text)
            assert found is not None
            admin = found[1]
            lab = Locked(router, mock)
            for path in ("/metrics", "/load-stats", "/admin/servers", "/", "/static/app.css"):
                assert lab.ask("GET", path).status_code == 404, path
                # Administration needs proof of the user; the listener alone is not enough.
                expected = 403 if path.startswith("/admin/") else 200
                assert httpx.get(admin + path, trust_env=False).status_code == expected, path
            for path in ("/livez", "/readyz", "/v1/models"):
                assert lab.ask("GET", path).status_code == 200
                assert httpx.get(admin + path, trust_env=False).status_code == 200
            assert lab.ask("GET", "/health").json().keys() == {"status", "ready"}
            assert lab.chat(None).status_code == 200
            refused = httpx.post(f"{admin}/v1/chat/completions", json=chat(), trust_env=False)
            assert refused.status_code == 404
            assert call("status", admin).returncode == 0
            text = (tmp_path / "servers.toml").read_text()
            (tmp_path / "servers.toml").write_text(text.replace('"127.0.0.1:0"', '"127.0.0.1:1"'))
            until(
                lambda: "admin_listen has changed in the configuration; restart" in router.text,
                "the warning",
            )


def test_admin_listener_port_in_use_is_one_line(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = tmp_path / "servers.toml"
        port = taken.getsockname()[1]
        config.write_text(servers_toml(["http://a.test"], admin_listen=f"127.0.0.1:{port}"))
        done = call("run", "--console", "--config", str(config), "--port", "0")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(f"admin_listen: 127.0.0.1:{port}: Address already in use")


async def test_monitor_of_run_has_access_under_any_auth(tmp_path: Path):
    file = tmp_path / "servers.toml"
    file.write_text(servers_toml(["http://a.test"], admin_listen="127.0.0.1:0") + AUTH)
    source = ConfigSource(file)
    view = LocalMonitorAccess()
    options = ServeOptions(config=source.load(), source=source, host="127.0.0.1", port=0, view=view)
    up = trio.Event()
    async with trio.open_nursery() as nursery, httpx.AsyncClient(trust_env=False) as client:
        nursery.start_soon(serve, options, lambda url: up.set())
        await up.wait()
        for path in ("/load-stats", "/admin/servers", "/livez"):
            assert (await client.get(view.url + path)).status_code == 404
            for key in (ADMIN, view.key[:-1]):
                answer = await client.get(view.url + path, headers=bearer(key))
                assert answer.status_code == 404
            answer = await client.get(view.url + path, headers=bearer(view.key))
            assert answer.status_code == 200
        headers = [(b"authorization", b"Bearer " + view.key.encode())]
        url = view.url.replace("http", "ws") + "/ws/load"
        async with open_websocket_url(url, extra_headers=headers) as feed:
            assert json.loads(await feed.get_message())["admin"]
        nursery.cancel_scope.cancel()
