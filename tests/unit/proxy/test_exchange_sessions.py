"""Admission of sessions: new ones wait until they fit, admitted ones pass."""

from __future__ import annotations

from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import gauges, make_config
from support.proxy_harness import Client, Rig, lab
from support.scripted_server import Talk, ok


def answering(seconds: float) -> Any:
    """A server that takes a fixed time per request."""

    async def script(talk: Talk) -> None:
        while True:
            request = await talk.request()
            await trio.sleep(seconds)
            await talk.send(ok(request.body))

    return script


def admitting(*scripts: Any, **limits: Any) -> Any:
    limits = {"session_admission": True, "session_idle": 20.0, "queue_timeout": 120.0, **limits}
    return lab(*scripts, limits=limits, policy="adaptive")


def give_cache(rig: Rig, kv_tokens: int) -> None:
    for server in rig.servers:
        server.scraped(gauges(0, kv_tokens=kv_tokens), trio.current_time(), leases=0)


async def ask(rig: Rig, session: str, tokens: int = 600) -> Client:
    """A request of this session that has advanced as far as it can for now."""
    body = {"model": "m", "prompt": "x" * 4 * tokens}
    client = rig.start(body, headers=[(b"x-session-id", session.encode())])
    await wait_all_tasks_blocked()
    return client


async def test_session_that_does_not_fit_waits_while_admitted_one_passes(autojump_clock):
    async with admitting(answering(1.0)) as rig:
        give_cache(rig, 1000)
        first = await ask(rig, "session-1")
        await trio.sleep(5)
        waiting = await ask(rig, "session-2")
        again = await ask(rig, "session-1")
        await trio.sleep(5)
        assert (first.got.status, again.got.status, waiting.got.status) == (200, 200, 0)
        await trio.sleep(30)  # the first session has been idle for 20 s
        assert waiting.got.status == 200
        await rig.settled()


async def test_session_waits_for_no_server_with_room(autojump_clock):
    async with admitting(answering(1.0), answering(1.0)) as rig:
        give_cache(rig, 1000)
        clients = [await ask(rig, f"session-{number}") for number in range(2)]
        await trio.sleep(2)
        assert [client.got.status for client in clients] == [200, 200]
        assert rig.requests() == {"a": 1, "b": 1}
        await rig.settled()


async def test_large_session_is_not_overtaken_by_smaller_new_ones(autojump_clock):
    async with admitting(answering(1.0)) as rig:
        give_cache(rig, 1000)
        await ask(rig, "session-1", 300)
        large = await ask(rig, "large-session", 900)
        small = [await ask(rig, f"small-{number}", 100) for number in range(5)]
        await trio.sleep(10)
        assert {client.got.status for client in (large, *small)} == {0}
        await trio.sleep(100)
        assert {client.got.status for client in (large, *small)} == {200}
        prompts = [len(request.body) for request in rig.scripted["a"].requests]
        assert prompts[1] == max(prompts)
        await rig.settled()


async def test_session_that_never_fits_is_refused_with_retry_after(autojump_clock):
    async with admitting(answering(200.0), queue_timeout=30.0) as rig:
        give_cache(rig, 1000)
        await ask(rig, "session-1")
        late = await ask(rig, "session-2")
        await trio.sleep(40)
        assert late.got.status == 503
        assert b"retry-after" in dict(late.got.headers)
        await trio.sleep(300)
        await rig.settled()


async def test_session_of_cancelled_request_ends(autojump_clock):
    async with admitting(answering(100.0)) as rig:
        give_cache(rig, 1000)
        first = await ask(rig, "session-1")
        waiting = await ask(rig, "session-2")
        first.leave()
        await trio.sleep(30)
        assert len(rig.scripted["a"].requests) == 2
        await trio.sleep(100)
        assert waiting.got.status == 200
        await rig.settled()


async def test_session_admission_turned_off_admits_waiting_sessions(autojump_clock):
    async with admitting(answering(1.0)) as rig:
        give_cache(rig, 1000)
        await ask(rig, "session-1")
        waiting = await ask(rig, "session-2")
        config = make_config(1, limits={"session_admission": False}, policy="adaptive")
        assert rig.context.admission is not None
        assert config.limits is not None
        rig.context.admission.apply(config.limits)
        await trio.sleep(3)
        assert waiting.got.status == 200
        await rig.settled()
