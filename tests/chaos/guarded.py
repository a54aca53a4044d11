"""Access rights, and isolation between two clients (B2, B4, B6, B7)."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

from chaos.harness import Card, NotRun, off_loop, scenario
from chaos.rivals import NAMES, rival
from e2e.test_auth import (
    ADMIN,
    ALICE,
    AUTH,
    BOB,
    INFERENCE,
    READING,
    SECRETS,
    STATUS,
    UPGRADE,
    WRONG,
    Locked,
    bearer,
)
from e2e.test_smuggling import (
    BODY,
    GOOD,
    HIDDEN,
    HTTP2_REFUSED,
    NO_JSON,
    REFUSED,
    SERVED,
    Lab,
    answers,
    http2,
    length,
    post,
)
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml

PATH = "/v1/chat/completions"
FRONTS = ("lane", "hypercorn")


# -- B2 ---------------------------------------------------------------------------------------


def _smuggle(port: int, mock: MockProcess) -> Counter[str]:
    """Every probe on its own connection, between honest requests."""
    lab = Lab(SimpleNamespace(port=port), mock, "")  # type: ignore[arg-type]  # its port is all
    counts: Counter[str] = Counter()
    for data in REFUSED.values():
        mock.reset()
        received, closed = lab.send(GOOD + data + GOOD)
        codes = answers(received)
        paths = [entry["path"] for entry in lab.seen()]
        counts["served"] += any(code < 400 for code in codes[1:])
        counts["left open"] += not closed and not data.startswith(b"PRI")
        counts["smuggled"] += "/v1/completions" in paths
        counts["engine saw other requests than were answered"] += len(paths) != codes.count(200)
    for name, (data, count) in SERVED.items():
        mock.reset()
        received, _ = lab.send(data + post(length(), b"Connection: close"))
        codes = answers(received)
        refused = name in NO_JSON and codes[:1] == [400]
        wrong = len(codes) != count + 1 or len(lab.seen()) != count + 1 - refused
        counts["honest ones miscounted"] += wrong
    return counts


@scenario("B2", "smuggling through to a recording engine, beside others", p0=True)
async def smuggling(card: Card) -> None:
    quick = ("--model", "m", "--token-delay", "0", "--ttft", "0")
    for front in FRONTS:
        with mock_processes(1, *quick) as (mock,):
            config = servers_toml([mock.url], health_check_interval=3600, failure_threshold=1000)
            with router_process(config, card.directory, "--front", front) as router:
                counts = _smuggle(router.port, mock)
                for what, number in counts.items():
                    card.equal(f"{front}: {what}, of {len(REFUSED) + len(SERVED)}", number, 0)
                mock.reset()
                leaked = [
                    http2(router.port, fields, BODY + HIDDEN) for fields in HTTP2_REFUSED.values()
                ]
                what = f"{front}, HTTP/2: answered or seen by the engine, of {len(leaked)}"
                seen = [entry["path"] for entry in mock.log() if entry["method"] == "POST"]
                card.equal(what, leaked.count("200") + len(seen), 0)
    for name in NAMES:
        with (
            mock_processes(1, *quick) as (mock,),
            rival(name, [mock.url], card.directory) as url,
        ):
            if url is None:
                card.note(name, "not installed")
                continue
            counts = _smuggle(int(url.rsplit(":", 1)[1]), mock)
            card.note(name, ", ".join(f"{what} {number}" for what, number in counts.items()))


# -- B4 ---------------------------------------------------------------------------------------


class Engine(ThreadingHTTPServer):
    """A server whose responses try to leave state behind; it records each request.

    While `reads` is not set it reads no bodies.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[dict[str, str]] = []
        self.reads = threading.Event()
        self.reads.set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """Disconnects in mid-response are part of the scenario."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Engine

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": "m", "object": "model"}]})

    def do_POST(self) -> None:
        self.server.reads.wait()
        self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append({k.lower(): v for k, v in self.headers.items()})
        self._answer({"tenant": self.headers["x-tenant"]})

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        for name, text in {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "set-cookie": f"session={len(self.server.seen)}; Path=/",
            "authorization": "Bearer engine",
            "x-request-id": "the-engines-own",
            "x-tenant": "unknown",
        }.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


OURS = {"host", "content-length", "via", "x-request-id"}
OURS |= {"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"}
TENANTS = {
    "a": {"authorization": "Bearer a", "cookie": "session=a", "x-only-a": "1"},
    "b": {"authorization": "Bearer b"},
}


@scenario("B4", "two tenants alternate, and the engine leaves things behind", p0=True)
async def isolation(card: Card) -> None:
    count = card.size(100, 500, 1000)
    for front in FRONTS:
        engine = Engine()
        with router_process(servers_toml([engine.url]), card.directory, "--front", front) as router:
            clients = {name: router.client() for name in TENANTS}
            mixed = 0
            sent: dict[str, set[str]] = {}
            for number in range(2 * count):
                name = "ab"[number % 2]
                fields = TENANTS[name] | {"x-tenant": name}
                request = clients[name].build_request("POST", PATH, json=chat(), headers=fields)
                if name == "b":
                    request.headers.pop("cookie", None)  # a cookie that httpx has kept
                sent[name] = set(request.headers)
                mixed += clients[name].send(request).json() != {"tenant": name}
            for client in clients.values():
                client.close()
        engine.shutdown()
        foreign: Counter[str] = Counter()
        for entry in engine.seen:
            name = entry["x-tenant"]
            mine = TENANTS[name]
            foreign["authorization"] += entry["authorization"] != mine["authorization"]
            foreign["cookie"] += name == "b" and "cookie" in entry
            foreign.update(entry.keys() - OURS - sent[name])
        card.equal(f"{front}: answers to the other one", mixed, 0)
        card.equal(f"{front}: requests that the engine saw", len(engine.seen), 2 * count)
        card.equal(f"{front}: foreign fields", dict(+foreign), {})


# -- B6 ---------------------------------------------------------------------------------------


def _pages(locked: Locked) -> list[str]:
    """Every kind of error response: head and body."""
    paths = (*INFERENCE, *READING, "/admin/servers", "/admin/reload", "/ws/load", "/sleep")
    pages = []
    for path in (*paths, "/v1/models/x", "/static/x", "/nothing", "/%00", "/v1/%2e%2e/sleep"):
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "BREW"):
            for headers in ({}, bearer("sk-unknown"), bearer(ALICE), bearer(BOB)):
                answer = locked.ask(method, path, headers=headers, content=b'{"model": "x"')
                if answer.status_code >= 400:
                    pages.append(f"{answer.headers}\n{answer.text}")
    for mode in ("500", "reset", "close"):
        locked.mock.set(mode=mode)
        answer = locked.chat(ALICE)
        pages.append(f"{answer.headers}\n{answer.text}")
        locked.mock.set(mode="ok")
    return pages


@scenario("B6", "wrong keys, and what errors give away", p0=True)
async def keys(card: Card) -> None:
    for front in FRONTS:
        with mock_processes(1, "--model", "m", "--api-key", "sk-SERVER-5") as (mock,):
            config = servers_toml([mock.url], failure_threshold=1000) + AUTH
            config = config.replace("max_concurrent", 'api_key = "sk-SERVER-5", max_concurrent')
            with router_process(config, card.directory, "--front", front) as router:
                locked = Locked(router, mock)
                mock.reset()
                codes = {
                    locked.ask("POST", path, headers=headers, json=chat()).status_code
                    for path in INFERENCE
                    for headers in WRONG.values()
                }
                card.equal(f"{front}: {len(WRONG)} wrong keys", codes, {401})
                reached = [entry for entry in mock.log() if entry["method"] == "POST"]
                card.equal(f"{front}: requests that reached the engine", len(reached), 0)
                codes = {
                    locked.ask(method, path, key).status_code
                    for key in (ALICE, BOB, STATUS, ADMIN[:-1], None)
                    for method, path in (
                        ("GET", "/admin/servers"),
                        ("POST", "/admin/reload"),
                        ("POST", f"/admin/servers/{mock.name}/drain"),
                    )
                }
                card.equal(f"{front}: administration without its key", codes, {401})
                pages = _pages(locked)
                metrics = locked.ask("GET", "/metrics", STATUS).text
                secret = (*SECRETS, "Traceback", 'File "/')
                leaked = [word for word in secret for page in pages if word in page]
                leaked += [word for word in secret if word in metrics or word in router.text]
                card.equal(
                    f"{front}: secrets on {len(pages)} error pages, metrics, log", leaked, []
                )
                where = [mock.url, "hypercorn", "Quart", "httptools"]
                leaked = [word for word in where for page in pages if word in page]
                card.equal(f"{front}: addresses and versions", leaked, [])


# -- B7 ---------------------------------------------------------------------------------------

TARGETS = (
    "http://169.254.169.254/latest/meta-data/",
    "http://[fe80::1]/",
    "http://0.0.0.0/",
    "file:///etc/passwd",
    "gopher://127.0.0.1/",
)


def _browse(router: RouterProcess, mock: MockProcess) -> tuple[Counter[str], set[int]]:
    counts: Counter[str] = Counter()
    locked = Locked(router, mock)
    evil = {"origin": "https://evil.test"}
    preflight = evil | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    for what, answer, wanted in (
        ("POST as evil.test", locked.ask("POST", PATH, headers={"host": "evil.test"}), {404, 421}),
        ("GET as evil.test", locked.ask("GET", "/metrics", headers={"host": "evil.test"}), {421}),
        ("POST from evil.test", locked.ask("POST", PATH, headers=evil, json=chat()), {403}),
        ("feed from evil.test", locked.ask("GET", "/ws/load", headers=evil | UPGRADE), {403}),
        ("drain from evil.test", locked.ask("POST", "/admin/reload", headers=evil), {403}),
        ("preflight", locked.ask("OPTIONS", PATH, headers=preflight), {403, 404, 405}),
    ):
        counts[f"{what}: {answer.status_code}"] += answer.status_code not in wanted
        counts[f"{what}: allows the origin"] += "access-control-allow-origin" in answer.headers
    mine = {"origin": router.url}
    codes = set()
    with socket.create_server(("127.0.0.1", 0)) as bait:
        bait.setblocking(False)
        here = f"http://127.0.0.1:{bait.getsockname()[1]}/"
        for target in (here, *TARGETS):
            for method in ("POST", "PUT", "PATCH"):
                for path in ("/admin/servers", f"/admin/servers/{target}", "/admin/servers/x"):
                    sent = {"url": target, "servers": [{"url": target}]}
                    codes.add(locked.ask(method, path, headers=mine, json=sent).status_code)
        locked.ask("POST", PATH, headers={"host": here[7:-1]}, json=chat())
        locked.ask("GET", "/metrics", headers={"referer": here, "x-forwarded-host": here})
        try:
            bait.accept()[0].close()
            counts["connects to where a client points"] += 1
        except BlockingIOError:
            pass
    return counts, codes


@scenario("B7", "pages of other origins, other names, requests to elsewhere")
async def browsers(card: Card) -> None:
    for front in FRONTS:
        with mock_processes(1, "--model", "m") as (mock,):
            config = servers_toml([mock.url], allowed_hosts=["llm.test"])
            with router_process(config, card.directory, "--front", front) as router:
                counts, codes = _browse(router, mock)
                card.equal(f"{front}: let through", dict(+counts), {})
                card.equal(f"{front}: servers from a client", codes <= {403, 404, 405}, True)
                card.equal(f"{front}: servers", len(router.servers()), 1)


# -- B9 ---------------------------------------------------------------------------------------

NOT_OURS = "/v1/models/{model}"
"""A POST there is an inference request by its path, and the engine's to refuse."""


