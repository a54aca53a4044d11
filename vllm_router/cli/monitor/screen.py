"""The monitor on a terminal: paint frames, read keys, restore the terminal."""

from __future__ import annotations

import enum
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from vllm_router.cli.monitor import controls
from vllm_router.cli.monitor.actions import Explain, Overlay, Quit, ReloadFile, SetDrain, Suspend
from vllm_router.cli.monitor.draw import draw, server_at, wants_requests
from vllm_router.cli.monitor.fullscreen import FullScreen
from vllm_router.cli.monitor.keys import Click, Key, decode
from vllm_router.cli.monitor.link import Feed, GoingAway, Message, NoFeed
from vllm_router.cli.monitor.log_file import last_lines
from vllm_router.cli.monitor.overlays import clamp_scroll
from vllm_router.cli.monitor.state import View
from vllm_router.errors import RouterError

if TYPE_CHECKING:
    from vllm_router.cli.router_client import RouterClient

FRAME = 0.05
"""Minimum seconds between two frames."""

TICK = 1.0
"""Maximum seconds between two frames, so that stale figures are marked."""

ESCAPE_TIME = 0.05
"""Seconds to wait for the rest of an escape sequence."""

PARENT_INTERVAL = 0.25
REQUESTS = 200
REQUESTS_INTERVAL = 2.0
"""Seconds between two readings of the last requests."""

LOG_LINES = 1000


class End(enum.IntEnum):
    """Why the monitor has ended; its exit code if it was started by a router."""

    USER = 0
    ROUTER_STOPS = 3
    ROUTER_DIED = 4
    SIGNALLED = 5
    HANGUP = 6


_ENDS = {
    signal.SIGINT: End.USER,
    signal.SIGTERM: End.SIGNALLED,
    signal.SIGHUP: End.HANGUP,
}


