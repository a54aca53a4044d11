"""Splits HTTP/2 input into pieces of few frames, and counts frames for rate limits.

Parses frame headers only (RFC 9113 4.1); h2 parses their content.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFACE = 24
"""Bytes of the client's connection preface, before the first frame."""

FRAMES_PER_PIECE = 32
"""Frames that h2 handles between checkpoints: one to two milliseconds."""

MAX_FRAME = 16384
"""Bytes of a frame's payload that are allowed (SETTINGS_MAX_FRAME_SIZE, its initial value)."""

_HEAD = 9
_DATA, _HEADERS, _RST_STREAM, _WINDOW_UPDATE = 0, 1, 3, 8
_PADDED = 8
_MAX_PADDING = 256


@dataclass(slots=True)
class Piece:
    """Some bytes, and the frames that begin in them.

    `updates` are window updates; `overhead` are frames that carry no request: PING, SETTINGS,
    PRIORITY, CONTINUATION, empty DATA and unknown ones. HEADERS and RST_STREAM have limits of
    their own.
    """

    data: bytes
    overhead: int = 0
    updates: int = 0
    overlong: bool = False
    """Whether a frame is too long: h2 would receive all of it, 16 MB, before it fails."""


class FrameCutter:
    """Follows one client's stream of frames."""

    def __init__(self) -> None:
        self._left = PREFACE
        self._head = b""

    def cut(self, data: bytes) -> list[Piece]:
        """Split `data` into pieces in which at most FRAMES_PER_PIECE frames begin."""
        pieces = []
        piece, start, position, frames = Piece(b""), 0, 0, 0
        size = len(data)
        while True:
            # The rest of the current frame, or of the preface.
            skipped = min(self._left, size - position)
            position += skipped
            self._left -= skipped
            if position == size:
                break
            missing = _HEAD - len(self._head)
            self._head += data[position : position + missing]
            position = min(size, position + missing)
            if len(self._head) < _HEAD:
                break
            head, self._head = self._head, b""
            self._left = int.from_bytes(head[:3], "big")
            piece.overlong = piece.overlong or self._left > MAX_FRAME
            _count(piece, head[3], head[4], self._left)
            frames += 1
            if frames == FRAMES_PER_PIECE:
                piece.data = data[start:position]
                pieces.append(piece)
                piece, start, frames = Piece(b""), position, 0
        if start < size:
            piece.data = data[start:]
            pieces.append(piece)
        return pieces


def _count(piece: Piece, kind: int, flags: int, length: int) -> None:
    if kind == _WINDOW_UPDATE:
        piece.updates += 1
    elif kind == _DATA:
        piece.overhead += not length or (bool(flags & _PADDED) and length <= _MAX_PADDING)
    elif kind not in (_HEADERS, _RST_STREAM):
        piece.overhead += 1