@scenario("B9", "schemathesis on /openapi.json")
async def schema(card: Card) -> None:
    program = shutil.which("schemathesis") or shutil.which("st")
    if program is None:
        raise NotRun("schemathesis is not installed")
    for front in FRONTS:
        with mock_processes(1, "--model", "m") as (mock,):
            with router_process(
                servers_toml([mock.url]), card.directory, "--front", front
            ) as router:
                name = mock.url.removeprefix("http://")
                (card.directory / "schemathesis.toml").write_text(
                    f'[parameters]\n"path.server" = "{name}"\n"path.model" = "m"\n'
                )
                command = [program, "run", f"{router.url}/openapi.json", "--checks", "all"]
                command += ["--phases", "coverage,fuzzing", "--no-color", "-w", "1"]
                command += ["--max-examples", str(card.size(5, 30, 300)), "--seed", "1"]

                def run(command: list[str] = command) -> subprocess.CompletedProcess[str]:
                    return subprocess.run(
                        command,
                        capture_output=True,
                        text=True,
                        stdin=subprocess.DEVNULL,
                        cwd=card.directory,
                    )

                done = await off_loop(run)
                tried = re.search(r"(\d+) generated", done.stdout)
                card.note(f"{front}: cases", tried[1] if tried else done.stderr[-200:])
                found = re.findall(r"^_+ ([A-Z]+ /\S*) _+$", done.stdout, re.MULTILINE)
                found = [one for one in found if not one.endswith(NOT_OURS)]
                # Answered with 501 at every path (RFC 9110 15.6.2); schemathesis expects 405.
                found = [one for one in found if not one.startswith("TRACE ")]
                card.equal(f"{front}: operations with a finding", found, [])
                card.equal(f"{front}: ran", tried is not None, True)
                errors = [line for line in router.log if " ERROR " in line]
                card.equal(f"{front}: errors in the log", errors[:3], [])
