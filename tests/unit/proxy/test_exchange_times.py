"""The times that an exchange reports of a server, and the waits that are evidence against it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.proxy_harness import Rig, lab
from support.scripted_server import Script, Talk, answer, answering, ok, silent

GOOD = ok(b'{"choices":[{"text":"a","finish_reason":"stop"}]}')
DOUBTFUL = ok(b'{"choices":[{"text":"","finish_reason":"stop"}],"usage":{"completion_tokens":0}}')


def after(seconds: float, reply: bytes) -> Script:
    async def script(talk: Talk) -> None:
        while True:
            await talk.request()
            await trio.sleep(seconds)
            await talk.send(reply)

    return script


def reported(rig: Rig, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[tuple[str, Any]]:
    """Calls of these methods of the fleet, with their last positional argument."""
    calls: list[tuple[str, Any]] = []
    for name in names:
        before = getattr(rig.fleet, name)

        def note(*given: Any, name: str = name, before: Any = before, **more: Any) -> Any:
            calls.append((name, given[-1]))
            return before(*given, **more)

        monkeypatch.setattr(rig.fleet, name, note)
    return calls


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        (GOOD, "record_success"),
        (answer(400, b"{}"), "record_error"),
        (answer(500, b"{}"), "record_error"),
        (answer(401, b"{}"), "record_error"),
        (DOUBTFUL, "record_error"),
    ],
    ids=["good", "rejected", "failed", "refused", "doubtful"],
)
async def test_exchange_reports_seconds_from_lease_to_end(autojump_clock, monkeypatch, reply, name):
    async with lab(after(2.0, reply)) as rig:
        await trio.sleep(100)
        calls = reported(rig, monkeypatch, "record_success", "record_error")
        await rig.post()
        assert [call for call, _ in calls] == [name]
        assert calls[0][1] == pytest.approx(2.0)


async def test_exchange_client_leaves_while_connecting_is_no_evidence(autojump_clock, monkeypatch):
    """Only a request that the server has had can show that it gives no answers."""
    async with lab(silent, connect_timeout=30) as rig:
        rig.scripted["a"].swallows = True
        calls = reported(rig, monkeypatch, "request_starved")
        client = rig.start_stream()
        await trio.sleep(20)
        client.leave()
        await wait_all_tasks_blocked()
        assert calls == []
        rig.scripted["a"].swallows = False
        client = rig.start_stream()
        await trio.sleep(20)
        client.leave()
        await wait_all_tasks_blocked()
        assert [name for name, _ in calls] == ["request_starved"]


async def test_exchange_cancelled_by_a_stop_is_no_evidence(autojump_clock, monkeypatch):
    async with lab(silent) as rig:
        calls = reported(rig, monkeypatch, "request_starved")
        client = rig.start_stream()
        await trio.sleep(20)
        rig.context.stopping = True
        client.leave()
        await wait_all_tasks_blocked()
        assert calls == []


# -- the record ----------------------------------------------------------------------------------


async def test_exchange_record_has_its_times_and_sizes(autojump_clock):
    reply = ok(b'{"choices":[{"text":"abc","finish_reason":"stop"}]}')
    async with lab(after(2.0, reply)) as rig:
        await trio.sleep(10)
        client = rig.client([b'{"model":', b'"m"}'])
        receive = client._receive

        async def slowly() -> dict[str, Any]:
            await trio.sleep(1.5)
            return await receive()

        client._receive = slowly
        got = await client.run()
        record = rig.recorder.last
        assert (record.started_at, record.body_read_at) == (10.0, 13.0)
        assert (record.first_byte_at, record.ended_at) == (15.0, 15.0)
        assert (record.bytes_in, record.bytes_out, record.chunks) == (13, len(got.body), 1)
        assert (record.path, record.method, record.client) == (
            b"/v1/chat/completions",
            "POST",
            "192.0.2.1",
        )


async def test_exchange_record_has_the_time_when_it_was_first_sent(autojump_clock):
    async with lab(after(2.0, answer(500, b"{}")), after(3.0, GOOD)) as rig:
        await trio.sleep(10)
        rig.prefer("a")
        await rig.post()
        assert (rig.recorder.last.sent_at, rig.recorder.last.first_byte_at) == (10.0, 15.0)


async def test_exchange_client_without_address_and_extensions_is_served(autojump_clock):
    async with lab(answering(GOOD), watched=True) as rig:
        client = rig.client()
        client._scope |= {"client": None, "extensions": None}
        assert (await client.run()).status == 200
        assert rig.recorder.last.client == "unknown"
