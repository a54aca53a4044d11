"""`vllm-router monitor` and the router's own monitor, in this process: what they end with."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import trio

from vllm_router.cli.monitor import attached, command
from vllm_router.cli.monitor.attached import Recent, serve_with_view
from vllm_router.cli.monitor.fullscreen import RESET
from vllm_router.cli.monitor.link import NoFeed
from vllm_router.cli.monitor.log_file import last_lines
from vllm_router.cli.monitor.screen import End
from vllm_router.cli.monitor.terminal import on_terminal
from vllm_router.runtime.serve import ServeOptions

URL = "http://router:8888"


class FakeScreen:
    """Ends at once; remembers what it was made with."""

    end: End | Exception = End.USER
    made: tuple[Any, ...] = ()

    def __init__(self, *made: Any) -> None:
        type(self).made = made

    async def run(self) -> End:
        if isinstance(self.end, Exception):
            raise self.end
        return self.end


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[FakeScreen]]:
    """Runs the command on a terminal whose screen ends like this."""

    def run(end: End | Exception = End.USER, **options: Any) -> type[FakeScreen]:
        screen = type("Screen", (FakeScreen,), {"end": end})
        monkeypatch.setattr(command, "on_terminal", lambda: True)
        monkeypatch.setattr(command, "Screen", screen)
        known: dict[str, Any] = {"models": False, "interval": 5.0, "lang": None, "log": None}
        called: Any = command.monitor.callback
        called(**{"url": URL, "url_option": None, "key": "k", "ca": None, **known, **options})
        return screen

    return run


def test_monitor_command_language_is_the_option_or_the_locale(monitor, monkeypatch):
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert monitor().made[1].texts.language == "zh"
    assert monitor(lang="en").made[1].texts.language == "en"
    feed, view, log = monitor(models=True).made
    assert (feed.url, feed.key, view.models, view.attached, log) == (URL, "k", True, False, None)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("xterm", True), ("dumb", False), ("unknown", False), (" Unknown", False), (None, False)],
)
def test_terminal_of_a_type_without_full_screen_gets_lines(monkeypatch, kind, expected):
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    if kind is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", kind)
    assert on_terminal() is expected


def test_monitor_command_without_router_is_one_line(monitor):
    with pytest.raises(click.ClickException) as error:
        monitor(NoFeed("Connection refused"))
    assert error.value.exit_code == 2
    assert error.value.message == f"no router answers at {URL}: Connection refused"


def test_monitor_command_closed_output_is_no_error(monitor, monkeypatch):
    replaced: list[int] = []
    monkeypatch.setattr(command.os, "dup2", lambda _, number: replaced.append(number))
    monitor(BrokenPipeError())
    assert len(replaced) == 1


def test_monitor_command_of_a_router_exits_with_the_end(monitor, tmp_path, capsys):
    log = tmp_path / "router.log"
    log.write_text("\n".join(f"line {number}" for number in range(30)))
    with pytest.raises(click.exceptions.Exit) as exited:
        monitor(End.ROUTER_STOPS, log=log)
    assert exited.value.exit_code == End.ROUTER_STOPS
    assert capsys.readouterr().err == ""
    with pytest.raises(click.exceptions.Exit) as exited:
        monitor(End.ROUTER_DIED, log=log)
    assert exited.value.exit_code == End.ROUTER_DIED
    said = capsys.readouterr().err
    assert "the router has died; the last lines of its log" in said
    assert said.splitlines()[-10:] == [f"line {number}" for number in range(20, 30)]


@pytest.mark.parametrize("error", [NoFeed("gone"), BrokenPipeError(), None])
async def test_monitor_lines_end_with_a_signal_or_the_feed(monkeypatch, autojump_clock, error):
    async def lines(*_: object) -> None:
        if error is not None:
            raise error
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep_forever()

    monkeypatch.setattr(command, "print_lines", lines)
    feed: Any = None
    with trio.fail_after(60):
        if error is None:
            assert await command._plain(feed, 1.0) is End.USER
        else:
            with pytest.raises(type(error)):
                await command._plain(feed, 1.0)


def test_last_lines_of_a_missing_log_are_none(tmp_path: Path):
    assert last_lines(tmp_path / "missing", 3) == []
    (tmp_path / "log").write_bytes(b"a\nb\x1b\n\xff\n")
    assert last_lines(tmp_path / "log", 2) == ["b\\x1b", "\ufffd"]


# -- the router with its monitor --------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    """The root logger's handlers are as before afterwards."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    root.handlers[:] = before


