"""The worker's side of the channel to the leader: state, configuration, names, model lists."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable

import trio

from vllm_router.config.schema import Config
from vllm_router.errors import ConfigError
from vllm_router.runtime.model_lists import LOOK_GAP
from vllm_router.runtime.supervisor import Supervisor
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.config_snapshot import ConfigSnapshot
from vllm_router.runtime.workers.fleet import FollowingFleet
from vllm_router.runtime.workers.messages import (
    Configured,
    Hello,
    KeyShare,
    ModelListsRefreshed,
    PeerBatch,
    RefreshModelLists,
    ResolvedNames,
    ServerState,
    ServerStates,
    StoredResponses,
    Welcome,
    decode_from_leader,
    encode,
    parts_of,
    stored_in_parts,
)

logger = logging.getLogger(__name__)


class ModelListRequests:
    """Asks the leader to read the servers' model lists, and waits for the answer."""

    def __init__(self, channel: Channel, timeout: Callable[[], float]) -> None:
        """`timeout` is the time of one check in seconds, by the current configuration."""
        self._channel = channel
        self._timeout = timeout
        self._refreshed = trio.Event()

    async def refresh(self) -> None:
        """Return when the lists have been read, or the leader has not answered in time."""
        self._refreshed = trio.Event()
        with trio.move_on_after(LOOK_GAP + self._timeout() + 1.0):
            await self._channel.send(encode(RefreshModelLists()))
            await self._refreshed.wait()

    def refreshed(self) -> None:
        """The leader has answered."""
        self._refreshed.set()


class LeaderClient:
    """Follows the leader. `welcomed` is set when the whole state has arrived.

    `own_share` gives a worker's share of a configuration; `send_stats` sends the current figures;
    `hear` applies the batches of other processes.
    While there is no leader, the worker goes on with the last known state.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        fleet: FollowingFleet,
        channel: Channel,
        snapshot: ConfigSnapshot,
        lists: ModelListRequests,
        *,
        own_share: Callable[[Config], Config],
        send_stats: Callable[[], Awaitable[None]],
        hear: Callable[[PeerBatch | KeyShare], None],
    ) -> None:
        self.welcomed = trio.Event()
        self._supervisor = supervisor
        self._fleet = fleet
        self._channel = channel
        self._snapshot = snapshot
        self._lists = lists
        self._own_share = own_share
        self._send_stats = send_stats
        self._hear = hear

    async def run(self) -> None:
        """Say hello, then follow the leader until cancelled."""
        await self._channel.send(self._hello())
        while True:
            data, _ = await self._channel.receive()
            if not data:
                await trio.sleep_forever()  # the parent has ended, and this process drains
            message = decode_from_leader(data)
            match message:
                case ServerStates(servers):
                    self._follow(servers)
                case Configured():
                    await self._reload()
                case ResolvedNames(addresses):
                    self._supervisor.resolver.take_over(addresses)
                case StoredResponses(entries):
                    for entry in entries:
                        self._supervisor.proxy.context.owners.take(entry)
                case PeerBatch() | KeyShare():
                    self._hear(message)
                case ModelListsRefreshed():
                    self._lists.refreshed()
                case Welcome(first):
                    if first:
                        await self._channel.send(self._hello())
                        await self._send_stats()
                        await self._send_stored()
                    else:
                        self.welcomed.set()

    async def _send_stored(self) -> None:
        """Tell a new leader the servers of stored responses."""
        for entries in stored_in_parts(self._supervisor.proxy.context.owners.entries()):
            await self._channel.send(encode(StoredResponses(entries)))

    def _hello(self) -> bytes:
        draining = [server.url for server in self._fleet.servers.values() if server.draining]
        # The names that fit into one message; the leader resolves the others itself.
        addresses = next(parts_of(self._supervisor.resolver.known()), {})
        return encode(Hello(os.getpid(), draining, addresses))

    def _follow(self, states: list[ServerState]) -> None:
        now = trio.current_time()
        for state in states:
            down = self._fleet.follow(state, now)
            if down is not None:
                self._supervisor.server_down(down)
        self._fleet.settle(now)

    async def _reload(self) -> None:
        supervisor = self._supervisor
        new = self._snapshot.read()
        if new is None:
            return  # the leader is writing it again, and sends another message then
        new = self._own_share(new)
        old = supervisor.config
        if new == old:
            self._fleet.use_columns()
            return
        try:
            await supervisor.prepare(new)
            supervisor.apply(old, new)
        except ConfigError as error:
            logger.error(
                "the new configuration cannot be applied in this worker, the previous one stays "
                "in force: %s",
                "; ".join(error.problems),
            )
