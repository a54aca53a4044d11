"""Administration without an admin key: allowed to the router's user on its machine, only.

On real processes, each way of starting the router.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.cli_process import ROOT, call, environment
from support.mock_process import MockProcess, mock_processes
from support.ports import free_port
from support.proxies_in_front import NGINX_PLAIN, proxy
from support.router_process import RouterProcess, own_machine, router_process, servers_toml, until
from support.worker_processes import pids
from vllm_router.runtime.own_machine import find_socket

KINDS = {
    "lane": (),
    "hypercorn front": ("--front", "hypercorn"),
    "workers": ("--workers", "2"),
}


@pytest.fixture(scope="module")
def mock() -> Iterator[MockProcess]:
    with mock_processes(1, "--model", "m") as (mock,):
        yield mock


@contextlib.contextmanager
def hypercorn(config: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`hypercorn -k trio vllm_router.asgi:app`, and the URL that it listens at."""
    port = free_port()
    command = [sys.executable, "-m", "hypercorn", "-k", "trio", "-b", f"127.0.0.1:{port}"]
    process = subprocess.Popen(
        [*command, *arguments, "vllm_router.asgi:app"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment() | {"VLLM_ROUTER_CONFIG": str(config)},
    )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def ready(url: str) -> bool:
    return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200


@pytest.fixture(scope="module", params=[*KINDS, "hypercorn"])
def url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mock: MockProcess
) -> Iterator[str]:
    """A router without keys."""
    directory = tmp_path_factory.mktemp("router")
    config = servers_toml([mock.url]).replace("max_conc", 'name = "gpu", max_conc')
    if request.param == "hypercorn":
        file = directory / "servers.toml"
        file.write_text(config)
        with hypercorn(file) as (url, _):
            until(lambda: ready(url), "readiness")
            yield url
    else:
        with router_process(config, directory, *KINDS[request.param]) as router:
            yield router.url


ADMINISTRATION = (
    ("GET", "/admin/servers"),
    ("POST", "/admin/servers/gpu/drain"),
    ("POST", "/admin/servers/gpu/undrain"),
    ("POST", "/admin/reload"),
    ("POST", "/admin/sign-in"),
)


def codes(client: httpx.Client) -> set[tuple[int, str]]:
    """Responses of the administration paths: statuses, and the router's error codes."""
    answers = [client.request(method, path) for method, path in ADMINISTRATION]
    return {(one.status_code, one.headers.get("x-vllm-router-error", "")) for one in answers}


REFUSED = {(403, "admin_local_only")}


def test_admin_from_loopback_address_is_refused(url: str):
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert codes(client) == REFUSED


def test_admin_behind_plain_proxy_pass_is_refused(url: str, tmp_path: Path):
    with proxy("nginx", NGINX_PLAIN, httpx.URL(url).port or 0, tmp_path) as outside:
        with httpx.Client(base_url=outside, trust_env=False) as client:
            assert client.get("/v1/models").status_code == 200
            assert codes(client) == REFUSED


def test_admin_behind_port_forward_is_refused(url: str):
    """`ssh -R` and the like: bytes arrive from a loopback address, unchanged."""
    port = httpx.URL(url).port or 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def forward() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    server = socket.create_connection(("127.0.0.1", port))
                    for source, sink in ((client, server), (server, client)):
                        threading.Thread(target=pump, args=(source, sink), daemon=True).start()

        threading.Thread(target=forward, daemon=True).start()
        outside = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=outside, trust_env=False) as client:
            assert codes(client) == REFUSED


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError), source, sink:
        while data := source.recv(65536):
            sink.sendall(data)


def test_admin_by_own_socket_is_allowed(url: str):
    with own_machine(url) as client:
        assert codes(client) == {(200, "")}
        answer = client.post("/v1/chat/completions", json={"model": "m", "messages": []})
        assert answer.status_code == 200


def test_admin_commands_prove_their_user(url: str):
    drained = call("drain", "gpu", "--url", url)
    assert (drained.returncode, drained.stderr) == (0, "")
    state = call("status", url)
    assert "draining" in state.stdout
    back = call("undrain", "gpu", "--url", url)
    assert (back.returncode, back.stderr) == (0, "")
    shown = call("explain", "--model", "m", "--url", url)
    assert shown.returncode == 0, shown.stderr


