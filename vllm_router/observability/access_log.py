"""The access log: one line per finished exchange, written by a background thread.

A text line is formatted on the event loop, where its values are in the CPU's cache: on another core
each value would have to be fetched while the thread holds the interpreter lock. JSON, which
includes the hashes of the prompt, is formatted in the thread.

Prompts, responses and headers other than the request id are never logged, so no API key is. Values
chosen by clients or servers are escaped and cut: they can neither forge a line nor fill a disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from vllm_router.fleet.server import Server
from vllm_router.http.http_error import HttpError
from vllm_router.observability.decisions import outcome_label
from vllm_router.observability.formatting import timestamp, visible
from vllm_router.observability.line_writer import LineWriter
from vllm_router.observability.tally import failed
from vllm_router.proxy.record import Phase, Record
from vllm_router.proxy.retry import Outcome
from vllm_router.routing.prompt.blocks import pack_hashes
from vllm_router.routing.prompt.routing_info import RoutingInfo

LONGEST = 256
"""Characters of a path or a model's name that are logged."""

LONGEST_METHOD = 20

NOTHING = "-"
"""Placeholder for values that a rejected request did not provide."""

_IS_PLAIN = re.compile(r"[^\s\"'=\\]+").fullmatch
"""Matches values that need no quotes."""


class Ended(NamedTuple):
    """A finished exchange: its end (Unix time), and its record."""

    at: float
    record: Record
    info: RoutingInfo | None
    trace_id: str | None = None


class AccessLog:
    """A recorder of the proxy. Costs about 3 µs per exchange.

    `writer` is None if there is no access log; `form` is text or json. Lines below the level
    `threshold` are skipped (successful exchanges are INFO, failed ones WARNING).
    """

    def __init__(self) -> None:
        self.writer: LineWriter | None = None
        self.threshold = logging.INFO
        self.form = "text"

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        """The exchange's record contains its attempts."""

    def exchange_ended(self, record: Record) -> None:
        """Queue the line. The record must not change afterwards."""
        writer = self.writer
        if writer is None or (self.threshold > logging.INFO and not self._loud(record)):
            return
        trace_id = record.trace.trace_id if record.trace is not None else None
        ended = Ended(time.time(), record, record.info, trace_id)
        writer.put((json_line, ended) if self.form == "json" else text_line(ended))

    def refused(self, refusal: HttpError, client: tuple[str, int] | None, line: bytes) -> None:
        """Log a request that was rejected by the HTTP parser, before an exchange began."""
        method, _, rest = line.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        self.exchange_ended(
            Record(
                started_at=0.0,
                ended_at=0.0,
                method=method[:LONGEST_METHOD].decode("latin-1") or NOTHING,
                path=path or NOTHING.encode(),
                client=client[0] if client is not None else NOTHING,
                request_id=refusal.request_id or NOTHING.encode(),
                phase=Phase.DONE,
                status=refusal.status,
                code=refusal.code,
            )
        )

    def _loud(self, record: Record) -> bool:
        return self.threshold <= logging.WARNING and failed(record)


def json_line(ended: Ended) -> str:
    """One JSON object without unknown values; characters that are not printable are escaped."""
    values = fields(ended)
    line = msgspec.json.encode(values).decode()
    return line if line.isprintable() else json.dumps(values).replace("\x7f", "\\u007f")


