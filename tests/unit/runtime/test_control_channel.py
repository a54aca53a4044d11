"""Orders of the parent, and life signs of a process, over a real channel without processes."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from vllm_router.runtime.workers.channel import Channel, pair
from vllm_router.runtime.workers.control_channel import (
    ALIVE,
    ALIVE_EVERY,
    DRAIN,
    LAME,
    LOST,
    RELOAD,
    REOPEN,
    SERVING,
    STOP,
    ControlChannel,
)


class Rig:
    """A process's end of the channel, and the parent's. `calls` are the callbacks in order."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.sock, theirs = pair()
        self.parent = Channel(self.sock)
        self.control = ControlChannel(theirs.detach())
        self.nursery = nursery
        self.calls: list[object] = []
        self.control.lame = lambda: self.calls.append("lame")
        self.control.lost = lambda number, pid: self.calls.append((number, pid))

    async def order(self, message: bytes) -> None:
        await self.parent.send(message)
        await wait_all_tasks_blocked()

    async def message(self) -> bytes:
        return (await self.parent.receive())[0]


@asynccontextmanager
async def listening() -> AsyncIterator[Rig]:
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery)
        try:
            await nursery.start(rig.control.listen)
            yield rig
        finally:
            nursery.cancel_scope.cancel()
            rig.control.close()
            rig.parent.close()


async def test_control_channel_orders_call_their_callbacks(autojump_clock):
    async with listening() as rig:
        calls = rig.calls
        tasks = rig.control.tasks(lambda: calls.append("reload"), lambda: calls.append("reopen"))
        assert tasks == []
        for order in (LAME, RELOAD, REOPEN, LOST + b"3 4711", b"an order of a later version"):
            await rig.order(order)
        assert calls == ["lame", "reload", "reopen", (3, 4711)]
        assert not rig.control.first.is_set()


async def test_control_channel_process_with_nothing_to_reload_ignores_the_order(autojump_clock):
    async with listening() as rig:
        rig.control.tasks(None, None)
        await rig.order(RELOAD)
        await rig.order(REOPEN)
        assert rig.calls == []


async def test_control_channel_drain_is_first_signal_and_stop_the_second(autojump_clock):
    async with listening() as rig:
        with rig.control.until_second() as scope:
            await rig.order(DRAIN)
            assert rig.control.first.is_set()
            assert not scope.cancel_called
            await rig.order(STOP)
            await trio.sleep_forever()
        assert scope.cancelled_caught


async def test_control_channel_end_of_parent_is_order_to_drain(
    autojump_clock, caplog: pytest.LogCaptureFixture
):
    async with listening() as rig:
        rig.sock.shutdown(socket.SHUT_RDWR)
        await rig.control.first.wait()
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "the parent process has ended" in caplog.text


async def test_control_channel_end_of_parent_after_drain_is_no_news(
    autojump_clock, caplog: pytest.LogCaptureFixture
):
    async with listening() as rig:
        await rig.order(DRAIN)
        rig.sock.shutdown(socket.SHUT_RDWR)
        await wait_all_tasks_blocked()
        assert caplog.records == []


async def test_control_channel_sends_life_signs_beside_messages(autojump_clock):
    async with listening() as rig:
        rig.control.send(SERVING)
        assert {await rig.message() for _ in range(2)} == {ALIVE, SERVING}  # in any order
        began = trio.current_time()
        assert [await rig.message() for _ in range(3)] == [ALIVE] * 3
        assert trio.current_time() - began == pytest.approx(3 * ALIVE_EVERY)