class Rig:
    """A router whose monitor ends as given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, log: Path, end: int) -> None:
        self.log = log
        self.signals: list[int] = []
        self.stopped = trio.Event()
        self.failure: Exception | None = None
        self.fails_before = False
        self.monitored = ""
        config: Any = None
        self.options = ServeOptions(config=config)

        async def view(url: str, *_: object) -> int:
            self.monitored = url
            logging.getLogger("router").warning("said while the monitor ran")
            if end < 0:
                await trio.sleep_forever()
            return end

        def kill(_: int, number: int) -> None:
            self.signals.append(number)
            self.stopped.set()

        monkeypatch.setattr(attached, "_view", view)
        monkeypatch.setattr(attached.os, "kill", kill)

    async def serve(self, options: ServeOptions, listening: Callable[[str], None]) -> None:
        assert options.view is not None
        if not self.fails_before:
            listening(URL)
        if self.failure is not None:
            await trio.sleep(1)
            raise self.failure
        await self.stopped.wait()

    async def run(self) -> None:
        with trio.fail_after(3600):
            await serve_with_view(self.serve, self.options, lambda _: None, self.log)


@pytest.fixture
def rig(monkeypatch, tmp_path, handlers) -> Callable[[int], Rig]:
    return lambda end: Rig(monkeypatch, tmp_path / "router.log", end)


@pytest.mark.parametrize("end", [End.USER, End.HANGUP])
async def test_run_monitor_ended_by_its_user_stops_the_router(rig, autojump_clock, capsys, end):
    started = rig(end)
    await started.run()
    assert started.signals == [signal.SIGTERM]
    assert started.monitored == URL
    said = capsys.readouterr()
    assert ("stopping" in said.out) is (end is End.USER)
    assert ("said while the monitor ran" in said.err) is (end is not End.USER)


async def test_run_failing_monitor_leaves_the_router_running(rig, autojump_clock, caplog, capsys):
    started = rig(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(started.run)
        await trio.sleep(100)
        assert started.signals == []
        started.stopped.set()
    assert "the router is still running" in caplog.text
    assert "said while the monitor ran" in capsys.readouterr().err


async def test_run_failing_router_ends_the_monitor_and_shows_the_log(rig, autojump_clock, capsys):
    started = rig(-1)
    started.log.write_text("what went wrong\n")
    started.failure = RuntimeError("defect")
    with pytest.raises(RuntimeError, match="defect"):
        await started.run()
    said = capsys.readouterr().err
    assert "the router has failed" in said
    assert "what went wrong" in said


async def test_run_router_that_never_listens_starts_no_monitor(rig, autojump_clock, capsys):
    started = rig(-1)
    started.failure, started.fails_before = OSError("in use"), True
    with pytest.raises(OSError, match="in use"):
        await started.run()
    assert started.monitored == ""
    assert capsys.readouterr().err == ""


async def test_run_monitor_gets_the_key_and_a_url_of_this_machine(monkeypatch, tmp_path):
    found: dict[str, Any] = {}

    async def run_process(arguments: list[str], **options: Any) -> Any:
        found.update(options, arguments=arguments)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(attached.trio, "run_process", run_process)
    aside: Any = SimpleNamespace(terminal=1, errors=2)
    for url, near in (
        ("http://0.0.0.0:1", "http://127.0.0.1:1"),
        ("http://[::]:1", "http://[::1]:1"),
    ):
        assert await attached._view(url, "secret", tmp_path / "log", aside) == 3
        assert near in found["arguments"]
        assert "secret" not in " ".join(found["arguments"])
        assert found["env"]["VLLM_ROUTER_KEY"] == "secret"


async def test_run_killed_monitor_leaves_the_terminal_as_it_was(monkeypatch, tmp_path):
    async def run_process(*_: object, **__: object) -> Any:
        return SimpleNamespace(returncode=-signal.SIGKILL)

    restored: list[Any] = []
    monkeypatch.setattr(attached.trio, "run_process", run_process)
    monkeypatch.setattr(attached, "_modes", lambda _: ["modes"])
    monkeypatch.setattr(attached, "_restore", lambda *given: restored.append(given))
    aside: Any = SimpleNamespace(terminal=7, errors=2)
    assert await attached._view(URL, "k", tmp_path / "log", aside) == -signal.SIGKILL
    assert restored == [(7, ["modes"])]


def test_terminal_modes_are_read_and_restored_with_the_screen():
    outside, terminal = os.openpty()
    try:
        before = attached._modes(terminal)
        assert before is not None
        tty.setraw(terminal)
        assert attached._modes(terminal) != before
        attached._restore(terminal, before)
        assert attached._modes(terminal) == before
        assert os.read(outside, 1000).decode() == RESET
    finally:
        os.close(outside)
        os.close(terminal)
    reading, writing = os.pipe()
    try:
        assert attached._modes(reading) is None
    finally:
        os.close(reading)
        os.close(writing)


def test_recent_records_are_kept_by_time():
    kept = Recent()
    for number in range(30):
        record = logging.makeLogRecord({"msg": str(number), "created": float(number)})
        kept.emit(record)
    assert [record.msg for record in kept.since(27.0)] == ["27", "28", "29"]
    assert len(kept.since(0.0)) == 20