class Screen:
    """The monitor on this process's terminal."""

    def __init__(self, feed: Feed, view: View, log: Path | None = None) -> None:
        """`log` is the file of the router that has started this monitor."""
        self._feed = feed
        self._log = log
        self._terminal: FullScreen | None = None
        self._wanted = trio.Event()
        self._view = view
        self._changed = trio.Event()
        self._end = End.USER
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._parent = os.getppid()
        self._error: NoFeed | None = None
        self._explains = 0

    async def run(self) -> End:
        """Run until the user or a signal ends it. Raises NoFeed if no router answers at the start.

        The terminal is restored in any case.
        """
        view = self._view
        first = trio.Event()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._follow, first)
                    await nursery.start(self._signals)
                    # Paint only when there is data: earlier errors stay readable lines.
                    await first.wait()
                    descriptor = sys.stdin.fileno()
                    with FullScreen(descriptor) as self._terminal:
                        nursery.start_soon(self._keys, descriptor)
                        nursery.start_soon(self._read_requests)
                        if self._log is not None:
                            nursery.start_soon(self._read_log, self._log)
                        if view.attached:
                            nursery.start_soon(self._watch_parent)
                        await self._paint(self._terminal)
        finally:
            self._nursery = self._terminal = None
        if self._error is not None:
            raise self._error
        return self._end

    def _stop(self, end: End) -> None:
        self._end = end
        self._scope.cancel(reason=end.name)

    # -- tasks ----------------------------------------------------------------------------------

    async def _follow(self, first: trio.Event) -> None:
        view = self._view

        def take(message: Message) -> None:
            try:
                view.take(message, time.time())
            except ValueError as error:
                raise NoFeed(str(error)) from None
            if view.snapshot is not None:
                first.set()
            self._changed.set()

        def lost(error: NoFeed) -> None:
            view.lost(str(error))
            self._changed.set()
            if view.attached and isinstance(error, GoingAway):
                self._stop(End.ROUTER_STOPS)

        try:
            await self._feed.follow(take, lost, patient=view.attached)
        except NoFeed as error:
            self._error = error
            self._scope.cancel(reason="no feed")

    async def _paint(self, terminal: FullScreen) -> None:
        while True:
            width, height = terminal.console.size
            clamp_scroll(self._view, width - 4, height - 2)
            try:
                terminal.show(draw(self._view, width, height, time.time()))
            except OSError:  # the terminal has been closed
                self._stop(End.HANGUP)
            self._changed = trio.Event()
            with trio.move_on_after(TICK):
                await self._changed.wait()
            await trio.sleep(FRAME)

    async def _keys(self, descriptor: int) -> None:
        rest = b""
        while True:
            with trio.move_on_after(ESCAPE_TIME if rest else float("inf")) as patience:
                await trio.lowlevel.wait_readable(descriptor)
            if patience.cancelled_caught:
                rest = b""  # an Escape key by itself, without a function
                self._press("escape")
                continue
            try:
                data = os.read(descriptor, 1024)
            except OSError:  # the terminal has been closed
                data = b""
            if not data:
                self._stop(End.HANGUP)
                return
            keys, rest = decode(rest + data)
            for key in keys:
                self._press(key)

    def _press(self, key: Key) -> None:
        if isinstance(key, Click):
            self._click(key)
            return
        action = controls.press(self._view, key)
        self._changed.set()
        if self._view.overlay in (Overlay.REQUESTS, Overlay.LOG):
            self._wanted.set()
            self._wanted = trio.Event()
        if isinstance(action, Suspend):
            self._suspend()
        elif isinstance(action, Quit):
            self._stop(End.USER)
        elif action is not None and self._nursery is not None:
            self._nursery.start_soon(self._ask, action)

    def _click(self, click: Click) -> None:
        if self._terminal is not None:
            width, height = self._terminal.console.size
            controls.click(self._view, server_at(self._view, width, height, click.row))
            self._changed.set()

    def _suspend(self) -> None:
        if self._terminal is not None:
            self._terminal.suspend()
            self._changed.set()

    async def _ask(self, action: SetDrain | ReloadFile | Explain) -> None:
        """Perform an action at the router, and show the result."""
        view = self._view
        view.message = view.texts("asking")
        try:
            async with self._client() as router:
                match action:
                    case SetDrain(server, on):
                        await router.drain(server, on=on)
                        key = "done_drain" if on else "done_undrain"
                        view.message = view.texts(key, server=server)
                    case ReloadFile():
                        view.message = view.texts(f"done_reload_{await router.reload()}")
                    case Explain(model):
                        self._explains += 1
                        turn = self._explains
                        found = await router.explain(model, None)
                        if turn != self._explains:
                            return  # asked for another model meanwhile
                        view.explained = found
                        view.message = ""
                        view.show(Overlay.EXPLAINED)
        except RouterError as error:
            view.message = self._problem(error)
        self._changed.set()

    def _problem(self, error: RouterError) -> str:
        """What the user reads of it."""
        from vllm_router.cli.router_client import ErrorResponse

        texts = self._view.texts
        if isinstance(error, ErrorResponse):
            return texts.refusal(str(error), error.code, error.values)
        return texts.trouble(str(error))

    def _client(self) -> RouterClient:
        # Half of the start-up time; not needed for the first frame.
        from vllm_router.cli.router_client import RouterClient

        return RouterClient(self._feed.url, self._feed.key, self._feed.ca)

    async def _read_requests(self) -> None:
        """Read the last requests every few seconds while the screen has a place for them."""
        view = self._view
        while True:
            try:
                async with self._client() as router:
                    while True:
                        if self._wants_requests():
                            view.requests = await router.decisions(REQUESTS)
                            view.requests_problem = ""
                            self._changed.set()
                        await self._until_wanted(REQUESTS_INTERVAL)
            except RouterError as error:
                view.requests_problem = self._problem(error)
                self._changed.set()
            await self._until_wanted(REQUESTS_INTERVAL)

    def _wants_requests(self) -> bool:
        if self._terminal is None:
            return False
        return self._view.connected and wants_requests(
            self._view, self._terminal.console.size.height
        )

    async def _until_wanted(self, seconds: float) -> None:
        """Wait; not so long if a key opens what is read."""
        with trio.move_on_after(seconds):
            await self._wanted.wait()

    async def _read_log(self, log: Path) -> None:
        while True:
            if self._view.overlay is Overlay.LOG:
                self._view.log = last_lines(log, LOG_LINES)
                self._changed.set()
            await self._until_wanted(TICK)

    async def _signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        redraw = (signal.SIGWINCH, signal.SIGCONT)
        with trio.open_signal_receiver(*_ENDS, *redraw, signal.SIGTSTP) as received:
            task_status.started()
            async for number in received:
                if number in redraw:
                    self._changed.set()
                elif number == signal.SIGTSTP:
                    self._press("ctrl-z")
                elif number == signal.SIGINT and self._view.attached:
                    # The terminal also sends it to the router, which closes the feed when it stops.
                    continue
                else:
                    self._stop(_ENDS[signal.Signals(number)])

    async def _watch_parent(self) -> None:
        """Detect a router that was killed and cannot end its monitor."""
        while True:
            await trio.sleep(PARENT_INTERVAL)
            if os.getppid() != self._parent:
                self._stop(End.ROUTER_DIED)
