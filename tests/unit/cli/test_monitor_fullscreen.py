"""The terminal is restored by whatever ends the monitor, and given back while it is suspended."""

from __future__ import annotations

import contextlib
import os
import pty
import termios
from collections.abc import Callable, Iterator
from typing import IO, Any

import pytest
from rich.text import Text

from vllm_router.cli.monitor import attached
from vllm_router.cli.monitor.fullscreen import RESET, FullScreen

ON = ("\x1b[?1049h", "\x1b[?25l", "\x1b[?1000h", "\x1b[?1006h")
OFF = ("\x1b[?1049l", "\x1b[?25h", "\x1b[?1000l", "\x1b[?1006l")


class Pty:
    """A terminal, and what was written to it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        os.set_blocking(self.master, False)
        self.output: IO[str] | None = None

    def full_screen(self, stop: Callable[[], None] = lambda: None) -> FullScreen:
        return FullScreen(self.slave, stop, self.output)

    def read(self) -> str:
        """What was written since the last reading."""
        found = b""
        try:
            while data := os.read(self.master, 65536):
                found += data
        except BlockingIOError:
            pass
        return found.decode()

    def hang_up(self) -> None:
        """Close the side that shows what is written."""
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, self.master)
        os.close(null)

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.slave)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pty]:
    opened = Pty()
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.suppress(OSError), os.fdopen(os.dup(opened.slave), "w") as opened.output:
        yield opened  # closing it fails on a terminal that was closed
    os.close(opened.master)
    os.close(opened.slave)


def test_full_screen_sets_modes_and_restores_them(terminal: Pty):
    before = terminal.modes()
    with terminal.full_screen() as shown:
        shown.show(Text("a frame"))
        assert terminal.modes() != before
        written = terminal.read()
        assert all(mode in written for mode in (*ON, "a frame"))
        assert not any(mode in written for mode in OFF)
    written = terminal.read()
    assert all(mode in written for mode in OFF)
    assert terminal.modes() == before
    shown.show(Text("late"))  # after the end: nothing
    assert terminal.read() == ""


def test_full_screen_is_restored_after_a_defect(terminal: Pty):
    before = terminal.modes()
    with pytest.raises(ZeroDivisionError), terminal.full_screen():
        raise ZeroDivisionError
    written = terminal.read()
    assert all(mode in written for mode in OFF)
    assert terminal.modes() == before


def test_full_screen_of_a_closed_terminal_ends_without_an_error(terminal: Pty):
    with terminal.full_screen() as shown:
        terminal.hang_up()
        with pytest.raises(OSError, match="Input/output error"):
            shown.show(Text("a frame\n" * 2000))


def test_full_screen_suspended_gives_the_terminal_back_meanwhile(terminal: Pty):
    before = terminal.modes()

    def stop() -> None:
        assert terminal.modes() == before
        written = terminal.read()
        assert all(mode in written for mode in OFF)

    with terminal.full_screen(stop) as shown:
        terminal.read()
        shown.suspend()
        assert terminal.modes() != before
        written = terminal.read()
        assert all(mode in written for mode in ON)
        shown.show(Text("again"))
        assert "again" in terminal.read()
    assert terminal.modes() == before


def test_full_screen_size_in_the_environment_does_not_hide_a_resize(
    terminal: Pty, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "33")
    monkeypatch.setenv("LINES", "7")
    assert terminal.full_screen().console.size != (33, 7)


def test_modes_of_a_killed_monitor_are_undone(terminal: Pty):
    modes = attached._modes(terminal.slave)
    assert modes is not None
    killed = terminal.full_screen()
    killed.__enter__()
    terminal.read()
    attached._restore(terminal.slave, modes)
    assert RESET in terminal.read()
    assert terminal.modes() == modes
    killed.__exit__(None, None, None)


def test_modes_of_no_terminal_are_none():
    read, write = os.pipe()
    assert attached._modes(read) is None
    attached._restore(write, [0, 0, 0, 0, 0, 0, []])
    os.close(read)
    os.close(write)
