"""Models that the configuration expects although no server has them."""

from __future__ import annotations

from typing import Any

import msgspec
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from support.fleet_makers import come_up
from support.proxy_harness import Rig, lab
from support.scripted_server import GOOD, MemoryPool, ScriptedServer, Talk

ZERO = """
[discovery]
file = { path = "none.json" }
[models]
public = "m"
"""


async def answering(talk: Talk) -> None:
    while True:
        await talk.request()
        await talk.send(GOOD)


def scale(rig: Rig, *, servers: bool) -> None:
    """Put a configuration in force as discovery does, with the rig's servers or with none."""
    config = rig.config
    if not servers:
        config = msgspec.structs.replace(config, servers=())
    config = msgspec.structs.replace(config, found=(("file", ()),))
    change = rig.fleet.apply(config)
    rig.proxy.apply(config)
    for server in change.added:
        scripted = rig.scripted[server.name] = ScriptedServer(rig.nursery, answering)
        rig.context.upstreams[server].pool = MemoryPool(scripted)


def zero(**limits: Any) -> Any:
    return lab(answering, limits={"queue_timeout": 300, **limits}, tables=ZERO)


async def test_scale_to_zero_request_waits_for_first_server(autojump_clock: MockClock) -> None:
    async with zero() as rig:
        scale(rig, servers=False)
        for server in rig.fleet.gone():
            rig.proxy.forget(server)
        client = rig.start({"model": "public"})
        await trio.sleep(120)
        assert client.got.status == 0, "it waits"
        (queue,) = rig.context.admission.queues(trio.current_time())
        assert (queue.model, queue.waiting) == ("m", 1)
        scale(rig, servers=True)
        await trio.sleep(60)
        assert client.got.status == 0, "the server is still starting"
        come_up(rig.servers[0], trio.current_time())
        rig.fleet.settle(trio.current_time())
        await wait_all_tasks_blocked()
        assert client.got.status == 200


async def test_scale_to_zero_request_that_waited_too_long_is_503(
    autojump_clock: MockClock,
) -> None:
    async with zero() as rig:
        scale(rig, servers=False)
        got = await rig.post({"model": "m"})
        assert (got.status, got.code) == (503, "no_server_available")
        assert got[b"retry-after"] is not None
        assert trio.current_time() >= 300


async def test_scale_to_zero_without_queue_is_503_not_404(autojump_clock: MockClock) -> None:
    async with lab(answering, tables=ZERO) as rig:
        scale(rig, servers=False)
        got = await rig.post({"model": "m"})
        assert (got.status, got.code) == (503, "no_server_available")


async def test_scale_to_zero_unknown_model_does_not_wait(autojump_clock: MockClock) -> None:
    async with zero() as rig:
        scale(rig, servers=False)
        got = await rig.post({"model": "other"})
        assert got.status == 503
        assert trio.current_time() < 10


async def test_scale_to_zero_needs_discovery(autojump_clock: MockClock) -> None:
    tables = '[models]\n"other" = { serves = "nowhere" }\n'
    async with lab(answering, tables=tables, limits={"max_in_flight": 1}) as rig:
        got = await rig.post({"model": "other"})
        assert (got.status, got.code) == (404, "model_not_found")
