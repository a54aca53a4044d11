"""Decisions about one process of the group: life signs, messages, and exits; no process starts."""

from __future__ import annotations

import signal
import subprocess
from typing import Any, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from vllm_router.runtime.workers.channel import Channel, pair
from vllm_router.runtime.workers.control_channel import ALIVE, DRAIN, FAILED, LAME, SERVING, STOP
from vllm_router.runtime.workers.process_slot import (
    CHECK_INTERVAL,
    LEADER_MISSES,
    WORKER_MISSES,
    ProcessSlot,
    _describe_exit,
)


class Process:
    """Stands for a `Popen`. `killed_at` is when it was killed."""

    killed_at: float | None = None

    def kill(self) -> None:
        self.killed_at = trio.current_time()


def slot_of(number: int) -> ProcessSlot:
    return ProcessSlot(cast("Any", None), number, lambda number, pid: None)


def watching(slot: ProcessSlot, nursery: trio.Nursery) -> Process:
    process = Process()
    nursery.start_soon(slot._watch, cast("subprocess.Popen[bytes]", process))
    return process


@pytest.mark.parametrize(("number", "misses"), [(0, LEADER_MISSES), (1, WORKER_MISSES)])
async def test_process_slot_silent_process_is_killed(autojump_clock, caplog, number, misses):
    slot = slot_of(number)
    async with trio.open_nursery() as nursery:
        process = watching(slot, nursery)
        await wait_all_tasks_blocked()
        slot._life_signs = 1
        began = trio.current_time()
    # The first check finds the sign, the others none.
    assert process.killed_at == pytest.approx(began + (1 + misses) * CHECK_INTERVAL)
    assert f"{slot.name} has not responded for {misses:g} s" in caplog.text


async def test_process_slot_start_may_take_any_time(autojump_clock):
    async with trio.open_nursery() as nursery:
        process = watching(slot_of(1), nursery)
        await trio.sleep(1000)
        assert process.killed_at is None
        nursery.cancel_scope.cancel()


async def test_process_slot_rare_life_signs_are_enough(autojump_clock):
    slot = slot_of(1)
    async with trio.open_nursery() as nursery:
        process = watching(slot, nursery)
        await wait_all_tasks_blocked()
        for _ in range(20):
            slot._life_signs += 1
            await trio.sleep((WORKER_MISSES - 1) * CHECK_INTERVAL)
        assert process.killed_at is None
        nursery.cancel_scope.cancel()


async def test_process_slot_follows_messages_of_process():
    slot, (ours, theirs) = slot_of(1), map(Channel, pair())
    slot._control, slot.lame = ours, True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slot._listen, ours)
        await theirs.send(ALIVE)
        await theirs.send(SERVING)
        await slot.served_or_ended()
        assert slot.serving.is_set()
        # A process that was replaced during the drain of the router learns of it.
        assert await theirs.receive() == (LAME, None)
        await theirs.send(FAILED + "no room: é".encode())
        theirs.close()
    assert slot._life_signs == 3
    assert slot._reason == "no room: é"
    ours.close()


async def test_process_slot_ended_process_is_waited_for_no_longer():
    slot = slot_of(1)
    slot.ended.set()
    await slot.served_or_ended()
    assert not slot.serving.is_set()


async def test_process_slot_last_order_reaches_running_process_alone():
    slot, (ours, theirs) = slot_of(1), map(Channel, pair())
    slot.send(DRAIN)  # no process runs: there is nothing to send to
    slot._control, slot._process = ours, cast("subprocess.Popen[bytes]", Process())
    slot.leave(STOP)
    assert slot.leaving
    assert await theirs.receive() == (STOP, None)
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "has ended with code 0"),
        (2, "has ended with code 2"),
        (-signal.SIGKILL, "was killed by SIGKILL"),
        (-99, "was killed by signal 99"),
    ],
)
def test_process_slot_exit_is_described_in_words(code, text):
    assert _describe_exit(code) == text
