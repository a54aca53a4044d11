"""Trace context passes unchanged; with the extra `otel`, exchanges have spans."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Sampler
from opentelemetry.trace import SpanKind, StatusCode

from support.proxy_harness import Rig, lab
from support.scripted_server import Talk, answer, answering, chunk, event, ok, sse_head
from vllm_router.config.log import LogSettings
from vllm_router.observability import tracing as telemetry
from vllm_router.observability.tracing import Telemetry

PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATE = b"vendor=t61rcWkgMzE"
JSON = (b"content-type", b"application/json")
USAGE = b'"model":"m-8b","usage":{"prompt_tokens":12,"completion_tokens":30}'


class Traced:
    """A rig whose exchanges are traced."""

    def __init__(self, rig: Rig, sampler: Sampler | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=sampler) if sampler else TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.telemetry = Telemetry(provider)
        rig.context.tracer = self.telemetry
        rig.context.recorder.recorders += (self.telemetry,)

    def spans(self) -> list[ReadableSpan]:
        """All spans, in the order of their start."""
        assert self.telemetry._gatherer.flush()
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def exchange(self) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """The span of the one exchange, and the spans of its attempts."""
        (server,) = (span for span in self.spans() if span.kind is SpanKind.SERVER)
        attempts = [span for span in self.spans() if span.kind is SpanKind.CLIENT]
        for span in attempts:
            assert span.parent is not None
            assert span.parent.span_id == server.context.span_id
            assert span.context.trace_id == server.context.trace_id
            assert server.start_time <= span.start_time <= span.end_time <= server.end_time
        return server, attempts


@asynccontextmanager
async def traced(
    *scripts: Any, sampler: Sampler | None = None
) -> AsyncIterator[tuple[Rig, Traced]]:
    async with lab(*scripts) as rig:
        traced = Traced(rig, sampler)
        try:
            yield rig, traced
        finally:
            traced.telemetry.close()


def sent(rig: Rig, name: bytes, server: str = "a") -> list[bytes]:
    """The values of a header in the last request of a server."""
    head = bytes(rig.scripted[server].requests[-1].head).lower()
    return re.findall(rb"\r\n" + name + rb": ([^\r]*)", head)


# -- without spans ------------------------------------------------------------------------------


async def test_telemetry_trace_context_passes_unchanged(autojump_clock):
    async with lab(answering(ok(b'{"a":1}'))) as rig:
        await rig.post(headers=(JSON, (b"traceparent", PARENT), (b"tracestate", STATE)))
        assert sent(rig, b"traceparent") == [PARENT]
        assert sent(rig, b"tracestate") == [STATE.lower()]


@pytest.mark.parametrize(
    ("settings", "environ"),
    [
        (LogSettings(), {}),
        (LogSettings(), {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}),
        (LogSettings(otel=True), {"OTEL_SDK_DISABLED": "true"}),
    ],
)
def test_telemetry_exports_nothing_unless_configured(
    settings: LogSettings, environ: dict[str, str]
):
    assert telemetry.start(settings, environ) is None


def test_telemetry_disabled_does_not_load_opentelemetry():
    script = (
        "import sys; from vllm_router.observability import tracing; "
        "from vllm_router.runtime import serve; "
        "from vllm_router.config.log import LogSettings; tracing.start(LogSettings(), {}); "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_telemetry_missing_extra_is_reported_and_harmless(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert telemetry.start(LogSettings(otel=True), {}) is None
    assert "pip install '.[otel]'" in caplog.text


def test_telemetry_environment_or_configuration_enables_spans(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    for settings, environ in (
        (LogSettings(otel=True), {}),
        (LogSettings(), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}),
    ):
        started = telemetry.start(settings, environ)
        assert started is not None
        assert started._provider.resource.attributes["service.name"] == "vllm-router"
        started.close()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1", "max_queue_size"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318", 'expected a URL like "http://'),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://", 'expected a URL like "http://'),
    ],
)
def test_telemetry_bad_variable_is_reported_and_harmless(
    monkeypatch: pytest.MonkeyPatch, caplog, name: str, value: str, reason: str
):
    monkeypatch.setenv(name, value)
    assert telemetry.start(LogSettings(otel=True)) is None
    (record,) = [one for one in caplog.records if one.name == telemetry.logger.name]
    assert "tracing is disabled" in record.message
    assert reason in record.message


def test_telemetry_other_protocol_is_reported(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    started = telemetry.start(LogSettings(otel=True))
    assert started is not None
    assert 'OTEL_EXPORTER_OTLP_PROTOCOL: expected "http/protobuf", got "grpc"' in caplog.text
    started.close()


def test_telemetry_no_exporter_exports_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert telemetry.start(LogSettings(otel=True)) is None


@pytest.mark.parametrize(
    ("name", "value", "service"),
    [
        ("OTEL_SERVICE_NAME", "", "vllm-router"),
        ("OTEL_SERVICE_NAME", "front", "front"),
        ("OTEL_RESOURCE_ATTRIBUTES", "peer.service.name=x", "vllm-router"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=b, service.name=front", "front"),
    ],
)
def test_telemetry_service_has_name_of_environment_or_own(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, service: str
):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    started = telemetry.start(LogSettings(otel=True))
    assert started is not None
    assert started._provider.resource.attributes["service.name"] == service
    started.close()


# -- spans --------------------------------------------------------------------------------------


async def test_telemetry_exchange_and_attempt_have_spans(autojump_clock):
    async with traced(answering(ok(b"{" + USAGE + b"}"))) as (rig, made):
        await rig.post({"model": "m"})
        server, (attempt,) = made.exchange()
    assert server.name == "POST /v1/chat/completions"
    assert server.parent is None
    assert server.status.status_code is StatusCode.UNSET
    assert {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "client.address": "192.0.2.1",
        "vllm_router.attempts": 1,
        "vllm_router.outcome": "answered",
    }.items() <= dict(server.attributes).items()
    assert attempt.name == "chat m"
    assert dict(attempt.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m-8b",
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 30,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": "a.test",
        "server.port": 1,
        "url.full": "http://a.test:1/v1/chat/completions",
        "vllm_router.server": "a",
    }


async def test_telemetry_server_gets_span_of_attempt_as_parent(autojump_clock):
    async with traced(answering(ok(b'{"a":1}'))) as (rig, made):
        await rig.post(headers=(JSON, (b"traceparent", PARENT), (b"tracestate", STATE)))
        server, (attempt,) = made.exchange()
        (forwarded,) = sent(rig, b"traceparent")
        assert sent(rig, b"tracestate") == [STATE.lower()]
    assert forwarded == (
        f"00-{attempt.context.trace_id:032x}-{attempt.context.span_id:016x}-01".encode()
    )
    assert f"{server.context.trace_id:032x}".encode() in PARENT
    assert f"{server.parent.span_id:016x}".encode() in PARENT
    assert server.context.trace_state.get("vendor") == "t61rcWkgMzE"


@pytest.mark.parametrize(
    "given",
    [
        b"junk",
        b"ff" + PARENT[2:],
        b"00-" + b"0" * 32 + PARENT[35:],
        PARENT[:36] + b"0" * 16 + b"-01",
        PARENT + b"-more",
    ],
)
async def test_telemetry_invalid_trace_context_starts_new_trace(autojump_clock, given):
    async with traced(answering(ok(b'{"a":1}'))) as (rig, made):
        await rig.post(headers=(JSON, (b"traceparent", given), (b"tracestate", STATE)))
        server, _ = made.exchange()
        assert sent(rig, b"tracestate") == []
        assert len(sent(rig, b"traceparent")) == 1
    assert server.parent is None


async def test_telemetry_two_parents_start_new_trace(autojump_clock):
    other = PARENT.replace(b"0af7", b"1af7")
    async with traced(answering(ok(b'{"a":1}'))) as (rig, made):
        await rig.post(headers=(JSON, (b"traceparent", PARENT), (b"traceparent", other)))
        server, _ = made.exchange()
        assert len(sent(rig, b"traceparent")) == 1
    assert server.parent is None


async def test_telemetry_tracestate_of_several_headers_is_joined(autojump_clock):
    states = ((b"tracestate", b"a=1"), (b"tracestate", b"b=2"))
    async with traced(answering(ok(b'{"a":1}'))) as (rig, made):
        await rig.post(headers=(JSON, (b"traceparent", PARENT), *states))
        server, _ = made.exchange()
        assert sent(rig, b"tracestate") == [b"a=1", b"b=2"]
    assert list(server.context.trace_state.items()) == [("a", "1"), ("b", "2")]


async def test_telemetry_malformed_tracestate_keeps_parent_and_logs_nothing(autojump_clock, caplog):
    async with traced(answering(ok(b'{"a":1}'))) as (rig, made):
        await rig.post(headers=(JSON, (b"traceparent", PARENT), (b"tracestate", b"=;=")))
        server, _ = made.exchange()
    assert server.parent is not None
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("given", "forwarded"),
    [
        (PARENT, b"01"),
        (PARENT[:-2] + b"03", b"03"),
        (PARENT[:-2] + b"ff", b"03"),
        (PARENT[:-2] + b"02", b"02"),
        (b"cc" + PARENT[2:] + b"-later", b"01"),
        (b"", b"03"),
    ],
)
async def test_telemetry_flags_sampled_and_random_are_kept(
    autojump_clock, given: bytes, forwarded: bytes
):
    """Bits without a meaning are not forwarded; our own trace ids are random."""
    headers = (JSON, (b"traceparent", given)) if given else (JSON,)
    async with traced(answering(ok(b'{"a":1}'))) as (rig, _):
        await rig.post(headers=headers)
        (field,) = sent(rig, b"traceparent")
    assert field[:3] == b"00-"
    assert field[-2:] == forwarded


async def test_telemetry_error_status_of_server_is_error_of_attempt_alone(autojump_clock):
    async with traced(answering(answer(400, b"{}"))) as (rig, made):
        await rig.post({"model": "m"})
        server, (attempt,) = made.exchange()
    assert attempt.attributes["error.type"] == "400"
    assert attempt.status.status_code is StatusCode.ERROR
    assert "error.type" not in server.attributes
    assert server.status.status_code is StatusCode.UNSET


async def test_telemetry_scheme_is_the_one_of_the_connection(autojump_clock):
    async with traced(answering(ok(b'{"a":1}'))) as (rig, made):
        client = rig.client({"model": "m"})
        client._scope["scheme"] = "https"
        await client.run()
        server, _ = made.exchange()
    assert server.attributes["url.scheme"] == "https"


async def test_telemetry_every_attempt_has_span_with_error(autojump_clock):
    async with traced(answering(answer(500, b"{}")), answering(ok(b'{"a":1}'))) as (rig, made):
        rig.prefer("a")
        await rig.post({"model": "m"})
        server, (first, second) = made.exchange()
        assert sent(rig, b"traceparent", "a") != sent(rig, b"traceparent", "b")
    assert server.attributes["vllm_router.attempts"] == 2
    assert server.status.status_code is StatusCode.UNSET
    assert first.attributes["error.type"] == "server_error"
    assert first.attributes["http.response.status_code"] == 500
    assert first.status.status_code is StatusCode.ERROR
    assert second.attributes["http.request.resend_count"] == 1
    assert "error.type" not in second.attributes


async def test_telemetry_refused_exchange_has_span_without_attempts(autojump_clock):
    async with traced(answering(ok(b'{"a":1}'))) as (rig, made):
        rig.server("a").catalog.names = {"m": None}
        await rig.post({"model": "nope"})
        server, attempts = made.exchange()
    assert attempts == []
    assert server.attributes["http.response.status_code"] == 404
    assert server.status.status_code is StatusCode.UNSET


async def silent_after_one_event(talk: Talk) -> None:
    await talk.request()
    await talk.send(sse_head(), chunk(event("hi")))
    await trio.sleep(5)


async def test_telemetry_client_disconnect_ends_both_spans(autojump_clock):
    async with traced(silent_after_one_event) as (rig, made):
        client = rig.start_stream()
        await client.heard.wait()
        client.leave()
        await rig.settled()
        server, (attempt,) = made.exchange()
    assert server.attributes["vllm_router.outcome"] == "client_gone"
    assert attempt.attributes["error.type"] == "client_gone"


async def test_telemetry_unsampled_span_is_not_built_and_is_propagated(autojump_clock):
    async with traced(answering(ok(b'{"a":1}')), sampler=ALWAYS_OFF) as (rig, made):
        await rig.post()
        assert made.spans() == []
        assert sent(rig, b"traceparent")[0].endswith(b"-02")


async def test_telemetry_spans_contain_no_prompt_answer_or_key(autojump_clock):
    async with traced(answering(ok(b'{"text":"SECRET",' + USAGE + b"}"))) as (rig, made):
        await rig.post(
            {"model": "m", "prompt": "SECRET"},
            query=b"key=SECRET",
            headers=(JSON, (b"authorization", b"Bearer SECRET")),
        )
        assert len(made.spans()) == 2
        assert all("SECRET" not in span.to_json() for span in made.spans())
