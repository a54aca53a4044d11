"""A connection to one of several addresses of a name: Happy Eyeballs (RFC 8305).

The first address is tried, and another as soon as it fails or has not answered for SLOW_AFTER; the
first connection that stands is used. Addresses that a look-up finds meanwhile take part.
"""

from __future__ import annotations

import math
import socket

import trio

from vllm_router.errors import ConnectFailed, OwnFault
from vllm_router.http.client.resolver import Address, Name
from vllm_router.http.client.transport import connect

FRESH_WAIT = 0.5
"""Seconds to wait for a look-up when all known addresses have failed: the name may have moved."""


class Race:
    """The addresses of a name that one connection may use; `next` gives connected sockets."""

    def __init__(self, name: Name, port: int, turn: int) -> None:
        self._name, self._port, self._turn = name, port, turn
        self._spent: set[Address] = set()
        """Those that have failed, or have been given."""
        self._failures: dict[Address, ConnectFailed | OwnFault] = {}
        self._running: set[Address] = set()
        self._won: list[tuple[socket.socket, Address]] = []
        """The first connection that stood, if one has."""
        self._news = trio.Event()

    async def next(self) -> tuple[socket.socket, Address]:
        """A connected socket, which the caller closes, and its address.

        The caller bounds the time. Raises NameNotResolved, ConnectFailed or OwnFault once no
        address is left. May be called again if what it gave was of no use, see `failed`.
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
        name.worked(address)
        return sock, address

    def failed(self, address: Address, failure: ConnectFailed) -> None:
        """The connection that `next` gave was of no use: TLS has failed on it."""
        self._failures[address] = failure
        self._name.failed(address, trio.current_time())

    async def _run(self, nursery: trio.Nursery) -> None:
        """Begin one attempt after the other until one has won or none is left."""
        name, watching = self._name, False
        while not self._won:
            address = self._best_left()
            if address is not None:
                self._running.add(address)
                nursery.start_soon(self._try, address)
            elif name.looking:
                if not watching:
                    watching = True
                    nursery.start_soon(self._watch)
            elif not self._running:
                return
            with trio.move_on_after(math.inf if self._running else FRESH_WAIT) as patience:
                await self._news.wait()
                self._news = trio.Event()
            if patience.cancelled_caught:
                return
            watching = watching and name.looking

    def _best_left(self) -> Address | None:
        gone = self._spent | self._running
        addresses = self._name.addresses(self._port, trio.current_time(), self._turn)
        return next((address for address in addresses if address not in gone), None)

    async def _watch(self) -> None:
        """Have the race look for new addresses when the look-up has ended."""
        await self._name.looked()
        self._news.set()

    async def _try(self, address: Address) -> None:
        try:
            sock = await connect(address, lambda: self._not_soon(address))
        except (ConnectFailed, OwnFault) as failure:
            # An own fault may be of this address alone: ::1 cannot be assigned without IPv6.
            self._failures[address] = failure
            self._spent.add(address)
            self._name.failed(address, trio.current_time())
        else:
            if self._won:
                sock.close()
            else:
                self._won.append((sock, address))
        finally:
            self._running.discard(address)
            self._news.set()

    def _not_soon(self, address: Address) -> None:
        """It may still connect, but others are tried beside it, and first the next time."""
        self._name.failed(address, trio.current_time())
        self._news.set()

    def _failure(self) -> ConnectFailed | OwnFault:
        """What went wrong, at which addresses; an own fault only if there is nothing else."""
        failures = self._failures
        told = {a: f for a, f in failures.items() if isinstance(f, ConnectFailed)}
        if not told:
            return next(iter(failures.values()), ConnectFailed(f"{self._name.host}: no address"))
        if len(set(map(str, told.values()))) == 1:
            where = ", ".join(address[1][0] for address in told)
            return ConnectFailed(f"{next(iter(told.values()))} ({self._name.host}: {where})")
        each = "; ".join(f"{failure} ({address[1][0]})" for address, failure in told.items())
        return ConnectFailed(f"{self._name.host}: {each}")
