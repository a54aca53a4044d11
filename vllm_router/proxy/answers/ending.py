"""The last events of a stream: whether the answer is complete, its error, and its token counts.

Only the end is decoded: the pieces in between are passed on unread, since reading each would cost
as much as passing it on.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from vllm_router.proxy.answers.events import DONE, NOT_JSON, Event, blocks_of, decode_event
from vllm_router.proxy.answers.faults import fault_of
from vllm_router.proxy.answers.opening import FAULTS, Verdict
from vllm_router.proxy.answers.quick import finished_usage
from vllm_router.proxy.answers.signs import ABORTS, ENDS, FAILS, FINISHES, OPENS, UNKNOWN, Signs
from vllm_router.proxy.answers.tables import CHUNKED, Api, read_event
from vllm_router.proxy.answers.usage import Usage, UsageScanner, usage_of

_NAME = re.compile(
    rb'(?:^|[\r\n])(?:event: ?([\w.]+)|data: ?\{\s*"type"\s*:\s*"([\w.]+)")', re.ASCII
)

LAST_EVENTS = 8
"""Events from the end that are decoded, at most."""


class Ending(NamedTuple):
    verdict: Verdict
    usage: Usage | None


def read_ending(api: Api, tail: bytes, *, beginning: bytes | None = None) -> Ending:
    """The verdict and the usage by the end of a complete, readable stream.

    `tail` holds at least the last event and should hold the last few. If it begins with the end of
    an event that was too long to be kept, `beginning` has the first bytes of that: then what comes
    before the first boundary is read by the event's name alone.
    """
    found = finished_usage(tail)
    if found is not None:
        return Ending(Verdict.PROVEN, found[0])
    # The rest of a cut event may begin with a colon or a line end, which would mean something else.
    blocks, pending = _split(tail if beginning is None else b"." + tail)
    cut = blocks.pop(0) if beginning is not None and blocks else None
    half = False
    if pending and not pending.startswith(b":"):
        last = decode_event(pending.rstrip(b"\r\n"))
        half = last.payload is NOT_JSON or last.payload is None
        if not half:
            blocks.append(pending)
    usage: Usage | None = None
    seen: Signs = OPENS
    open_choices: dict[Any, bool] = {}
    for block in blocks[: -LAST_EVENTS - 1 : -1]:
        event = decode_event(block)
        signs = read_event(api, event)
        if usage is None:
            usage = _usage_in(event)
        if signs & FAILS:
            return Ending(FAULTS[fault_of(event.payload)], usage)
        if signs & ABORTS:
            return Ending(Verdict.CUT, usage)
        seen |= signs
        _note_choices(event, open_choices)
        if signs & FINISHES and seen & ENDS:
            break
    else:
        if cut is not None and beginning is not None and len(blocks) < LAST_EVENTS:
            signs = _signs_of_cut(api, beginning)
            usage = usage or _usage_at_end(cut)
            if signs & FAILS:
                return Ending(Verdict.UNCLEAR, usage)
            if signs & ABORTS:
                return Ending(Verdict.CUT, usage)
            seen |= signs
    return Ending(_verdict(seen, half=half, unfinished=any(open_choices.values())), usage)


def _signs_of_cut(api: Api, beginning: bytes) -> Signs:
    """What a long event says by its name; a chunk has none, and says nothing."""
    found = _NAME.search(beginning)
    if found is None or api in CHUNKED:
        return OPENS
    name = (found[1] or found[2]).decode()
    return read_event(api, Event(name, b"", {"type": name})) & ~UNKNOWN


def _usage_at_end(cut: bytes) -> Usage | None:
    scanner = UsageScanner()
    scanner.feed(cut)
    return scanner.usage


def _verdict(seen: Signs, *, half: bool, unfinished: bool) -> Verdict:
    if seen & ENDS:
        return Verdict.PROVEN
    if half:
        return Verdict.UNFINISHED
    if seen & UNKNOWN:
        return Verdict.UNJUDGED
    return Verdict.PROVEN if seen & FINISHES and not unfinished else Verdict.UNFINISHED


def _split(tail: bytes) -> tuple[list[bytes], bytes]:
    if b"\r" in tail or b"\n:" in tail or tail.startswith(b":"):
        return blocks_of(tail)
    *blocks, pending = tail.split(b"\n\n")
    return [block for block in blocks if block], pending


def _note_choices(event: Event, open_choices: dict[Any, bool]) -> None:
    """Note for each choice of a chunk whether its last event, the first seen, finished it."""
    payload = event.payload
    if not isinstance(payload, dict):
        return
    choices = payload.get("choices")
    if not isinstance(choices, list):
        return
    for choice in choices:
        if isinstance(choice, dict):
            index = choice.get("index")
            if isinstance(index, int):
                open_choices.setdefault(index, not choice.get("finish_reason"))


def _usage_in(event: Event) -> Usage | None:
    payload = event.payload
    if payload is DONE or not isinstance(payload, dict):
        return None
    usage = usage_of(payload.get("usage"))
    if usage is not None:
        return usage
    inner = payload.get("response") or payload.get("message")
    return usage_of(inner.get("usage")) if isinstance(inner, dict) else None
