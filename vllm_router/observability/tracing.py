"""Distributed tracing (extra `otel`): one span per exchange, one per attempt.

The event loop only generates ids (W3C Trace Context, https://www.w3.org/TR/trace-context/) and
notes times; threads build and export the spans. Attributes follow OpenTelemetry's conventions for
HTTP and generative AI; of prompts and responses they contain only sizes.

Without the extra, or if tracing is not enabled, exchanges have no extra cost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from random import Random
from time import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import trio

from vllm_router import __version__
from vllm_router.config.log import LogSettings
from vllm_router.fleet.server import Server
from vllm_router.http.asgi_types import Scope
from vllm_router.observability.background_writer import BackgroundWriter
from vllm_router.observability.decisions import outcome_label
from vllm_router.observability.tally import failed
from vllm_router.proxy.headers import get_all
from vllm_router.proxy.record import Record
from vllm_router.proxy.retry import Outcome
from vllm_router.routing.paths import path_label

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanContext

LIMIT = 5_000
"""Queued exchanges whose spans are not built yet."""

CLOSE_TIME = 3.0
"""Seconds to export the last spans at the end."""

LONGEST = 256

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_RESPONSE_MODEL = re.compile(rb'"model": ?"([^"\\]{1,256})"')
_SAMPLED, _RANDOM = 1, 2
"""Flags of a `traceparent`; the second says that the trace id is random."""

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def running(settings: LogSettings) -> Iterator[Telemetry | None]:
    """The result of `start`, closed at the end."""
    telemetry = start(settings)
    try:
        yield telemetry
    finally:
        if telemetry is not None:
            telemetry.close()


def start(settings: LogSettings, environ: Mapping[str, str] | None = None) -> Telemetry | None:
    """Export spans as the environment says (OTLP over HTTP), if it or `settings` enables tracing.

    The caller closes the result. Returns None, with a warning, if the extra is not installed or a
    variable is wrong.
    """
    environ = os.environ if environ is None else environ

    def said(name: str) -> str:
        return environ.get(name, "").strip().lower()

    asked = settings.otel or any(environ.get(name) for name in _ENDPOINTS)
    if not asked or said("OTEL_SDK_DISABLED") == "true" or said("OTEL_TRACES_EXPORTER") == "none":
        return None
    try:
        _check(environ)
        provider = _provider()
    except ImportError as error:
        logger.warning(
            "tracing is disabled, a package is missing; in a clone: pip install '.[otel]' (%s)",
            error,
        )
        return None
    except ValueError as error:
        logger.warning("tracing is disabled, a variable of OpenTelemetry is wrong: %s", error)
        return None
    logger.info("exporting spans")
    return Telemetry(provider)


def _check(environ: Mapping[str, str]) -> None:
    """Raises ValueError for an endpoint that is no URL: the exporter would fail at each export."""
    for name in _ENDPOINTS:
        endpoint = environ.get(name)
        if endpoint and not re.match(r"https?://[^/]", endpoint, re.IGNORECASE):
            text = f'{name}: expected a URL like "http://collector:4318", got "{endpoint}"'
            raise ValueError(text)
    protocol = next((name for name in _PROTOCOLS if environ.get(name)), None)
    if protocol is not None and environ[protocol] != "http/protobuf":
        logger.warning(
            '%s: expected "http/protobuf", got "%s": spans are sent over HTTP, to which '
            "collectors usually listen at port 4318",
            protocol,
            environ[protocol],
        )


def _provider() -> TracerProvider:
    """Raises ImportError without the extra, and ValueError for a wrong variable."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "vllm-router"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class _Attempt:
    """One attempt; its span is built when the exchange has ended."""

    __slots__ = ("began", "ended", "outcome", "server", "span_id", "status")

    def __init__(self, server: Server, span_id: int, now: float) -> None:
        self.server, self.span_id, self.began = server, span_id, now
        self.ended: float | None = None
        self.outcome: Outcome | None = None
        self.status = 0


