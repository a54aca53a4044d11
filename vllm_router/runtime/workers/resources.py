"""Everything that the processes of a router inherit: sockets, channels and shared memory."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass

from vllm_router.http.asgi_types import Receive, Scope, Send
from vllm_router.http.server.interfaces import Address
from vllm_router.http.server.limits import Limits
from vllm_router.http.server.listener import Listener
from vllm_router.routing.paths import is_inference
from vllm_router.runtime.local_listener import LocalSockets
from vllm_router.runtime.serve import ServeOptions, addresses_of, listen, take_tls
from vllm_router.runtime.supervisor import log_memory_plan
from vllm_router.runtime.workers.channel import pair
from vllm_router.runtime.workers.config_snapshot import ConfigSnapshot
from vllm_router.runtime.workers.fleet import counted_in
from vllm_router.runtime.workers.queue_board import QueueBoard
from vllm_router.runtime.workers.queue_peers import check_limits
from vllm_router.runtime.workers.queue_wakeup import Wakeups
from vllm_router.runtime.workers.shared_counters import SharedCounters, columns_for

DISCOVERED = 2500
"""Servers that sources may find in addition to the servers of the file."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """`public` sockets are accepted from by workers, `private` and `local` ones by the leader.

    `plain` are the descriptors of private sockets that accept plain HTTP beside TLS. `monitor` is
    the port of the monitor's listener, with the digest of its key.
    """

    public: list[socket.socket]
    private: list[socket.socket]
    local: list[socket.socket]
    plain: tuple[int, ...]
    address: Address
    admin_address: Address | None
    monitor: tuple[int, str] | None

    @property
    def admin_port(self) -> int | None:
        return self.admin_address[1] if self.admin_address is not None else None


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Descriptors, and the parent's own mappings of two of them."""

    counters_fd: int
    counters: SharedCounters
    snapshot: int
    queue_fd: int
    queue: QueueBoard
    wakeups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Resources:
    """`channels` has, for each worker, the leader's end and the worker's end."""

    options: ServeOptions
    listeners: Listeners
    memory: SharedMemory
    channels: list[tuple[socket.socket, socket.socket]]

    def reset(self, number: int) -> None:
        """Clear the shared state of a process that has died."""
        self.memory.counters.clear(number)
        self.memory.queue.pages[number].reset()


def open_resources(options: ServeOptions, ending: contextlib.ExitStack) -> Resources:
    """Open everything that can fail before a process is started. `ending` closes it.

    Raises OSError, CannotListen and ConfigError.
    """
    check_limits(options.config)
    log_memory_plan(options.config.settings, options.workers)
    listeners = _open_listeners(options, ending)
    memory = _open_memory(options, ending)
    channels = []
    for _ in range(options.workers):
        ends = pair()
        channels.append(ends)
        for end in ends:
            ending.callback(end.close)
    return Resources(options, listeners, memory, channels)


def _open_listeners(options: ServeOptions, ending: contextlib.ExitStack) -> Listeners:
    settings = options.config.settings
    front = Listener(
        accepts_nothing,
        accepts=is_inference,
        limits=Limits(write_stall_timeout=settings.write_stall_timeout),
    )
    ending.callback(front.close)
    take_tls(front, options.config)
    public, admin = listen(front, options)
    local = ending.enter_context(contextlib.closing(LocalSockets()))
    local.open(addresses_of(front))
    view = options.view
    monitor = view.open(front, options.config, local) if view is not None else None
    private_ports = {admin[1] if admin is not None else None, monitor.port if monitor else None}
    private_ports.discard(public[1])
    private = [sock for sock in front.listeners if sock.getsockname()[1] in private_ports]
    return Listeners(
        public=[sock for sock in front.listeners if sock not in private],
        private=private,
        local=local.sockets,
        plain=tuple(sock.fileno() for sock in private if front.takes_plain(sock)),
        address=public,
        admin_address=admin,
        monitor=(monitor.port, str.__str__(monitor.digest)) if monitor is not None else None,
    )


def _open_memory(options: ServeOptions, ending: contextlib.ExitStack) -> SharedMemory:
    rows = options.workers + 1
    later = DISCOVERED if options.config.discovery is not None else options.demo
    columns = columns_for(len(counted_in(options.config)) + later)
    counters_fd = SharedCounters.create(rows, columns)
    ending.callback(os.close, counters_fd)
    snapshot = ConfigSnapshot.create(options.config)
    ending.callback(os.close, snapshot)
    queue_fd = QueueBoard.create(rows)
    ending.callback(os.close, queue_fd)
    wakeups = []
    for _ in range(rows):
        wakeups.append(Wakeups.create())
        ending.callback(os.close, wakeups[-1])
    return SharedMemory(
        counters_fd,
        SharedCounters(counters_fd, rows, columns),
        snapshot,
        queue_fd,
        QueueBoard(queue_fd, rows),
        tuple(wakeups),
    )


async def accepts_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of the parent, whose sockets only the other processes accept from."""
    raise RuntimeError("the parent process accepts no connections")
