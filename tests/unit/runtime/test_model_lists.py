"""Refreshes of the servers' model lists, shared by all requests that need one."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from support.proxy_harness import lab
from support.scripted_server import GOOD, answering
from vllm_router.runtime.model_lists import AT_ONCE, LOOK_GAP, ModelLists


class Server:
    def __init__(self, takes: float) -> None:
        self.takes = takes
        self.looks: list[float] = []

    async def read(self) -> None:
        self.looks.append(trio.current_time())
        await trio.sleep(self.takes)


async def never() -> None:
    await trio.sleep_forever()


@pytest.fixture
async def nursery():
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


async def test_model_lists_many_refreshes_share_one_scrape(autojump_clock, nursery):
    server = Server(0.1)
    lists = ModelLists(lambda: [server.read])
    nursery.start_soon(lists.run)
    began = trio.current_time()
    async with trio.open_nursery() as asking:
        for _ in range(50):
            asking.start_soon(lists.fresh, lambda: False, 5.0)
    assert len(server.looks) == 1
    assert trio.current_time() - began == pytest.approx(0.1)


async def test_model_lists_refresh_during_scrape_waits_for_next(autojump_clock, nursery):
    server = Server(0.1)
    lists = ModelLists(lambda: [server.read])
    nursery.start_soon(lists.run)
    nursery.start_soon(lists.fresh, lambda: False, 5.0)
    await trio.sleep(0.05)
    asked = trio.current_time()
    await lists.fresh(lambda: False, 5.0)
    assert server.looks[-1] > asked


async def test_model_lists_flood_costs_one_scrape_per_interval(autojump_clock, nursery):
    server = Server(0.01)
    lists = ModelLists(lambda: [server.read])
    nursery.start_soon(lists.run)
    began = trio.current_time()
    while trio.current_time() < began + 10 * LOOK_GAP:
        await lists.fresh(lambda: False, 5.0)
    assert AT_ONCE < len(server.looks) <= AT_ONCE + 11


async def test_model_lists_few_wrong_names_do_not_wait_for_interval(autojump_clock, nursery):
    server = Server(0.01)
    lists = ModelLists(lambda: [server.read])
    nursery.start_soon(lists.run)
    for _ in range(3):
        began = trio.current_time()
        for number in range(AT_ONCE):
            await lists.fresh(lambda: False, 5.0)
            assert server.looks[-1] >= began + number * 0.01 - 1e-6  # its own refresh
        assert trio.current_time() - began == pytest.approx(AT_ONCE * 0.01)
        await trio.sleep(AT_ONCE * LOOK_GAP)


async def test_model_lists_refresh_does_not_wait_for_slow_servers(autojump_clock, nursery):
    quick, found = Server(0.1), []

    async def read() -> None:
        await quick.read()
        found.append("m")

    lists = ModelLists(lambda: [read, never])
    nursery.start_soon(lists.run)
    began = trio.current_time()
    await lists.fresh(lambda: bool(found), 5.0)
    assert trio.current_time() - began == pytest.approx(0.1)
    await lists.fresh(lambda: False, 5.0)
    assert trio.current_time() - began == pytest.approx(0.1 + LOOK_GAP + 5.0)


async def test_model_lists_newly_loaded_model_is_served(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD)) as rig:

        async def look(found) -> None:
            await trio.sleep(0.1)
            rig.server("b").listed({"m": {"id": "m"}, "new": {"id": "new"}}, trio.current_time())
            assert found()

        rig.context.refresh_models = look
        got = await rig.post({"model": "new"})
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")


async def test_model_lists_unlisted_model_after_refresh_is_404(autojump_clock):
    looks = []
    async with lab(answering(GOOD)) as rig:

        async def look(found) -> None:
            looks.append(found())

        rig.context.refresh_models = look
        assert (await rig.post({"model": "nope"})).code == "model_not_found"
        assert (await rig.post()).status == 200
        assert looks == [False]