class ExchangeTrace:
    """Notes of one exchange; the `Trace` of its record."""

    __slots__ = (
        "_flags",
        "_ids",
        "_own",
        "attempts",
        "parent",
        "replaced",
        "response_model",
        "scheme",
    )

    def __init__(
        self, ids: Random, own: tuple[int, int], parent: Context | None, flags: int, scheme: str
    ) -> None:
        """`own` are the ids of the trace and of the exchange's span."""
        self._ids, self._own, self._flags = ids, own, flags
        self.parent, self.scheme = parent, scheme
        # `tracestate` has no meaning without a valid parent.
        self.replaced = _WITH_PARENT if parent is not None else _WITHOUT_PARENT
        self.attempts: list[_Attempt] = []
        self.response_model: str | None = None

    @property
    def sampled(self) -> bool:
        return bool(self._flags & _SAMPLED)

    @property
    def trace_id(self) -> str:
        return f"{self._own[0]:032x}"

    def attempt_started(self, server: Server, now: float) -> bytes:
        """The `traceparent` that makes the server's spans children of this attempt's span."""
        span_id = _new_id(self._ids, 64)
        self.attempts.append(_Attempt(server, span_id, now))
        return b"00-%032x-%016x-%02x" % (self._own[0], span_id, self._flags)

    def attempt_ended(self, outcome: Outcome | None, now: float) -> None:
        attempt = self.attempts[-1]
        attempt.outcome, attempt.ended = outcome, now

    def answered(self, status: int) -> None:
        self.attempts[-1].status = status

    def tail(self, tail: bytes) -> None:
        """Read the model name from the engine's response."""
        found = _RESPONSE_MODEL.search(tail)
        if found is not None:
            self.response_model = found[1].decode("utf-8", "replace")


_WITH_PARENT = frozenset({b"traceparent"})
_WITHOUT_PARENT = frozenset({b"traceparent", b"tracestate"})


class Telemetry:
    """The tracer of the proxy, and a recorder. Owns `provider`; `close` ends both."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.sdk.trace.id_generator import IdGenerator

        class Preset(IdGenerator):
            """Returns the ids generated on the event loop. Used in one thread."""

            trace_id = span_id = 0

            def generate_trace_id(self) -> int:
                return self.trace_id

            def generate_span_id(self) -> int:
                return self.span_id

            def is_trace_id_random(self) -> bool:
                return True

        self._provider = provider
        self._preset = Preset()
        provider.id_generator = self._preset  # type: ignore[assignment]  # inferred too narrowly
        self._tracer = provider.get_tracer("vllm_router", __version__)
        self._ids = Random()
        self._gatherer = BackgroundWriter("spans", LIMIT, self._build)
        # It would log a warning for each request of a client with a malformed `tracestate`.
        logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)

    # -- on the loop --------------------------------------------------------------------------

    def begin(self, scope: Scope) -> ExchangeTrace:
        """Continue the client's trace, or begin a new one."""
        from opentelemetry.sdk.trace.sampling import Decision

        headers = scope["headers"]
        given = [value for name, value in headers if name == b"traceparent"]
        span = _parent(given[0], get_all(headers, b"tracestate")) if len(given) == 1 else None
        if span is None:
            parent, trace_id, flags = None, _new_id(self._ids, 128), _RANDOM
        else:
            parent, trace_id, flags = _context(span), span.trace_id, span.trace_flags & _RANDOM
        decision = self._provider.sampler.should_sample(parent, trace_id, "exchange").decision
        if decision is Decision.RECORD_AND_SAMPLE:
            flags |= _SAMPLED
        own = (trace_id, _new_id(self._ids, 64))
        return ExchangeTrace(self._ids, own, parent, flags, scope.get("scheme", "http"))

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        """The trace contains the attempts."""

    def exchange_ended(self, record: Record) -> None:
        """Queue the exchange; its record must not change afterwards."""
        trace = record.trace
        if isinstance(trace, ExchangeTrace) and trace.sampled:
            self._gatherer.put((time() - trio.current_time(), record, trace))

    def close(self) -> None:
        """Build and export the queued spans, within CLOSE_TIME."""
        self._gatherer.close()
        # Exporting to a host that does not respond has no shorter timeout.
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(CLOSE_TIME)

    # -- in the thread ------------------------------------------------------------------------

    def _build(self, things: list[tuple[float, Record, ExchangeTrace]]) -> None:
        for offset, record, trace in things:
            self._exchange(offset, record, trace)

    def _exchange(self, offset: float, record: Record, trace: ExchangeTrace) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        def at(moment: float) -> int:
            return int((moment + offset) * 1e9)

        preset = self._preset
        preset.trace_id, preset.span_id = trace._own  # noqa: SLF001 (same module)
        path = path_label(record.path)
        route = path if path != "other" else ""
        span = self._tracer.start_span(
            f"{record.method} {route}".rstrip(),
            trace.parent if trace.parent is not None else Context(),
            SpanKind.SERVER,
            _exchange_attributes(record, route, trace.scheme),
            start_time=at(record.started_at),
        )
        if failed(record):
            span.set_status(Status(StatusCode.ERROR, record.code or outcome_label(record)))
        within = set_span_in_context(span, Context())
        for number, attempt in enumerate(trace.attempts):
            preset.span_id = attempt.span_id
            operation = _OPERATIONS.get(path)
            model = _model(record)
            child = self._tracer.start_span(
                f"{operation} {model}" if operation and model else record.method,
                within,
                SpanKind.CLIENT,
                _attempt_attributes(record, trace, number),
                start_time=at(attempt.began),
            )
            if attempt.outcome is not Outcome.ANSWERED and attempt.outcome is not None:
                child.set_status(Status(StatusCode.ERROR, attempt.outcome.value))
            elif attempt.status >= 400:
                child.set_status(StatusCode.ERROR)
            child.end(at(attempt.ended if attempt.ended is not None else record.ended_at))
        span.end(at(record.ended_at))