def text_line(ended: Ended) -> str:
    """`2026-01-31T12:00:00.000Z INFO access: POST /v1/... 200 answered server=a model=m ...`.

    The values of `fields` in the same order, except chunks and prefix; written out for speed.
    Values chosen by others go through `_plain` or `_shown`.
    """
    at, record, info, trace_id = ended
    took = record.ended_at - record.started_at
    level = "WARNING" if failed(record) else "INFO   "
    line = (
        f"{timestamp(at)} {level} access: {_plain(record.method)} "
        f"{_path(record.path[:LONGEST])} {record.status} {outcome_label(record)}"
    )
    if record.code:
        line += f" code={_shown(record.code)}"
    if record.server is not None:
        line += f" server={_shown(record.server.name)}"
    if record.owner is not None:
        line += f" owner={_shown(record.owner.name)}"
    if record.model is not None:
        line += f" model={_shown(record.model[:LONGEST])}"
    if record.served_model is not None:
        line += f" served_model={_shown(record.served_model)}"
    if record.policy:
        line += f" policy={record.policy}"
    line += f" stream={'yes' if record.stream else 'no'} attempts={record.attempts}"
    if record.retries:
        line += f" retries={','.join([reason.value for reason in record.retries])}"
    if record.waited:
        line += f" waited={record.waited:.3f}"
    if record.first_byte_at:
        line += f" ttft={record.first_byte_at - record.started_at:.3f}"
    line += f" started={timestamp(at - took)} duration={took:.3f}"
    line += f" bytes_in={record.bytes_in} bytes_out={record.bytes_out}"
    if record.prompt_tokens is not None:
        line += f" prompt_tokens={record.prompt_tokens}"
        if record.cached_tokens is not None:
            line += f" cached_tokens={record.cached_tokens}"
        if record.completion_tokens is not None:
            line += f" completion_tokens={record.completion_tokens}"
    # An unsuitable id has been replaced (http/request_ids.py).
    line += f" client={_shown(record.client)} request_id={record.request_id.decode('latin-1')}"
    if trace_id is not None:
        line += f" trace_id={trace_id}"
    if info is not None:
        if info.session is not None:
            line += f" session={_pseudonym(info.session)}"
        if info.prompt.size:
            line += f" prompt_bytes={info.prompt.size}"
    return line


# The same few names are logged again and again.


@lru_cache(maxsize=512)
def _shown(value: str) -> str:
    """A value, quoted if it could be read as several."""
    return visible(value if _IS_PLAIN(value) else json.dumps(value, ensure_ascii=False))


@lru_cache(maxsize=512)
def _plain(text: str) -> str:
    return visible(text)


@lru_cache(maxsize=512)
def _path(path: bytes) -> str:
    return visible(path.decode("latin-1"))


def fields(ended: Ended) -> dict[str, Any]:
    """The line's values by name.

    `time` is the end of the exchange, as in every log line, `started` the arrival of the request.
    Durations are in seconds.
    """
    at, record, info, trace_id = ended
    took = record.ended_at - record.started_at
    values: dict[str, Any] = {
        "time": timestamp(at),
        "level": "warning" if failed(record) else "info",
        "logger": "vllm_router.access",
        "method": record.method,
        "path": record.path[:LONGEST].decode("latin-1"),
        "status": record.status,
        "outcome": outcome_label(record),
    }
    if record.code:
        values["code"] = record.code
    if record.server is not None:
        values["server"] = record.server.name
    if record.owner is not None:
        values["owner"] = record.owner.name
    if record.model is not None:
        values["model"] = record.model[:LONGEST]
    if record.served_model is not None:
        values["served_model"] = record.served_model
    if record.policy:
        values["policy"] = record.policy
    values["stream"] = record.stream
    values["attempts"] = record.attempts
    if record.retries:
        values["retries"] = [reason.value for reason in record.retries]
    if record.waited:
        values["waited"] = round(record.waited, 6)
    if record.first_byte_at:
        values["ttft"] = round(record.first_byte_at - record.started_at, 6)
    values["started"] = timestamp(at - took)
    values["duration"] = round(took, 6)
    values["bytes_in"] = record.bytes_in
    values["bytes_out"] = record.bytes_out
    values["chunks"] = record.chunks
    if record.prompt_tokens is not None:
        values["prompt_tokens"] = record.prompt_tokens
        if record.cached_tokens is not None:
            values["cached_tokens"] = record.cached_tokens
        if record.completion_tokens is not None:
            values["completion_tokens"] = record.completion_tokens
    values["client"] = record.client
    values["request_id"] = record.request_id.decode("latin-1")
    if trace_id is not None:
        values["trace_id"] = trace_id
    if info is not None:
        if info.session is not None:
            # User names are often mail addresses: log a hash that distinguishes them.
            values["session"] = _pseudonym(info.session)
        if info.prompt.size:
            values["prompt_bytes"] = info.prompt.size
            values["prefix"] = pack_hashes(info.prompt.block_hashes)
    return values


def _pseudonym(name: str) -> str:
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).hexdigest()
