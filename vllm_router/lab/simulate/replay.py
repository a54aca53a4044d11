"""Traffic from the router's own access log: sizes, times and prefix hashes, no text.

One JSON object per line, in the order in which requests ended. Used are `started` (of arrival; RFC
3339 or Unix seconds; older logs have it in `time`), `prompt_bytes`, `prefix` (as `pack_hashes`
writes it), `prompt_tokens` and `completion_tokens`, `stream` and `session`; other keys are ignored,
and so are lines without a prompt, such as log lines between access lines.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import msgspec

from vllm_router.lab.simulate.text import TOKEN_BYTES, Pieces
from vllm_router.lab.simulate.traffic import Conversation, Turn
from vllm_router.routing.prompt.blocks import unpack_hashes

TYPICAL_OUTPUT = 200
"""Output tokens of a response whose length the log lacks."""


class Line(msgspec.Struct, gc=False):
    """The fields of one line that a replay uses."""

    started: float | datetime | None = None
    time: float | datetime = 0.0
    prompt_bytes: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prefix: str = ""
    stream: bool = True
    session: str | None = None


def read_log(lines: Iterable[bytes]) -> list[Conversation]:
    """The log's requests as conversations of one turn each, the first at 0.

    Raises ValueError with the number of the line that cannot be read.
    """
    decoder: Any = msgspec.json.Decoder(Line)
    found: list[Conversation] = []
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            line: Line = decoder.decode(raw)
            links = unpack_hashes(line.prefix)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ValueError(f"line {number}: {error}") from None
        if not line.prompt_bytes:
            continue
        # In the model a token is four bytes; the log's own count scales nothing but the output.
        text = Pieces(links, line.prompt_bytes // TOKEN_BYTES)
        session = line.session or str(number)
        turn = Turn(0.0, 0, line.completion_tokens or TYPICAL_OUTPUT)
        found.append(
            Conversation(
                zlib.crc32(session.encode()),
                _unix(line.time if line.started is None else line.started),
                text,
                0,
                iter([turn]),
                stream=line.stream,
            )
        )
    found.sort(key=lambda conversation: conversation.start)
    for conversation in reversed(found):
        conversation.start -= found[0].start
    return found


def _unix(time: float | datetime) -> float:
    return time.timestamp() if isinstance(time, datetime) else time