def _new_id(ids: Random, bits: int) -> int:
    """Never 0, which W3C Trace Context forbids."""
    return ids.getrandbits(bits) or 1


def _parent(given: bytes, state: bytes) -> SpanContext | None:
    """The client's span if its `traceparent` is valid (section 3.2), with its `tracestate`."""
    from opentelemetry.trace import SpanContext, TraceFlags, TraceState

    found = _TRACEPARENT.fullmatch(given.strip())
    if found is None or found[1] == b"ff" or (found[1] == b"00" and found[5]):
        return None
    trace_id, span_id = int(found[2], 16), int(found[3], 16)
    if not trace_id or not span_id:
        return None
    vendors = TraceState.from_header([state.decode("latin-1")]) if state else None
    return SpanContext(trace_id, span_id, True, TraceFlags(int(found[4], 16)), vendors)


def _context(span: SpanContext) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    return set_span_in_context(NonRecordingSpan(span), Context())


def _model(record: Record) -> str | None:
    return record.model[:LONGEST] if record.model is not None else None


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _exchange_attributes(record: Record, route: str, scheme: str) -> dict[str, Any]:
    """Attributes of a server span (HTTP conventions)."""
    wrong = failed(record) or record.status >= 500
    return _known(
        {
            "http.request.method": record.method,
            "url.path": record.path[:LONGEST].decode("latin-1"),
            "url.scheme": scheme,
            "http.route": route or None,
            "http.response.status_code": record.status or None,
            "http.request.body.size": record.bytes_in,
            "http.response.body.size": record.bytes_out,
            "client.address": record.client,
            "error.type": (record.code or outcome_label(record)) if wrong else None,
            "vllm_router.request_id": record.request_id.decode("latin-1"),
            "vllm_router.attempts": record.attempts,
            "vllm_router.outcome": outcome_label(record),
            "vllm_router.stream": record.stream,
            "vllm_router.time_to_first_byte": record.first_byte,
        }
    )


def _attempt_attributes(record: Record, trace: ExchangeTrace, number: int) -> dict[str, Any]:
    """Attributes of a client span (HTTP and GenAI conventions); usage of the last attempt."""
    attempt = trace.attempts[number]
    url = urlsplit(attempt.server.url)
    last = number == len(trace.attempts) - 1
    outcome = attempt.outcome
    error = None
    if outcome is not Outcome.ANSWERED:
        error = outcome.value if outcome is not None else Outcome.CLIENT_GONE.value
    elif attempt.status >= 400:
        error = str(attempt.status)
    return _known(
        {
            "gen_ai.operation.name": _OPERATIONS.get(path_label(record.path)),
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": _model(record),
            "gen_ai.response.model": trace.response_model if last else None,
            "gen_ai.usage.input_tokens": record.prompt_tokens if last else None,
            "gen_ai.usage.output_tokens": record.completion_tokens if last else None,
            "http.request.method": record.method,
            "http.request.resend_count": number or None,
            "http.response.status_code": attempt.status or None,
            "server.address": url.hostname,
            "server.port": url.port or (443 if url.scheme == "https" else 80),
            "error.type": error,
            "url.full": attempt.server.url + record.path[:LONGEST].decode("latin-1"),
            "vllm_router.server": attempt.server.name,
        }
    )
