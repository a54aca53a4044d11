"""Connection to one of several addresses of a name: Happy Eyeballs (RFC 8305).

The next address is tried as soon as an attempt fails or takes longer than SLOW_AFTER; the first
established connection is used. Addresses found by a look-up in the meantime take part.
"""

from __future__ import annotations

import math
import socket

import trio

from vllm_router.errors import ConnectFailed, OwnFault
from vllm_router.http.client.connect import connect
from vllm_router.http.client.resolver import Address, Name

FRESH_WAIT = 0.5
"""Seconds to wait for a look-up after all known addresses have failed: the name may have moved."""


class Race:
    """Connection attempts to the addresses of a name; `next` returns connected sockets."""

    def __init__(self, name: Name, port: int, turn: int) -> None:
        self._name, self._port, self._turn = name, port, turn
        self._spent: set[Address] = set()
        """Addresses that have failed or been returned."""
        self._failures: dict[Address, ConnectFailed | OwnFault] = {}
        self._running: set[Address] = set()
        self._won: list[tuple[socket.socket, Address]] = []
        """The first established connection, if any."""
        self._changed = trio.Event()

    async def next(self) -> tuple[socket.socket, Address]:
        """A connected socket, which the caller closes, and its address.

        The caller bounds the time. Raises NameNotResolved, ConnectFailed or OwnFault once no
        address is left. Call it again after `on_unusable`.
        """
        name = self._name
        name.refresh_if_old(trio.current_time())
        await name.found()
        self._won = []
        try:
            async with trio.open_nursery() as nursery:
                await self._run(nursery)
                nursery.cancel_scope.cancel(reason="the race is over")
        except BaseException:
            for sock, _ in self._won:
                sock.close()
            raise
        if not self._won:
            raise self._failure()
        [(sock, address)] = self._won
        self._spent.add(address)
        name.mark_working(address)
        return sock, address

    def on_unusable(self, address: Address, failure: ConnectFailed) -> None:
        """TLS failed on a connection that `next` returned."""
        self._failures[address] = failure
        self._name.mark_failed(address, trio.current_time())

    async def _run(self, nursery: trio.Nursery) -> None:
        """Start attempts until one has succeeded or no address is left."""
        name, watching = self._name, False
        while not self._won:
            address = self._next_address()
            if address is not None:
                self._running.add(address)
                nursery.start_soon(self._try, address)
            elif name.looking:
                if not watching:
                    watching = True
                    nursery.start_soon(self._watch)
            elif not self._running:
                return
            with trio.move_on_after(math.inf if self._running else FRESH_WAIT) as wait:
                await self._changed.wait()
                self._changed = trio.Event()
            if wait.cancelled_caught:
                return
            watching = watching and name.looking

    def _next_address(self) -> Address | None:
        used = self._spent | self._running
        addresses = self._name.addresses(self._port, trio.current_time(), self._turn)
        return next((address for address in addresses if address not in used), None)

    async def _watch(self) -> None:
        """Continue the race with new addresses when the look-up has ended."""
        await self._name.looked()
        self._changed.set()

    async def _try(self, address: Address) -> None:
        try:
            sock = await connect(address, lambda: self._on_slow(address))
        except (ConnectFailed, OwnFault) as failure:
            # An OwnFault may concern this address alone: ::1 cannot be assigned without IPv6.
            self._failures[address] = failure
            self._spent.add(address)
            self._name.mark_failed(address, trio.current_time())
        else:
            if self._won:
                sock.close()
            else:
                self._won.append((sock, address))
        finally:
            self._running.discard(address)
            self._changed.set()

    def _on_slow(self, address: Address) -> None:
        """The attempt continues; others start beside it, and come first the next time."""
        self._name.mark_failed(address, trio.current_time())
        self._changed.set()

    def _failure(self) -> ConnectFailed | OwnFault:
        """The failures and their addresses; an OwnFault only if there is no other failure."""
        failures = self._failures
        theirs = {a: f for a, f in failures.items() if isinstance(f, ConnectFailed)}
        if not theirs:
            return next(iter(failures.values()), ConnectFailed(f"{self._name.host}: no address"))
        if len(set(map(str, theirs.values()))) == 1:
            where = ", ".join(address[1][0] for address in theirs)
            return ConnectFailed(f"{next(iter(theirs.values()))} ({self._name.host}: {where})")
        each = "; ".join(f"{failure} ({address[1][0]})" for address, failure in theirs.items())
        return ConnectFailed(f"{self._name.host}: {each}")
