"""The access log: one line for each finished exchange, made and written in another thread.

No prompt, no answer, no header but the request id, so never a key. What a client or server chose
is escaped and cut: it can neither forge a line nor fill a disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from typing import Any, NamedTuple

from vllm_router.fleet.server import Server
from vllm_router.log_writer import LineWriter
from vllm_router.logs import timestamp, visible
from vllm_router.proxy.record import Record
from vllm_router.routing.facts import Facts
from vllm_router.routing.pieces import pack_chain
from vllm_router.routing.retry import Outcome
from vllm_router.web.decisions import outcome_label
from vllm_router.web.tally import failed

LONGEST = 256
"""Characters of a path or a model's name that are logged."""

_PLAIN = re.compile(r"[^\s\"'=\\]+")


class Ended(NamedTuple):
    """A finished exchange: when it ended (Unix time), and what is known of it."""

    at: float
    record: Record
    facts: Facts | None
    trace_id: str | None = None


class AccessLog:
    """A Recorder of the proxy. Costs it about a microsecond per exchange.

    `writer` is None while there is no access log; `form` is text or json; lines of a level below
    `threshold` are left out (good exchanges are INFO, failed ones WARNING).
    """

    def __init__(self) -> None:
        self.writer: LineWriter | None = None
        self.threshold = logging.INFO
        self.form = "text"

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        """Told by the exchange's record."""

    def exchange_ended(self, record: Record) -> None:
        """Hand it to the thread. The record is not changed any more."""
        writer = self.writer
        if writer is None or (self.threshold > logging.INFO and not self._loud(record)):
            return
        make = json_line if self.form == "json" else text_line
        trace_id = record.trace.trace_id if record.trace is not None else None
        writer.put((make, Ended(time.time(), record, record.facts, trace_id)))

    def _loud(self, record: Record) -> bool:
        return self.threshold <= logging.WARNING and failed(record)


def json_line(ended: Ended) -> str:
    """One object, in ASCII; what is not known is left out."""
    return json.dumps(fields(ended)).replace("\x7f", "\\u007f")


def text_line(ended: Ended) -> str:
    """`2026-01-31T12:00:00.000Z INFO    access: POST /v1/... 200 answered server=a model=m ...`."""
    values = fields(ended)
    values.pop("prefix", None)  # too long to be read
    head = " ".join(str(values.pop(key)) for key in ("method", "path", "status", "outcome"))
    level = str(values.pop("level")).upper()
    for key in ("logger", "chunks"):
        values.pop(key)
    began = values.pop("time")
    pairs = " ".join(f"{key}={_shown(value)}" for key, value in values.items())
    return f"{began} {level:<7} access: {visible(head)} {pairs}"


def _shown(value: Any) -> str:
    """Quoted where it would be taken for more than one value."""
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3f}"
        case list():
            return ",".join(value)
        case str() if not _PLAIN.fullmatch(value):
            return visible(json.dumps(value, ensure_ascii=False))
    return visible(str(value))


def fields(ended: Ended) -> dict[str, Any]:
    """The line's values by name. `time` is when the request came; durations are in seconds."""
    at, record, facts, trace_id = ended
    took = record.ended_at - record.started_at
    first_byte = record.first_byte
    values: dict[str, Any] = {
        "time": timestamp(at - took),
        "level": "warning" if failed(record) else "info",
        "logger": "vllm_router.access",
        "method": record.method,
        "path": record.path[:LONGEST].decode("latin-1"),
        "status": record.status,
        "outcome": outcome_label(record),
        "code": record.code or None,
        "server": record.server.name if record.server is not None else None,
        "model": record.model[:LONGEST] if record.model is not None else None,
        "stream": record.stream,
        "attempts": record.attempts,
        "retries": [reason.value for reason in record.retries] or None,
        "ttft": round(first_byte, 6) if first_byte is not None else None,
        "duration": round(took, 6),
        "bytes_in": record.bytes_in,
        "bytes_out": record.bytes_out,
        "chunks": record.chunks,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "client": record.client,
        "key": record.key_name or None,
        "request_id": record.request_id.decode("latin-1"),
        "trace_id": trace_id,
    }
    if facts is not None:
        # Users are often called by their mail address: told apart, not named.
        session = facts.session
        values["session"] = _pseudonym(session) if session is not None else None
        values["prompt_bytes"] = facts.prompt.size or None
        values["prefix"] = pack_chain(facts.prompt.chain) or None
    return {key: value for key, value in values.items() if value is not None}


def _pseudonym(name: str) -> str:
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).hexdigest()
