"""Signals at the wrong moment, hung processes, killed parents: on real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from support.cli_process import ROOT, environment
from support.mock_process import MockProcess, mock_processes
from support.ports import free_port
from support.router_process import RouterProcess, chat, router_process, servers_toml, until
from support.worker_processes import family, pids

DEADLY = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(scope="module")
def mock() -> Iterator[MockProcess]:
    with mock_processes(1, "--model", "m") as (mock,):
        yield mock


def starting(command: list[str], directory: Path) -> subprocess.Popen[str]:
    """A process with slow imports: each prints its name and waits before it runs.

    `trio` and `click` are the first imports in every way of starting.
    """
    slow = directory / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import builtins, time\n"
        "original = builtins.__import__\n"
        "def slow(name, *more, **options):\n"
        "    if name in ('click', 'trio') and name not in slow.seen:\n"
        "        slow.seen.add(name)\n"
        "        print('importing', name, flush=True)\n"
        "        time.sleep(0.5)\n"
        "    return original(name, *more, **options)\n"
        "slow.seen = set()\n"
        "builtins.__import__ = slow\n"
    )
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment()
        | {
            "PYTHONPATH": f"{slow}:{ROOT}",
            "VLLM_ROUTER_CONFIG": str(directory / "servers.toml"),
        },
    )


RUN = ("run", "--console", "--host", "127.0.0.1")
WAYS = {
    "python -m": [sys.executable, "-m", "vllm_router", *RUN],
    "script": [str(Path(sys.executable).parent / "vllm-router"), *RUN],
    "workers": [sys.executable, "-m", "vllm_router", *RUN, "--workers", "2"],
}


@pytest.mark.parametrize("way", WAYS)
def test_signals_during_start_never_kill(way: str, tmp_path: Path, mock: MockProcess):
    port = free_port()
    file = tmp_path / "servers.toml"
    file.write_text(servers_toml([mock.url]))
    process = starting([*WAYS[way], "--config", str(file), "--port", str(port)], tmp_path)
    try:
        assert process.stdout is not None
        while "importing click" not in process.stdout.readline():
            assert process.poll() is None
        url = f"http://127.0.0.1:{port}/readyz"
        deadline = time.monotonic() + 60
        while not _ready(url):
            for number in DEADLY:
                process.send_signal(number)
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for number in DEADLY:
            process.send_signal(number)
        assert _ready(url)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "Traceback" not in output
    finally:
        process.kill()
        process.communicate()


def _ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False, timeout=30).status_code == 200
    return False


def test_signals_do_not_kill_application_in_hypercorn(tmp_path: Path, mock: MockProcess):
    """Hypercorn's parent reloads on SIGHUP; this test signals the serving process."""
    port = free_port()
    (tmp_path / "servers.toml").write_text(servers_toml([mock.url]))
    command = [sys.executable, "-m", "hypercorn", "-k", "trio", "-w", "0"]
    command += ["-b", f"127.0.0.1:{port}", "vllm_router.asgi:app"]
    process = starting(command, tmp_path)
    try:
        url = f"http://127.0.0.1:{port}/readyz"
        until(lambda: _ready(url), "readiness")
        for number in DEADLY:
            process.send_signal(number)
            assert _ready(url)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_hypercorn_with_several_workers_is_refused(tmp_path: Path):
    (tmp_path / "servers.toml").write_text(servers_toml(["http://127.0.0.1:9"]))
    command = [sys.executable, "-m", "hypercorn", "-k", "trio", "-w", "3"]
    command += ["-b", f"127.0.0.1:{free_port()}", "vllm_router.asgi:app"]
    process = starting(command, tmp_path)
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert said.count("hypercorn -w 3 would run 3 independent routers") == 1
    assert "vllm-router run --workers 3" in said
    assert "Traceback" not in said


class StartsWorkers(RouterProcess):
    """Starts its workers itself: with an environment of its own, it has no fork server."""

    environment: ClassVar[Mapping[str, str]] = {"PYTHONUNBUFFERED": "1"}


def test_workers_are_children_of_a_lasting_thread(tmp_path: Path, mock: MockProcess):
    """Else the kernel would signal the parent's death after 10 s."""
    config = servers_toml([mock.url])
    with router_process(config, tmp_path, "--workers", "2", kind=StartsWorkers) as router:
        parent = router.process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children")
        assert set(family(router).values()) <= set(map(int, children.read_text().split()))


def test_sighup_before_start_completes_is_a_reload(tmp_path: Path):
    """Recorded by `hold`, handled by the task that follows."""
    script = (
        "import signal\n"
        "from vllm_router.runtime.early_signals import came, hold\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # ignored if the tests run under nohup
        "hold(); hold()\n"
        "signal.raise_signal(signal.SIGHUP)\n"
        "print(came(signal.SIGHUP), came(signal.SIGHUP), came(signal.SIGUSR1))\n"
        "signal.signal(signal.SIGUSR2, signal.SIG_IGN); hold()\n"
        "print(signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=True,
    )
    assert done.stdout == "True False False\nTrue\n"


def test_leader_that_hangs_is_replaced_while_port_serves(tmp_path: Path, mock: MockProcess):
    config = servers_toml([mock.url])
    with router_process(config, tmp_path, "--workers", "2") as router:
        before = family(router)
        os.kill(before["leader"], signal.SIGSTOP)
        # The workers go on serving.
        assert router.post("/v1/chat/completions", chat()).status_code == 200

        hung = "leader has not responded for 8 s: killing it"
        until(lambda: hung in router.text, "the end of the leader")
        until(lambda: pids(router).get("leader", before["leader"]) != before["leader"], "another")
        after = family(router)
        assert after["worker 1"] == before["worker 1"]
        assert router.get("/health").status_code == 200
        assert router.administrate("GET", "/admin/servers").status_code == 200
        assert router.post("/v1/chat/completions", chat()).status_code == 200


def test_worker_stopped_frees_port_when_parent_dies(tmp_path: Path, mock: MockProcess):
    file = tmp_path / "servers.toml"
    file.write_text(servers_toml([mock.url], drain_timeout=1))
    router = StartsWorkers(file, "--workers", "2")
    processes: list[int] = []
    try:
        router.wait_ready()
        processes = list(family(router).values())
        port = router.port
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        os.kill(router.process.pid, signal.SIGKILL)
        until(lambda: _is_free(port), "the port")
    finally:
        router.close()
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_worker_orphan_with_stuck_loop_exits():
    script = (
        "import os, socket\n"
        "from vllm_router.runtime.workers import orphan\n"
        "orphan.GRACE_S = 0.1\n"
        "ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "if os.fork() == 0:\n"
        "    ours.close()\n"
        "    orphan.end_when_orphaned(theirs.fileno(), lambda: 0.1)\n"
        "    print('stuck', os.getpid(), flush=True)\n"
        "    while True: pass\n"
        "theirs.close()\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert parent.stdout is not None
        stuck = int(parent.stdout.readline().split()[1])
    finally:
        parent.kill()
        parent.communicate()
    until(lambda: not _lives(stuck), "the end of the orphan")


def _lives(pid: int) -> bool:
    """Whether the process runs; a zombie does not count."""
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        return state != "Z"
    return False


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            sock.listen()
            return True
    return False
