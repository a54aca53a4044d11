"""The monitor and `run` on a real terminal, and the monitor without one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.cli_process import Running, call, command, environment, router, running, until
from support.ports import free_port
from support.router_process import own_machine
from support.tmux import Terminal, terminal

LOG = ".state/vllm-router/vllm-router.log"
DEMO = ("run", "--demo", "--host", "127.0.0.1", "--port", "0")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A shared router; tests do not change it."""
    with router(tmp_path_factory.mktemp("router") / "stderr", "--demo", "--console") as started:
        yield started


def state(url: str, name: str) -> str:
    page = httpx.get(f"{url}/load-stats", trust_env=False).json()
    return str(next(server for server in page["servers"] if server["name"] == name)["state"])


def child_of(pid: int) -> int:
    """The process of the monitor, started by any of the router's threads."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    (child,) = {int(word) for file in threads for word in file.read_text().split()}
    return child


# -- monitor ----------------------------------------------------------------------------------


def test_monitor_small_terminal_shows_all_and_keys_work(demo: Running, tmp_path: Path):
    with terminal(command("monitor", demo.url), tmp_path) as screen:
        first = screen.wait("live", "demo-1", "demo-2", "demo-3", "3/3 up")
        lines = first.splitlines()
        assert len(lines) == 24
        assert {len(line) for line in lines} == {80}
        assert lines[0].startswith("╭")
        assert lines[-1].startswith("╰")
        screen.type("Home")
        screen.wait("▸ demo-1")
        screen.type("Down")
        screen.wait("▸ demo-2")
        screen.type("s", "s")
        screen.wait("sort: load")
        screen.type("?")
        screen.wait("this help")
        screen.type("x")
        screen.wait("▸ demo-2", gone="this help")

        screen.type("d")
        screen.wait("Drain demo-2?")
        screen.type("n")
        screen.wait("sort: load", gone="Drain demo-2?")
        assert state(demo.url, "demo-2") == "up"
        screen.type("d", "y")
        screen.wait("demo-2 is draining.", "2/3 up", "EVENTS", "up → draining")
        assert state(demo.url, "demo-2") == "draining"
        screen.type("u", "y")
        screen.wait("3/3 up", "draining → up")
        assert state(demo.url, "demo-2") == "up"

        screen.type("q")
        assert screen.ended() == 0


def test_monitor_large_terminal_follows_resize(demo: Running, tmp_path: Path):
    with terminal(command("monitor", demo.url, "--models"), tmp_path, width=160, height=50) as it:
        it.wait("live", "MODELS", "TTFT95", "KV")
        until(lambda: _whole(it, 160, 50))
        it.resize(80, 24)
        it.wait("live", "demo-3", gone="TTFT95")
        until(lambda: _whole(it, 80, 24))
        it.resize(120, 30)
        until(lambda: _whole(it, 120, 30))
        it.type("C-c")
        assert it.ended() == 0


def _whole(screen: Terminal, width: int, height: int) -> list[str]:
    """The lines of the screen if the frame fills it, else an empty list."""
    lines = screen.screen().splitlines()
    fits = len(lines) == height and {len(line) for line in lines} == {width}
    return lines if fits and lines[0][0] == "╭" and lines[-1][-1] == "╯" else []


def test_monitor_router_restart_is_shown_and_survived(tmp_path: Path):
    port = str(free_port())
    serve = ("run", "--demo", "--host", "127.0.0.1", "--port", port, "--console")
    with contextlib.ExitStack() as first:
        first.enter_context(running(tmp_path / "first", *serve)).line()
        with terminal(command("monitor", f"127.0.0.1:{port}"), tmp_path) as screen:
            screen.wait("live", "3/3 up")
            first.close()
            screen.wait("trying again", "demo-1")
            with running(tmp_path / "second", *serve):
                screen.wait("live", "3/3 up", gone="trying again")
                screen.type("q")
                assert screen.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_monitor_signal_restores_terminal(demo: Running, tmp_path: Path, number: signal.Signals):
    # The shell replaces itself with the command and prints its process id.
    script = ["sh", "-c", 'echo $$ > pid; exec "$@"', "sh", *command("monitor", demo.url)]
    with terminal(script, tmp_path) as screen:
        screen.wait("live")
        assert screen.full_screen()
        os.kill(int((tmp_path / "pid").read_text()), number)
        assert screen.ended() == 0


def test_monitor_defect_restores_terminal(demo: Running, tmp_path: Path):
    broken = (
        "import vllm_router.cli.monitor.screen as s, vllm_router.cli.main as c\n"
        "draw, count = s.draw, []\n"
        "def fail(*a):\n"
        "    count.append(1)\n"
        "    return draw(*a) if len(count) < 3 else 1 / 0\n"
        "s.draw = fail\n"
        "c.main()\n"
    )
    with terminal([sys.executable, "-c", broken, "monitor", demo.url], tmp_path) as screen:
        assert screen.ended() == 1
        assert "ZeroDivisionError" in screen.all()


def test_monitor_without_router_is_one_line(tmp_path: Path):
    url = f"http://127.0.0.1:{free_port()}"
    with terminal(command("monitor", url), tmp_path, width=160) as screen:
        assert screen.ended() == 2
        line = f"vllm-router: no router answers at {url}: Connection refused"
        assert screen.all().splitlines()[0] == line
    done = call("monitor", url)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")


# -- where there is no terminal ---------------------------------------------------------------


def test_monitor_without_terminal_prints_lines(demo: Running, tmp_path: Path):
    with running(tmp_path / "errors", "monitor", demo.url, "--interval", "0.2") as lines:
        first = lines.line()
        assert first[10:11] == "T"
        assert "3/3 servers, 0 running, 0 waiting, 0 in flight, load 0 %" in first
        assert "\x1b" not in first
        with own_machine(demo.url) as client:
            client.post("/admin/servers/demo-3/drain")
        until(lambda: "demo-3: up → draining" in lines.line())
        until(lambda: "2/3 servers (1 draining)" in lines.line())
        with own_machine(demo.url) as client:
            client.post("/admin/servers/demo-3/undrain")
        assert lines.stop() == 0
    assert (tmp_path / "errors").read_text() == ""


def test_monitor_closed_pipe_is_no_error(demo: Running):
    lines = subprocess.Popen(
        command("monitor", demo.url, "--interval", "0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    try:
        assert lines.stdout is not None
        assert lines.stderr is not None
        lines.stdout.readline()
        lines.stdout.close()
        assert lines.wait(60) == 0
        assert lines.stderr.read() == b""
    finally:
        lines.kill()
        lines.wait()
        lines.stderr.close()


# -- run --------------------------------------------------------------------------------------


def test_run_monitor_logs_to_file_and_ctrl_c_stops_both(tmp_path: Path):
    with terminal(command(*DEMO), tmp_path) as screen:
        screen.wait("live", "demo-1", "3/3 up")
        until(lambda: "unknown -> up" in (tmp_path / LOG).read_text())
        screen.type("C-c")
        assert screen.ended() == 0
        text = screen.all()
        assert "vLLM Router" in text
        assert "serve: SIGTERM: draining" in text
        assert "serve: stopped" in text
        assert "unknown -> up" not in text


def test_run_monitor_asks_before_q_stops_router(tmp_path: Path):
    with terminal(command(*DEMO), tmp_path) as screen:
        screen.wait("live", "3/3 up")
        screen.type("q")
        screen.wait("Stop the router? Nothing is in flight.")
        screen.type("n")
        screen.wait("live", gone="Stop the router?")
        screen.type("q", "y")
        assert screen.ended() == 0


def test_run_monitor_port_in_use_is_one_line(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with terminal(command(*DEMO[:-1], port), tmp_path) as screen:
            assert screen.ended() == 2
            line = f"vllm-router: port {port} on 127.0.0.1 is already in use"
            assert screen.all().startswith(line)


def test_run_console_option_shows_no_monitor(tmp_path: Path):
    with terminal(command(*DEMO, "--console"), tmp_path) as screen:
        screen.wait("unknown -> up")
        assert not screen.full_screen()
        assert not (tmp_path / LOG).exists()
        screen.type("C-c")
        assert screen.ended() == 0


@contextlib.contextmanager
def run_with_pid(directory: Path) -> Iterator[tuple[Terminal, int]]:
    """A router with its monitor, and the process of the router."""
    script = ["sh", "-c", 'echo $$ > pid; exec "$@"', "sh", *command(*DEMO)]
    with terminal(script, directory, width=120) as screen:
        screen.wait("live", "3/3 up")
        yield screen, int((directory / "pid").read_text())


def test_run_monitor_signal_to_router_ends_both_with_message(tmp_path: Path):
    with run_with_pid(tmp_path) as (screen, pid):
        os.kill(pid, signal.SIGTERM)
        assert screen.ended() == 0
        assert "serve: SIGTERM: draining" in screen.all()
        assert "serve: stopped" in screen.all()


def test_run_monitor_killed_router_restores_terminal_and_shows_log(tmp_path: Path):
    with run_with_pid(tmp_path) as (screen, pid):
        os.kill(pid, signal.SIGKILL)
        screen.wait("the router has died; the last lines of its log")
        screen.wait("unknown -> up")
        assert not screen.full_screen()


def test_run_monitor_killed_monitor_leaves_router_running(tmp_path: Path):
    with run_with_pid(tmp_path) as (screen, pid):
        url = screen.screen().partition("http://")[2].split()[0]
        os.kill(child_of(pid), signal.SIGTERM)
        screen.wait("the router is still running, Ctrl-C stops it")
        assert state(f"http://{url}", "demo-1") == "up"
        screen.type("C-c")
        assert screen.ended() == 0