def test_admin_command_of_other_user_says_what_to_do(url: str, tmp_path: Path):
    """Without a socket, as for another user or on another machine."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_router", "drain", "gpu", "--url", url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment() | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert done.returncode == 2
    assert "auth.admin_key" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_admin_socket_opened_by_other_user_is_closed(url: str):
    """Even if the modes of the file and its directory admit other users."""
    path = find_socket(url)
    assert path is not None
    places = (Path(path), Path(path).parent, Path(path).parent.parent)
    modes = [place.stat().st_mode for place in places]
    for place in places:
        place.chmod(0o777)
    script = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534)\n"
        "sock = socket.socket(socket.AF_UNIX); sock.settimeout(30); sock.connect(sys.argv[1])\n"
        "try:\n"
        "    sock.sendall(b'GET /admin/servers HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n')\n"
        "    print(sock.recv(100))\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
    )
    try:
        done = subprocess.run(
            ["/usr/bin/env", "python3", "-c", script, path],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        for place, mode in zip(places, modes, strict=True):
            place.chmod(mode)
    assert done.stdout.strip() in ("b''", "ConnectionResetError", "BrokenPipeError"), done.stderr


def test_page_sign_in_by_link_keeps_rights_behind_proxy(url: str, tmp_path: Path):
    opened = call("open", url, "--print")
    assert opened.returncode == 0, opened.stderr
    found = re.fullmatch(rf"{re.escape(url)}/#sign-in=([\w-]{{43}})\n", opened.stdout)
    assert found, opened.stdout
    with proxy("nginx", NGINX_PLAIN, httpx.URL(url).port or 0, tmp_path) as outside:
        with httpx.Client(base_url=outside, trust_env=False) as client:
            answer = client.post("/sign-in", json={"code": found[1]})
            assert answer.status_code == 200
            again = client.post("/sign-in", json={"code": found[1]})
            assert again.headers["x-vllm-router-error"] == "sign_in_expired"
            client.headers["authorization"] = f"Bearer {answer.json()['key']}"
            assert codes(client) == {(200, "")}


def test_monitor_uses_own_socket(url: str):
    done = subprocess.Popen(
        [sys.executable, "-m", "vllm_router", "monitor", url, "--interval", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert done.stdout is not None
        assert "1/1 servers" in done.stdout.readline()
    finally:
        done.terminate()
        _, errors = done.communicate(timeout=60)
    assert errors == ""


def test_admin_socket_survives_killed_leader(tmp_path: Path, mock: MockProcess):
    config = servers_toml([mock.url])
    with router_process(config, tmp_path, "--workers", "2") as router:
        leader = pids(router)["leader"]
        os.kill(leader, signal.SIGKILL)
        router.wait_for_text("leader was killed by SIGKILL; restarting it")
        assert router.administrate("GET", "/admin/servers").status_code == 200


def test_admin_socket_needs_configured_admin_key(tmp_path: Path, mock: MockProcess):
    config = servers_toml([mock.url]) + '[auth]\nadmin_key = "sk-admin"\n'
    with router_process(config, tmp_path) as router:
        with own_machine(router.url) as client:
            assert codes(client) == {(401, "missing_api_key")}
            client.headers["authorization"] = "Bearer sk-admin"
            assert client.get("/admin/servers").status_code == 200
        # A key for the page is no key for inference.
        opened = call("open", router.url, "--print", "--key", "sk-admin")
        assert opened.returncode == 0, opened.stderr


def test_admin_new_key_ends_signed_in_sessions(tmp_path: Path, mock: MockProcess):
    config = servers_toml([mock.url])
    with router_process(config, tmp_path) as router:
        code = router.administrate("POST", "/admin/sign-in").json()["code"]
        key = router.post("/sign-in", {"code": code}).json()["key"]
        mine = {"authorization": f"Bearer {key}"}
        assert router.get("/admin/servers", headers=mine).status_code == 200
        router.config.write_text(config + '[auth]\nadmin_key = "sk-new"\n')
        until(lambda: router.get("/admin/servers").status_code == 401, "the key")
        assert router.get("/admin/servers", headers=mine).status_code == 401


def test_admin_listener_on_loopback_needs_proof(tmp_path: Path, mock: MockProcess):
    port = free_port()
    config = servers_toml([mock.url], admin_listen=f"127.0.0.1:{port}")
    with RouterUp(config, tmp_path) as router:
        admin = f"http://127.0.0.1:{port}"
        until(lambda: ready(admin), "readiness")
        assert httpx.get(f"{admin}/admin/servers", trust_env=False).status_code == 403
        for url in (admin, router.url):
            with own_machine(url) as client:
                assert client.get("/admin/servers").status_code == 200
                assert client.get("/metrics").status_code == 200


class RouterUp(contextlib.AbstractContextManager[RouterProcess]):
    """A router whose readiness is not checked at its public port."""

    def __init__(self, config: str, directory: Path) -> None:
        file = directory / "servers.toml"
        file.write_text(config)
        self.router = RouterProcess(file)

    def __enter__(self) -> RouterProcess:
        until(lambda: bool(self.router.url), "the port")
        return self.router

    def __exit__(self, *_: object) -> None:
        self.router.close()
        assert "Traceback" not in self.router.text, self.router.text


def test_hypercorn_admin_with_several_workers_is_refused(tmp_path: Path, mock: MockProcess):
    file = tmp_path / "servers.toml"
    file.write_text(servers_toml([mock.url]))
    with hypercorn(file, "-w", "3") as (_, process):
        output, _ = process.communicate(timeout=60)
    # The exit code is Hypercorn's affair: it drops the exit codes of its workers.
    assert "vllm-router run --workers 3" in output
    assert "Traceback" not in output


def test_hypercorn_with_reloader_serves(tmp_path: Path, mock: MockProcess):
    file = tmp_path / "servers.toml"
    file.write_text(servers_toml([mock.url]))
    with hypercorn(file, "-w", "1", "--reload") as (url, _):
        until(lambda: ready(url), "readiness")
