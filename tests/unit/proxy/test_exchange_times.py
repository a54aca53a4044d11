"""The times that an exchange reports of a server, and the waits that are evidence against it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.proxy_harness import Rig, lab
from support.scripted_server import Script, Talk, answer, ok, silent

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
