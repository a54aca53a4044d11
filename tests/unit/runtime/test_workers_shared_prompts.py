"""Prompts that one process places are known to the leader and to all other workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from support.web_harness import Lab
from vllm_router.routing.prompt.blocks import Prompt, hash_blocks
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.runtime.workers.messages import KeyShare, PeerBatch, decode_from_leader
from vllm_router.runtime.workers.shared_prompts import PERIOD, LeaderPrompts, WorkerPrompts

TEXT = b"a prompt of several blocks " * 200


class Wire:
    """Stands for a channel or a link, and keeps its messages."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.broken = False

    def send_now(self, message: bytes) -> bool:
        self.messages.append(message)
        return True

    tell = send_now

    async def send(self, message: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise trio.BrokenResourceError
        self.messages.append(message)

    def take(self) -> list[Any]:
        taken, self.messages = self.messages, []
        return [decode_from_leader(message) for message in taken]


def place(lab: Lab, text: bytes = TEXT) -> None:
    """Send a prompt to server `a` as an exchange of this process does."""
    prompt = Prompt(hash_blocks(text), len(text), conversation=1)
    info = RoutingInfo("m", stream=True, prompt=prompt)
    now = trio.current_time()
    lab.router.proxy.context.policies.default.leased(lab["a"].lease(now), None, info, now)


def blocks(lab: Lab) -> set[tuple[str, int]]:
    """The servers and blocks that the policies of a process know."""
    found = lab.router.proxy.context.policies.blocks(1000)
    return {(server.name, one) for server, hashes in found for one in hashes}


class Router:
    """A leader and two workers, which run."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.labs = [Lab(1, policy="adaptive") for _ in range(3)]
        self.channels = [Wire(), Wire()]
        self.links = [Wire(), Wire()]
        self.leader = LeaderPrompts(self.labs[0].router, SimpleNamespace(links=self.links))
        self.workers = [
            WorkerPrompts(lab.router, channel)
            for lab, channel in zip(self.labs[1:], self.channels, strict=True)
        ]
        for process in (self.leader, *self.workers):
            nursery.start_soon(process.run)


async def test_worker_prompts_reach_leader_and_other_worker(autojump_clock):
    async with trio.open_nursery() as nursery:
        router = Router(nursery)
        await trio.sleep(3.5 * PERIOD)  # without a prompt
        place(router.labs[1])
        await trio.sleep(PERIOD)
        [message] = router.channels[0].take()
        assert isinstance(message, PeerBatch)
        router.leader.hear(router.links[0], message)
        assert router.links[0].take() == []
        [passed_on] = router.links[1].take()
        router.workers[1].hear(passed_on)
        known = blocks(router.labs[1])
        assert known
        assert blocks(router.labs[0]) == blocks(router.labs[2]) == known
        nursery.cancel_scope.cancel()


async def test_leader_prompts_reach_every_worker(autojump_clock):
    async with trio.open_nursery() as nursery:
        router = Router(nursery)
        await trio.sleep(3.5 * PERIOD)  # without a prompt
        place(router.labs[0])
        await trio.sleep(PERIOD)
        for link, worker, lab in zip(router.links, router.workers, router.labs[1:], strict=True):
            [message] = link.take()
            worker.hear(message)
            assert blocks(lab) == blocks(router.labs[0]) != set()
        nursery.cancel_scope.cancel()


async def test_shared_prompts_processes_without_prompts_send_nothing(autojump_clock):
    async with trio.open_nursery() as nursery:
        router = Router(nursery)
        await trio.sleep(5 * PERIOD)
        assert [wire.messages for wire in (*router.channels, *router.links)] == [[]] * 4
        nursery.cancel_scope.cancel()


async def test_leader_known_gives_a_new_worker_all_blocks_and_its_share(autojump_clock):
    async with trio.open_nursery() as nursery:
        router = Router(nursery)
        place(router.labs[0])
        router.labs[0].router.proxy.context.key_limits.routers = 3
        *batches, share = [decode_from_leader(message) for message in router.leader.known()]
        assert share == KeyShare(3)
        for message in (*batches, share):
            router.workers[0].hear(message)
        assert blocks(router.labs[1]) == blocks(router.labs[0]) != set()
        assert router.labs[1].router.proxy.context.key_limits.routers == 3
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("broken", [False, True])
async def test_worker_prompts_batch_longer_than_a_message_is_sent_or_ends_task(
    autojump_clock, monkeypatch, broken
):
    monkeypatch.setattr("vllm_router.runtime.workers.shared_prompts.LARGEST", 10)
    async with trio.open_nursery() as nursery:
        lab, channel = Lab(1, policy="adaptive"), Wire()
        channel.broken = broken
        worker = WorkerPrompts(lab.router, channel)
        place(lab)
        nursery.start_soon(worker.run)
        await trio.sleep(1.5 * PERIOD)
        assert len(channel.messages) == (0 if broken else 1)
        assert len(nursery.child_tasks) == (0 if broken else 1)
        nursery.cancel_scope.cancel()
