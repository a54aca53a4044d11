"""Terminal input: raw mode, and decoding of keys and of the mouse."""

from __future__ import annotations

import contextlib
import re
import termios
from collections.abc import Iterator
from dataclasses import dataclass

_SEQUENCES = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1b[5~": "page-up",
    b"\x1b[6~": "page-down",
    b"\x1b[H": "home",
    b"\x1b[F": "end",
    b"\x1b[1~": "home",
    b"\x1b[4~": "end",
    # Sent by some terminals in application mode.
    b"\x1bOA": "up",
    b"\x1bOB": "down",
    b"\x1bOH": "home",
    b"\x1bOF": "end",
}
_CONTROLS = {
    0x03: "ctrl-c",
    0x04: "ctrl-d",
    0x08: "backspace",
    0x7F: "backspace",
    0x0A: "enter",
    0x0C: "redraw",
    0x0D: "enter",
    0x1A: "ctrl-z",
}
_LEGACY_MOUSE = b"\x1b[M"
"""Begins a mouse event of terminals without SGR mode; three bytes follow."""

_MODIFIERS = 4 | 8 | 16
"""Shift, meta and control in the button of a mouse event."""


@dataclass(frozen=True, slots=True)
class Click:
    """The left button was pressed in this cell of the screen, counted from 0."""

    column: int
    row: int


Key = str | Click


def decode(data: bytes) -> tuple[list[Key], bytes]:
    """The keys in `data`, and a possible beginning of a further one.

    A key is its character or a name: `up`, `page-down`, `ctrl-c`, `wheel-up`. Unknown sequences are
    dropped.
    """
    keys: list[Key] = []
    while data:
        if data[0] == 0x1B:
            length = _sequence_length(data)
            if length is None:
                return keys, data
            key: Key = _SEQUENCES.get(data[:length]) or _mouse(data[:length])
        else:
            length = _character_length(data[0])
            if len(data) < length:
                return keys, data
            key = _CONTROLS.get(data[0]) or data[:length].decode(errors="replace")
        if key:
            keys.append(key)
        data = data[length:]
    return keys, b""


def _sequence_length(data: bytes) -> int | None:
    """The length of the escape sequence at the start (ECMA-48, 5.4); None if it is incomplete."""
    if len(data) == 1:
        return None
    if data[1:2] == b"O":
        return 3 if len(data) >= 3 else None
    if data[1:2] != b"[":
        return 1
    if data[:3] == _LEGACY_MOUSE:
        return 6 if len(data) >= 6 else None
    for at, byte in enumerate(data[2:], 3):
        if 0x40 <= byte <= 0x7E:
            return at
    return None


def _mouse(sequence: bytes) -> Key:
    """The key of a mouse event (xterm's SGR mode, 1006); empty for others."""
    found = re.fullmatch(rb"\x1b\[<(\d{1,4});(\d{1,5});(\d{1,5})M", sequence)
    if found is None:
        return ""
    button, column, row = map(int, found.groups())
    match button & ~_MODIFIERS:
        case 0:
            return Click(column - 1, row - 1)
        case 64:
            return "wheel-up"
        case 65:
            return "wheel-down"
        case _:
            return ""


def _character_length(first: int) -> int:
    """The length of a UTF-8 character, by its first byte."""
    return 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC0 else 1


@contextlib.contextmanager
def raw_input(descriptor: int) -> Iterator[None]:
    """Read keys unbuffered and without echo, Ctrl-C as a byte; restores the modes at the end.

    Output processing stays on: a line feed still begins a line.
    """
    before = termios.tcgetattr(descriptor)
    modes = termios.tcgetattr(descriptor)
    modes[0] &= ~(termios.IXON | termios.ICRNL)
    modes[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
    modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
    termios.tcsetattr(descriptor, termios.TCSAFLUSH, modes)
    try:
        yield
    finally:
        # The terminal may have been closed.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
