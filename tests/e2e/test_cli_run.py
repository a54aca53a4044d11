"""`run` and the commands that talk to a running router, as processes."""

from __future__ import annotations

import json
import re
import resource
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import vllm_router
from support.cli_process import Running, call, router, running, until
from support.mock_process import mock_processes
from vllm_router.lab.demo import DEMO_MODEL

CHAT = {"model": DEMO_MODEL, "messages": [{"role": "user", "content": "Hello!"}]}


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Running]:
    """A router with three simulated servers."""
    with router(tmp_path / "stderr", "--demo") as started:
        yield started


def servers(url: str) -> dict[str, dict[str, object]]:
    """The router's own view of its servers, by name."""
    page = httpx.get(f"{url}/load-stats", trust_env=False).json()
    return {server["name"]: server for server in page["servers"]}


# -- start and end ----------------------------------------------------------------------------


def test_run_start_line_has_url_server_count_and_working_hint(tmp_path: Path):
    arguments = ("run", "--demo", "2", "--host", "127.0.0.1", "--port", "0")
    with running(tmp_path / "stderr", *arguments, from_nothing=True) as started:
        first, hint = started.line(), started.line()
        assert first.startswith(f"vLLM Router {vllm_router.__version__} on http://127.0.0.1:")
        assert first.endswith(", 2 servers")
        answer = subprocess.run(
            [*shlex.split(hint.removeprefix("try: ")), "--silent", "--noproxy", "*"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert answer.stdout.startswith("data: {")
        assert answer.stdout.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_signal_exits_with_success(demo: Running, number: signal.Signals):
    assert demo.stop(number) == 0
    assert "Traceback" not in demo.errors.read_text()


def test_run_raises_descriptor_limit_to_system_maximum(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with router(tmp_path / "stderr", "--demo", "1", from_nothing=True) as started:
            page = httpx.get(f"{started.url}/metrics", trust_env=False).text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    allowed = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    assert f"process_max_fds {float(allowed)}\n" in page


def test_run_demo_has_traffic_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_ROUTER_DEMO_LOAD", "10")
    with (
        router(tmp_path / "stderr", "--demo", "2") as started,
        httpx.Client(base_url=started.url, trust_env=False, timeout=60) as client,
    ):
        rows = until(lambda: client.get("/decisions").json()["decisions"])
        assert rows[0]["model"].startswith("demo")
        names = {model["id"] for model in client.get("/v1/models").json()["data"]}
        assert names == {"demo", "demo-coder", "demo-large"}


def test_run_port_in_use_is_one_line(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = call("run", "--demo", "--host", "127.0.0.1", "--port", port, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"vllm-router: port {port} on 127.0.0.1 is already in use; ")
    assert "--port" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_run_unknown_host_is_one_line(tmp_path: Path):
    done = call("run", "--server", "http://127.0.0.1:1", "--host", "no.invalid", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("vllm-router: cannot listen on no.invalid: ")
    assert done.stderr.count("\n") == 1


def test_run_json_log_has_json_lines_only(tmp_path: Path):
    arguments = ("run", "--demo", "1", "--host", "127.0.0.1", "--port", "0", "--log-format", "json")
    with running(tmp_path / "stderr", *arguments) as started:
        until(lambda: "vLLM Router" in started.errors.read_text())
        assert started.stop() == 0
        assert started.process.stdout is not None
        assert started.process.stdout.read() == b""
        records = [json.loads(line) for line in started.errors.read_text().splitlines()]
        assert {"time", "level", "logger", "message"} <= records[0].keys()


def test_run_with_unread_stdout_serves(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    arguments = ("run", "--demo", "1", "--host", "127.0.0.1", "--port", url.rpartition(":")[2])
    with running(tmp_path / "stderr", *arguments) as started:
        assert started.process.stdout is not None
        started.process.stdout.close()
        until(lambda: _answers(f"{url}/livez"))
        assert started.stop() == 0
        assert "Traceback" not in started.errors.read_text()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("front", ["lane", "hypercorn"])
def test_run_serves_servers_of_command_line(tmp_path: Path, front: str):
    with mock_processes(2, "--model", "m") as mocks:
        options = [word for mock in mocks for word in ("--server", mock.url)]
        with router(tmp_path / "stderr", *options, "--front", front) as started:
            answer = httpx.post(
                f"{started.url}/v1/chat/completions", json=CHAT | {"model": "m"}, trust_env=False
            )
            assert answer.status_code == 200
            assert answer.headers["x-vllm-router-server"] in servers(started.url)


def test_run_follows_file_of_working_directory(tmp_path: Path):
    with mock_processes(2, "--model", "m") as mocks:
        path = tmp_path / "servers.toml"
        lines = [
            f'[[servers.servers]]\nurl = "{mock.url}"\nname = "{mock.name}"\n' for mock in mocks
        ]
        path.write_text(lines[0])
        with router(tmp_path / "stderr", cwd=tmp_path) as started:
            assert set(servers(started.url)) == {mocks[0].name}
            path.write_text("".join(lines))
            until(lambda: set(servers(started.url)) == {mock.name for mock in mocks})


# -- a running router -------------------------------------------------------------------------


def test_status_is_one_line_per_server(demo: Running):
    def known() -> bool:
        """Whether every server's metrics have been read."""
        return all(server["metrics_fresh"] for server in servers(demo.url).values())

    until(known)
    done = call("status", demo.url)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split()[:3] == ["SERVER", "STATE", "LOAD"]
    assert [row.split()[:2] for row in rows] == [[f"demo-{n}", "up"] for n in (1, 2, 3)]
    assert all(
        row.split()[2:] == ["0.00", "0", "0", "0", capacity, DEMO_MODEL, "-"]
        for row, capacity in zip(rows, ("16", "8", "4"), strict=True)
    )


def test_status_json_is_the_routers_response(demo: Running):
    page = json.loads(call("status", demo.url, "--json").stdout)
    assert [server["name"] for server in page["load"]["servers"]] == ["demo-1", "demo-2", "demo-3"]
    assert page["health"]


@pytest.mark.parametrize(
    "arguments",
    [["status", "URL"], ["drain", "a", "--url", "URL"], ["undrain", "a", "--url", "URL"]],
)
def test_status_without_router_is_one_line(arguments: list[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    done = call(*(url if word == "URL" else word for word in arguments))
    assert done.returncode == 2
    assert done.stderr == f"vllm-router: no router answers at {url}: Connection refused\n"


def test_status_of_other_program_is_one_line():
    with mock_processes(1) as (mock,):
        done = call("status", mock.url)
    assert done.returncode == 2
    assert done.stderr.startswith(f"vllm-router: {mock.url} is not a vLLM Router")
    assert done.stderr.count("\n") == 1


def test_drain_idle_server_is_drained_and_taken_back(demo: Running):
    done = call("drain", "demo-2", "--url", demo.url)
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        ["demo-2: 0 in flight", "demo-2 is drained"],
    ), done.stderr
    assert servers(demo.url)["demo-2"]["state"] == "draining"

    done = call("undrain", "demo-2", "--url", demo.url)
    assert (done.returncode, done.stdout) == (0, "demo-2 takes requests again\n"), done.stderr
    assert servers(demo.url)["demo-2"]["state"] == "up"


@pytest.mark.parametrize("command", ["drain", "undrain"])
def test_drain_unknown_server_lists_known_ones(demo: Running, command: str):
    done = call(command, "demo-9", "--url", demo.url)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "demo-9" in done.stderr
    assert "demo-1, demo-2, demo-3" in done.stderr


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[Running, str, httpx.Response]]:
    """A router with a server that streams a response without an end in sight."""
    with mock_processes(1, "--model", DEMO_MODEL, "--token-delay", "0.02") as (mock,):
        with router(tmp_path / "router", "--server", mock.url) as started:
            name = mock.url.removeprefix("http://")
            body = CHAT | {"stream": True, "max_tokens": 20_000, "ignore_eos": True}
            with (
                httpx.Client(trust_env=False) as client,
                client.stream("POST", f"{started.url}/v1/chat/completions", json=body) as answer,
            ):
                yield started, name, answer


def test_drain_waits_for_last_request(busy: tuple[Running, str, httpx.Response], tmp_path: Path):
    started, name, answer = busy
    with running(tmp_path / "drain", "drain", name, "--url", started.url) as watching:
        assert watching.line() == f"{name}: 1 in flight"
        answer.close()
        assert watching.line() == f"{name}: 0 in flight"
        assert watching.line() == f"{name} is drained"
        assert watching.process.wait(timeout=60) == 0


def test_drain_interrupt_ends_watching_not_draining(
    busy: tuple[Running, str, httpx.Response], tmp_path: Path
):
    started, name, answer = busy
    with running(tmp_path / "drain", "drain", name, "--url", started.url) as watching:
        watching.line()
        assert watching.stop(signal.SIGINT) == 130
        assert "Traceback" not in watching.errors.read_text()
    assert servers(started.url)[name]["state"] == "draining"
    assert not answer.is_closed


# -- check-config --probe ---------------------------------------------------------------------


def test_check_config_probe_shows_every_servers_response(tmp_path: Path):
    with (
        mock_processes(1, "--model", "m", "--max-model-len", "4096") as (good,),
        mock_processes(1, "--model", "m", "--api-key", "right") as (keyed,),
    ):
        path = tmp_path / "servers.toml"
        path.write_text(
            f"""
            [servers]
            servers = [
                {{ url = "{good.url}", name = "good" }},
                {{ url = "{keyed.url}", name = "keyed", api_key = "right" }},
            ]
            """
        )
        done = call("check-config", "--probe", "--config", str(path))
        assert done.returncode == 0, done.stderr
        _, _, first, second = done.stdout.splitlines()
        assert first.split()[:2] == ["good", "ok"]
        assert first.split()[4:9] == ["m", "4096", "running", "waiting", "kv"]
        assert first.endswith("none")
        assert second.endswith("accepted")

        good.set(health=503)
        text = path.read_text().replace("right", "wrong")
        path.write_text(text)
        done = call("check-config", "--probe", "--config", str(path))
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            "good: /health answered 503",
            "keyed: /v1/models answered 401: key refused",
        ]


def test_check_config_probe_is_bounded_by_timeout(tmp_path: Path):
    with mock_processes(1, "--set", '{"health": "hang"}') as (mock,):
        path = tmp_path / "servers.toml"
        path.write_text(
            f'[servers]\nservers = [{{ url = "{mock.url}", name = "a" }}]\n'
            "[config]\nhealth_check_timeout = 1\n"
        )
        done = call("check-config", "--probe", "--config", str(path))
    assert done.returncode == 1
    assert done.stderr == "a: /health: no answer in 1 s\n"


def test_access_log_file_is_rotated_and_complete(tmp_path: Path):
    log, moved = tmp_path / "access.log", tmp_path / "access.log.1"
    options = ("--demo", "1", "--console", "--access-log", str(log), "--log-format", "json")
    arguments = ("run", "--host", "127.0.0.1", "--port", "0", *options)
    with running(tmp_path / "stderr", *arguments) as started:
        url = until(lambda: re.search(r"on (http://\S+?),", (tmp_path / "stderr").read_text()))[1]
        until(lambda: httpx.get(f"{url}/readyz", trust_env=False).status_code == 200)

        def ask(identifier: str) -> None:
            body = {"model": "demo", "max_tokens": 2, "messages": []}
            headers = {"x-request-id": identifier, "authorization": "Bearer SECRET"}
            path = f"{url}/v1/chat/completions?key=SECRET"
            httpx.post(path, json=body, headers=headers, trust_env=False).raise_for_status()

        ask("first")
        until(lambda: "first" in log.read_text())
        log.rename(moved)
        started.process.send_signal(signal.SIGUSR1)
        until(log.exists)
        ask("second")
        assert started.stop() == 0
    (line,) = log.read_text().splitlines()
    found = json.loads(line)
    assert (found["request_id"], found["server"], found["status"]) == ("second", "demo-1", 200)
    assert found["completion_tokens"] == 2
    assert moved.read_text().count("\n") == 1
    assert "SECRET" not in line + (tmp_path / "stderr").read_text()


def test_access_log_unwritable_file_is_one_line(tmp_path: Path):
    done = call("run", "--demo", "1", "--console", "--access-log", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("vllm-router: cannot write the access log: ")
    assert done.stderr.count("\n") == 1
