"""Every fault of the simulated server, byte by byte."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import trio

from support.mock_memory import Mock, running_mock

PATH = "/v1/chat/completions"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 10}
STREAM = CHAT | {"stream": True}


async def outcome(mock: Mock, body: Any = CHAT, *headers: str) -> bytes | None:
    """All bytes until the server closes; None if it stays silent for an hour after them."""
    client = await mock.client()
    await client.send("POST", PATH, body, *headers)
    with trio.move_on_after(3600):
        return await client.everything()
    await client.aclose()
    return None


@pytest.mark.parametrize("how", ["switch", "header"])
@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_mock_fault_status_has_error_body(how, status, autojump_clock):
    async with running_mock() as mock:
        headers = ()
        if how == "switch":
            await mock.set(mode=status, retry_after=7)
        else:
            headers = (f"x-mock-mode: {status}", "x-mock-retry-after: 7")
        answer = await mock.ask("POST", PATH, CHAT, *headers)
        assert (answer.status, answer.json["error"]["code"]) == (status, status)
        assert answer["retry-after"] == "7"
        assert (await mock.stats())["failed"] == 1


async def test_mock_fault_retry_after_is_sent_only_if_requested(autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="503")
        assert (await mock.ask("POST", PATH, CHAT))["retry-after"] is None


@pytest.mark.parametrize("mode", ["reset", "close"])
async def test_mock_fault_connection_ends_before_any_byte(mode, autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode=mode)
        assert await outcome(mock) == b""


@pytest.mark.parametrize("mode", ["reset_reused", "close_reused"])
async def test_mock_fault_closes_reused_connections_only(mode, autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode=mode)
        client = await mock.client()
        assert (await client.ask("POST", PATH, CHAT)).status == 200
        await client.send("POST", PATH, CHAT)
        assert await client.everything() == b""
        assert (await mock.ask("POST", PATH, CHAT)).status == 200


async def test_mock_fault_hang_is_in_flight_until_client_disconnects(autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="hang")
        assert await outcome(mock) is None
        stats = await mock.stats()
        assert (stats["in_flight"], stats["aborted"]) == (0, 1)


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["plain", "stream"])
async def test_mock_fault_hang_after_head_sends_nothing_more(body, autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="hang_after_head")
        client = await mock.client()
        await client.send("POST", PATH, body)
        answer = await client.head()
        with trio.move_on_after(60) as waited:
            await client.rest(answer)
        assert waited.cancelled_caught
        assert (answer.status, answer.body, answer.chunks) == (200, b"", [])


@pytest.mark.parametrize("mode", ["midreset", "midclose"])
@pytest.mark.parametrize("token_delay", [0.0, 1.0])
async def test_mock_fault_stream_ends_after_given_tokens(mode, token_delay, autojump_clock):
    async with running_mock(token_delay=token_delay) as mock:
        await mock.set(mode=mode, after=3)
        client = await mock.client()
        await client.send("POST", PATH, STREAM)
        answer = await client.head()
        with pytest.raises(EOFError):
            await client.rest(answer)
        assert len(answer.events) == 1 + 3
        await trio.sleep(token_delay)  # the engine notices at the end of its step
        stats = await mock.stats()
        assert (stats["failed"], stats["running"], stats["in_flight"]) == (1, 0, 0)


async def test_mock_fault_stream_cut_after_no_token_has_head_only(autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="midclose", after=0)
        client = await mock.client()
        await client.send("POST", PATH, STREAM)
        await client.head()
        assert await client.everything() == b""


async def test_mock_fault_json_is_cut_in_half(autojump_clock):
    async with running_mock() as mock:
        whole = await mock.ask("POST", PATH, CHAT, "x-request-id: 1")
        await mock.set(mode="midclose")
        client = await mock.client()
        await client.send("POST", PATH, CHAT, "x-request-id: 1")
        head = await client.head()
        assert head["content-length"] == str(len(whole.body))
        assert len(await client.everything()) == len(whole.body) // 2


async def test_mock_fault_stream_falls_silent(autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="midhang", after=2)
        client = await mock.client()
        await client.send("POST", PATH, STREAM)
        answer = await client.head()
        with trio.move_on_after(60) as waited:
            await client.rest(answer)
        assert waited.cancelled_caught
        assert len(answer.events) == 1 + 2
        assert (await mock.stats())["in_flight"] == 1


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["plain", "stream"])
async def test_mock_fault_trickle_is_complete_in_the_end(body, autojump_clock):
    async with running_mock() as mock:
        whole = await mock.ask("POST", PATH, body, "x-request-id: 1")
        await mock.set(mode="trickle", trickle_ms=10)
        began = trio.current_time()
        answer = await mock.ask("POST", PATH, body, "x-request-id: 1")
        assert answer.body == whole.body
        assert trio.current_time() - began >= (len(whole.body) - 2) * 0.01


async def test_mock_fault_aborted_answer_looks_clean(autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="abort_finish", after=4)
        stream = await mock.ask("POST", PATH, STREAM)
        plain = await mock.ask("POST", PATH, CHAT)
    assert stream.events[-2]["choices"][0]["finish_reason"] == "abort"
    assert stream.events[-1] == "[DONE]"
    choice = plain.json["choices"][0]
    assert (choice["finish_reason"], plain.json["usage"]["completion_tokens"]) == ("abort", 4)
    assert choice["message"]["content"] == stream.text
    assert len(stream.text.split()) == 4


async def test_mock_fault_error_event_is_followed_by_done(autojump_clock):
    async with running_mock(token_delay=0.1) as mock:
        await mock.set(mode="error_event", after=4)
        stream = await mock.ask("POST", PATH, STREAM)
        plain = await mock.ask("POST", PATH, CHAT)
    assert stream.chunks[-2] == (
        b'data: {"error": {"message": "EngineCore encountered an issue. See stack trace (above) '
        b'for the root cause.", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
    )
    assert (len(stream.text.split()), stream.events[-1]) == (4, "[DONE]")
    assert (plain.status, len(plain.body)) == (500, 153)


@pytest.mark.parametrize("keep_open", [False, True])
async def test_mock_fault_raw_bytes_are_sent_unchanged(keep_open, autojump_clock):
    given = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhe\xff"
    async with running_mock() as mock:
        await mock.set(mode="raw", raw=base64.b64encode(given).decode(), keep_open=keep_open)
        client = await mock.client()
        await client.send("POST", PATH, CHAT)
        with trio.move_on_after(60) as waited:
            assert await client.everything() == given
        assert waited.cancelled_caught == keep_open


async def test_mock_fault_applies_to_next_requests_only(autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="500", next=2)
        statuses = [(await mock.ask("POST", PATH, CHAT)).status for _ in range(4)]
    assert statuses == [500, 500, 200, 200]


async def test_mock_fault_applies_to_fraction_of_requests(autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="500", fraction=0.25)
        statuses = [(await mock.ask("POST", PATH, CHAT)).status for _ in range(8)]
    assert statuses == [200, 200, 200, 500] * 2


async def test_mock_fault_applies_to_one_path(autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="500", only_path="/tokenize")
        assert (await mock.ask("POST", PATH, CHAT)).status == 200
        assert (await mock.ask("POST", "/tokenize", {"prompt": "x"})).status == 500


async def test_mock_fault_applies_to_bodies_with_given_text(autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="500", only_body="crash")
        assert (await mock.ask("POST", PATH, CHAT)).status == 200
        assert (await mock.ask("POST", PATH, CHAT | {"user": "crash"})).status == 500


async def test_mock_fault_header_for_other_server_is_ignored(autojump_clock):
    async with running_mock(name="m1") as mock:
        other = await mock.ask("POST", PATH, CHAT, "x-mock-mode: 500", "x-mock-only: m2")
        this = await mock.ask("POST", PATH, CHAT, "x-mock-mode: 500", "x-mock-only: m1")
    assert (other.status, this.status) == (200, 500)


async def test_mock_fault_headers_set_times_and_length_of_one_answer(autojump_clock):
    async with running_mock(ttft=9.0, token_delay=9.0) as mock:
        headers = ("x-mock-ttft-ms: 100", "x-mock-delay-ms: 10", "x-mock-output-tokens: 3")
        began = trio.current_time()
        answer = await mock.ask("POST", PATH, CHAT, *headers)
        assert trio.current_time() - began == pytest.approx(0.12)
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    assert answer.json["usage"]["completion_tokens"] == 3


async def test_mock_fault_invalid_header_is_refused(autojump_clock):
    async with running_mock() as mock:
        answer = await mock.ask("POST", PATH, CHAT, "x-mock-delay-ms: soon")
    assert answer.status == 400


@pytest.mark.parametrize(
    "switches",
    [{"mode": "nonsense"}, {"fraction": 2}, {"modus": "ok"}, {"after": "three"}, {"health": "ill"}],
)
async def test_mock_fault_invalid_switches_are_refused_and_change_nothing(switches, autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="500")
        assert (await mock.ask("POST", "/mock/set", switches)).status == 400
        assert (await mock.ask("POST", PATH, CHAT)).status == 500


@pytest.mark.parametrize(
    ("path", "switch", "count"),
    [
        ("/health", "health", "health_checks"),
        ("/metrics", "metrics", "scrapes"),
        ("/v1/models", "models", "model_lists"),
    ],
)
async def test_mock_fault_probes_have_their_own_switches(path, switch, count, autojump_clock):
    async with running_mock() as mock:
        await mock.set(**{switch: 503})
        assert (await mock.ask("GET", path)).status == 503
        assert (await mock.ask("POST", PATH, CHAT)).status == 200
        await mock.set(**{switch: 200, f"{switch}_delay_ms": 4000})
        began = trio.current_time()
        assert (await mock.ask("GET", path)).status == 200
        assert trio.current_time() - began == pytest.approx(4.0)
        await mock.set(**{switch: "close", f"{switch}_delay_ms": 0})
        with pytest.raises(EOFError):
            await mock.ask("GET", path)
        await mock.set(**{switch: "hang"})
        with trio.move_on_after(60) as waited:
            await mock.ask("GET", path)
        assert waited.cancelled_caught
        assert (await mock.stats())[count] == 4


async def test_mock_fault_gauges_can_be_falsified(autojump_clock):
    async with running_mock() as mock:
        await mock.set(gauge_running=7, gauge_waiting=3)
        assert await mock.gauge("num_requests_running") == 7
        assert await mock.gauge("num_requests_waiting") == 3
        await mock.ask("POST", "/mock/reset")
        assert await mock.gauge("num_requests_running") == 0


async def test_mock_fault_idle_connections_are_closed_on_demand(autojump_clock):
    async with running_mock() as mock:
        client = await mock.client()
        await client.ask("GET", "/health")
        assert (await mock.ask("POST", "/mock/close_idle")).json["closed"] >= 1
        assert await client.everything() == b""
