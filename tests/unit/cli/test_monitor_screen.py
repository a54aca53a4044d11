"""The monitor's tasks: painting, keys, the mouse, signals, actions, requests and the log."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import trio
from rich.console import Console

from support.feed_makers import event, hello, server, snapshot
from vllm_router.cli.monitor import screen as module
from vllm_router.cli.monitor.link import GoingAway, Message, NoFeed
from vllm_router.cli.monitor.screen import End, Screen
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.texts import Texts
from vllm_router.cli.router_client import ErrorResponse, NoRouter
from vllm_router.errors import RouterError
from vllm_router.web.schema import ReloadView


class FakeFeed:
    """A feed that a test drives."""

    url, key, ca = "http://router:8888", None, None

    def __init__(self) -> None:
        self.patient: bool | None = None
        self.take: Callable[[Message], None] = lambda _: None
        self.lost: Callable[[NoFeed], None] = lambda _: None
        self.failure: NoFeed | None = None

    async def follow(
        self, take: Callable[[Message], None], lost: Callable[[NoFeed], None], *, patient: bool
    ) -> None:
        self.take, self.lost, self.patient = take, lost, patient
        if self.failure is not None:
            raise self.failure
        take(hello())
        take(snapshot(server("a", models=("m",)), server("b")))
        await trio.sleep_forever()


class FakeTerminal:
    """A terminal whose last frame can be read."""

    def __init__(self, width: int = 100, height: int = 40) -> None:
        self.console = Console(
            width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None
        )
        self.text = ""
        self.suspended = 0
        self.entered = False

    def __enter__(self) -> Self:
        self.entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self.entered = False

    def show(self, frame: Any) -> None:
        lines = self.console.render_lines(frame, pad=False)
        self.text = "\n".join("".join(part.text for part in line) for line in lines)

    def suspend(self) -> None:
        self.suspended += 1


class FakeClient:
    """The router's answers; `problem` makes every request fail."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.problem: str | RouterError = ""
        self.rows: list[dict[str, Any]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def _note(self, *asked: Any) -> None:
        self.asked.append(asked)
        if self.problem:
            raise (
                self.problem if isinstance(self.problem, RouterError) else RouterError(self.problem)
            )

    async def drain(self, name: str, *, on: bool) -> None:
        self._note("drain", name, on)

    async def reload(self) -> str:
        self._note("reload")
        return "applied"

    async def explain(self, model: str | None, _: None) -> dict[str, Any]:
        self._note("explain", model)
        return {"model": model, "picked": None, "policy": "adaptive", "out": [], "candidates": []}

    async def decisions(self, limit: int) -> list[dict[str, Any]]:
        self._note("decisions")
        return self.rows[:limit]


class Rig:
    """A running screen on a fake terminal; keys go through a pipe."""

    def __init__(self, attached: bool, log: Path | None, keys: int) -> None:
        self.feed, self.terminal, self.client = FakeFeed(), FakeTerminal(), FakeClient()
        self.view = View(self.feed.url, attached)
        feed: Any = self.feed
        self.screen = Screen(feed, self.view, log)
        self.end: End | None = None
        self.ended = trio.Event()
        self._keys = keys

    def type(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    async def until(self, what: Callable[[], bool]) -> None:
        with trio.fail_after(3600):  # of virtual time
            while not what():
                await trio.sleep(0.05)

    async def shows(self, *texts: str) -> None:
        await self.until(lambda: all(text in self.terminal.text for text in texts))

    async def run(self) -> None:
        self.end = await self.screen.run()
        self.ended.set()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    for descriptor in (read, write):
        with contextlib.suppress(OSError):
            os.close(descriptor)


@contextlib.asynccontextmanager
async def running(
    monkeypatch: pytest.MonkeyPatch,
    pipe: tuple[int, int],
    attached: bool = False,
    log: Path | None = None,
) -> AsyncIterator[Rig]:
    rig = Rig(attached, log, pipe[1])
    monkeypatch.setattr(module.sys, "stdin", SimpleNamespace(fileno=lambda: pipe[0]))
    monkeypatch.setattr(module, "FullScreen", lambda _: rig.terminal)
    monkeypatch.setattr(Screen, "_client", lambda _: rig.client)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.run)
        await rig.shows("a ", "live")
        yield rig
        nursery.cancel_scope.cancel()
    assert not rig.terminal.entered


async def test_screen_keys_select_and_q_ends(monkeypatch, pipe, autojump_clock):
    async with running(monkeypatch, pipe) as rig:
        assert rig.feed.patient is False
        rig.type("\x1b[B")
        await rig.shows("▸ b")
        rig.type("\x1b")  # alone: the escape key, after a moment
        rig.type("q")
        await rig.ended.wait()
        assert rig.end is End.USER


async def test_screen_click_selects_the_server_under_the_mouse(monkeypatch, pipe, autojump_clock):
    async with running(monkeypatch, pipe) as rig:
        lines = rig.terminal.text.splitlines()
        row = next(n for n, line in enumerate(lines, 1) if line.startswith("│   b "))
        rig.type(f"\x1b[<0;9;{row}M")
        await rig.shows("▸ b")
        rig.type(f"\x1b[<0;9;{row}M")
        await rig.shows("First token")


async def test_screen_actions_ask_the_router_and_say_what_came_of_it(
    monkeypatch, pipe, autojump_clock
):
    async with running(monkeypatch, pipe) as rig:
        rig.type("dy")
        await rig.shows("a is draining.")
        rig.feed.take(snapshot(server("a", state="draining"), server("b")))
        rig.type("uy")
        await rig.shows("a takes requests again.")
        rig.type("e")
        await rig.shows("A request for the model 'm' would be refused")
        rig.type("x")
        rig.client.problem = "An API key is needed"
        rig.type("e")
        await rig.shows("An API key is needed")
        asked = [one for one in rig.client.asked if one != ("decisions",)]
        assert asked == [("drain", "a", True), ("drain", "a", False), *[("explain", "m")] * 2]


async def test_screen_late_explanation_does_not_replace_a_newer_one(
    monkeypatch, pipe, autojump_clock
):
    asked: list[str] = []

    async def explain(self: FakeClient, model: str | None, _: None) -> dict[str, Any]:
        name, seconds = ("new", 0.0) if asked else ("old", 60.0)
        asked.append(name)
        await trio.sleep(seconds)
        return {"model": name, "picked": None, "policy": "adaptive", "out": [], "candidates": []}

    monkeypatch.setattr(FakeClient, "explain", explain)
    async with running(monkeypatch, pipe) as rig:
        rig.type("e")
        await rig.until(lambda: asked == ["old"])
        rig.type("e")
        await rig.shows("A request for the model 'new'")
        await trio.sleep(100.0)
        assert rig.view.explained is not None
        assert rig.view.explained["model"] == "new"


async def test_screen_says_what_the_router_refuses_in_its_language(
    monkeypatch, pipe, autojump_clock
):
    async with running(monkeypatch, pipe) as rig:
        rig.view.texts = Texts("zh")
        message = "x is no longer in the configuration: put it back."
        rig.client.problem = ErrorResponse("server_leaving", message, {"server": "x"})
        rig.type("dy")
        await rig.shows("x 已不在配置中")
        rig.client.problem = NoRouter("no router answers at http://r:1: Connection refused")
        rig.type("dy")
        await rig.shows("http://r:1 没有路由器响应", "连接被拒绝")


async def test_screen_reload_says_what_the_router_did(monkeypatch, pipe, autojump_clock):
    async with running(monkeypatch, pipe) as rig:
        reload = {"source": "s.toml", "generation": 1, "applied": 0, "refused": 0, "error": None}
        rig.feed.take(snapshot(server("a"), reload=ReloadView(**reload)))
        rig.type("Ry")
        await rig.shows("The new configuration is in force.")


async def test_screen_reads_requests_again_and_again_and_after_a_failure(
    monkeypatch, pipe, autojump_clock
):
    async with running(monkeypatch, pipe) as rig:
        rig.type("t")
        await rig.shows("No request yet.")
        rig.client.problem = "no answer in time"
        await rig.shows("no answer in time")
        rig.client.problem = ""
        rig.client.rows = [{"model": "llama", "status": 200, "outcome": "answered"}]
        await rig.shows("llama", "200 answered")
        assert "no answer" not in rig.terminal.text


async def test_screen_shows_the_log_as_it_grows(monkeypatch, pipe, autojump_clock, tmp_path):
    log = tmp_path / "router.log"
    log.write_text("first line\n")
    async with running(monkeypatch, pipe, attached=True, log=log) as rig:
        rig.type("l")
        await rig.shows("first line")
        with log.open("a") as file:
            file.write("second \x1b[2J line\n")
        await rig.shows("second \\x1b[2J line")


@pytest.mark.parametrize(
    ("number", "end"),
    [(signal.SIGTERM, End.SIGNALLED), (signal.SIGHUP, End.HANGUP), (signal.SIGINT, End.USER)],
)
async def test_screen_signal_ends_it(monkeypatch, pipe, autojump_clock, number, end):
    async with running(monkeypatch, pipe) as rig:
        os.kill(os.getpid(), number)
        await rig.ended.wait()
        assert rig.end is end


async def test_screen_ctrl_z_and_its_signal_suspend_and_resize_paints(
    monkeypatch, pipe, autojump_clock
):
    async with running(monkeypatch, pipe) as rig:
        rig.type("\x1a")
        await rig.until(lambda: rig.terminal.suspended == 1)
        os.kill(os.getpid(), signal.SIGTSTP)
        await rig.until(lambda: rig.terminal.suspended == 2)
        rig.terminal.console.size = (60, 15)
        os.kill(os.getpid(), signal.SIGWINCH)
        await rig.until(lambda: len(rig.terminal.text.splitlines()) == 15)


async def test_screen_of_a_router_ignores_sigint_and_ends_as_the_router_stops(
    monkeypatch, pipe, autojump_clock
):
    async with running(monkeypatch, pipe, attached=True) as rig:
        assert rig.feed.patient is True
        os.kill(os.getpid(), signal.SIGINT)
        rig.type("\x1a")
        await rig.shows("would stop the router")
        rig.feed.lost(NoFeed("Connection refused"))
        await rig.shows("Connection refused")
        rig.feed.lost(GoingAway("the router is stopping"))
        await rig.ended.wait()
        assert rig.end is End.ROUTER_STOPS


async def test_screen_of_a_killed_router_ends(monkeypatch, pipe, autojump_clock):
    async with running(monkeypatch, pipe, attached=True) as rig:
        monkeypatch.setattr(module.os, "getppid", lambda: 1)
        await rig.ended.wait()
        assert rig.end is End.ROUTER_DIED


async def test_screen_closed_terminal_ends_it(monkeypatch, pipe, autojump_clock):
    async with running(monkeypatch, pipe) as rig:
        os.close(pipe[1])
        await rig.ended.wait()
        assert rig.end is End.HANGUP


async def test_screen_that_cannot_be_written_is_a_hangup(monkeypatch, pipe, autojump_clock):
    async with running(monkeypatch, pipe) as rig:

        def show(_: Any) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(rig.terminal, "show", show)
        await rig.ended.wait()
        assert rig.end is End.HANGUP


@pytest.mark.parametrize("newer", [False, True])
async def test_screen_without_a_usable_feed_never_takes_the_terminal(
    monkeypatch, autojump_clock, newer
):
    feed, terminal = FakeFeed(), FakeTerminal()
    monkeypatch.setattr(module, "FullScreen", lambda _: terminal)
    feed.failure = None if newer else NoFeed("Connection refused")
    if newer:
        monkeypatch.setattr(View, "take", _newer)
    shown: Any = feed
    with pytest.raises(NoFeed, match="newer" if newer else "refused"):
        await Screen(shown, View("http://router:8888")).run()
    assert terminal.text == ""


def _newer(*_: object) -> None:
    raise ValueError("the router is newer than this program")


async def test_screen_events_are_painted(monkeypatch, pipe, autojump_clock):
    async with running(monkeypatch, pipe) as rig:
        rig.feed.take(event(1, "something happened"))
        await rig.shows("something happened")
