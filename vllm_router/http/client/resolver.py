"""Addresses of host names: looked up in the background, and kept while the resolver fails.

A name is looked up by one task at a time, whatever number of connections wait for it. Once it has
addresses no connection waits for the resolver any more: they are used while a look-up is under way,
and stay in use when it fails, hangs or finds nothing (RFC 8767, serving stale data). An address
that cannot be connected to is tried last for a while, and is a reason to look again at once.
"""

from __future__ import annotations

import logging
import math
import socket
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import chain, zip_longest

import trio

from vllm_router.errors import NameNotResolved

logger = logging.getLogger(__name__)

BELIEVED_FOR = 30.0
"""Seconds after a good look-up until the next use of the name starts another."""

AGAIN_AFTER = 1.0
"""Seconds between the starts of two look-ups of a name, at least."""

LOOK_UP_LIMIT = 60.0
"""Seconds until a look-up that has not ended is given up; the C library's usually ends before."""

FAILED_FOR = 60.0
"""Seconds for which an address that could not be connected to is tried after all others."""

MAX_ADDRESSES = 64
"""Addresses of a name that are used; a name with more is cut, as each new connection sorts them."""

MAX_LOOK_UPS = 16
"""Look-ups that run at a time: each has a thread, which cannot be stopped while it hangs."""

Host = tuple[socket.AddressFamily, str, int, int]
"""An address without a port: its family, its text, and flow and scope, which IPv6 has."""

Address = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]
"""A family and what `socket.connect` takes for it."""

LookUp = Callable[[str], Awaitable[Sequence[Host]]]
"""Finds the addresses of a name, best first. Raises OSError, or UnicodeError for no such name."""


_FAMILIES: frozenset[int] = frozenset({socket.AF_INET, socket.AF_INET6})


def system_look_up() -> LookUp:
    """`getaddrinfo` in threads of its own: it knows hosts files, search domains and all the rest.

    It is called as `socket.getaddrinfo` each time. A hanging one keeps no other thread from work.
    """
    limiter = trio.CapacityLimiter(MAX_LOOK_UPS)

    def ask(name: str) -> list[Host]:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        hosts = [
            (family, str(address[0]), *((address[2], address[3]) if len(address) == 4 else (0, 0)))
            for family, _, _, _, address in found
            if family in _FAMILIES
        ]
        return list(dict.fromkeys(hosts))

    async def look_up(name: str) -> list[Host]:
        return await trio.to_thread.run_sync(ask, name, abandon_on_cancel=True, limiter=limiter)

    return look_up


class Name:
    """One host name and its addresses, as long as something holds it.

    `failure` says why the last look-up failed; it is empty after a good one.
    """

    def __init__(self, host: str, look_up: LookUp) -> None:
        self.host = host
        self.failure = ""
        self.hosts: tuple[Host, ...] = ()
        self._look_up = look_up
        self._looking: trio.Event | None = None
        self._began_at = -math.inf
        self._found_at = -math.inf
        self._unproven: tuple[Host, ...] = ()
        self._before: tuple[Host, ...] = ()
        self._failed: dict[Address, float] = {}

    def __repr__(self) -> str:
        return f"<Name {self.host} {[host[1] for host in self.hosts]} {self.failure}>"

    # -- looking up ---------------------------------------------------------------------------

    @property
    def looking(self) -> bool:
        """Whether a look-up is under way."""
        return self._looking is not None

    def refresh(self, now: float) -> None:
        """Start a look-up, unless one is under way or has been started a moment ago."""
        if self._looking is None and now - self._began_at >= AGAIN_AFTER:
            self._began_at = now
            self._looking = trio.Event()
            # A system task: it outlives the request that has started it, and serves all others.
            trio.lowlevel.spawn_system_task(self._run, self._looking)

    def refresh_if_old(self, now: float) -> None:
        if now - self._found_at >= BELIEVED_FOR:
            self.refresh(now)

    async def looked(self) -> None:
        """Wait for the end of the look-up that is under way, if one is."""
        if self._looking is not None:
            await self._looking.wait()

    async def found(self) -> None:
        """Wait until an address is known. Raises NameNotResolved if the resolver gives none."""
        if not self.hosts:
            await self.looked()
        if not self.hosts:
            raise NameNotResolved(f"cannot resolve {self.host}: {self.failure}")

    async def _run(self, ended: trio.Event) -> None:
        """One look-up. Raises nothing: an error in a system task would end the whole router."""
        failure = f"no answer from the resolver in {LOOK_UP_LIMIT:g} s"
        found: Sequence[Host] = ()
        try:
            with trio.move_on_after(LOOK_UP_LIMIT):
                found = await self._look_up(self.host)
                failure = "" if found else "the resolver knows no address"
        except OSError as error:
            failure = error.strerror or str(error)
        except UnicodeError:
            failure = "it is no valid host name"
        except Exception:  # see above: the look-up may be of any kind, and its defects are logged
            logger.exception("the look-up of %s failed", self.host)
            failure = "the look-up failed (see the log)"
        finally:
            self._looking = None
            ended.set()
        if found:
            self._learn(tuple(found[:MAX_ADDRESSES]), trio.current_time())
        else:
            self._note_failure(failure)

    def _learn(self, hosts: tuple[Host, ...], now: float) -> None:
        if self.failure and self.hosts:
            logger.info("%s can be resolved again", self.host)
        self.failure, self._found_at = "", now
        if set(hosts) != set(self.hosts):
            # What worked until now stays until one of the new ones has worked: resolvers lie, too.
            self._before, self._unproven = self.hosts, hosts
            logger.debug("%s has the addresses %s", self.host, ", ".join(h[1] for h in hosts))
            alike = [host[1] for host in hosts if host[0] == hosts[0][0]]
            if len(alike) > 1 >= len([h for h in self.hosts if h[0] == hosts[0][0]]):
                logger.warning(
                    "%s has %d addresses (%s): they are used in turn, as one server. Name each in "
                    "servers.toml if they are different machines",
                    *(self.host, len(alike), ", ".join(alike[:4])),
                )
        self.hosts = hosts
        kept = {host[1] for host in (*hosts, *self._before)}
        self._failed = {a: until for a, until in self._failed.items() if a[1][0] in kept}

    def _note_failure(self, failure: str) -> None:
        if not self.failure:
            logger.warning(
                "cannot resolve %s: %s%s",
                *(self.host, failure),
                ": its last known addresses stay in use" if self.hosts else "",
            )
        self.failure = failure

    def seed(self, hosts: Sequence[tuple[int, str, int, int]]) -> None:
        """Take over what another process knows, unless something is known here."""
        if not self.hosts:
            self.hosts = tuple((socket.AddressFamily(one[0]), *one[1:]) for one in hosts)

    # -- using --------------------------------------------------------------------------------

    def addresses(self, port: int, now: float, turn: int) -> list[Address]:
        """Where to connect to, in the order in which to try.

        The preferred family first, then both by turns (RFC 8305 section 4). `turn` is how far the
        addresses of a family are rotated: those of one family are equals. Addresses that have
        failed lately come last, those of the answer before a little earlier.
        """
        current = _interleaved(self.hosts, turn)
        before = [host for host in self._before if host not in current]
        addresses = [_with_port(host, port) for host in (*current, *before)]
        return sorted(addresses, key=lambda address: self._fails(address, now))

    def _fails(self, address: Address, now: float) -> bool:
        return self._failed.get(address, -math.inf) > now

    def failed(self, address: Address, now: float) -> None:
        """It could not be connected to, or not soon: others go first, and the name is looked up."""
        self._failed[address] = now + FAILED_FOR
        self.refresh(now)

    def worked(self, address: Address) -> None:
        """A connection to it has been made."""
        self._failed.pop(address, None)
        if self._unproven and any(host[1] == address[1][0] for host in self._unproven):
            self._unproven = self._before = ()


class Resolver:
    """The names of all servers. Give it a `look_up` of your own to replace the system's."""

    def __init__(self, look_up: LookUp | None = None) -> None:
        self._look_up = look_up or system_look_up()
        self._names: weakref.WeakValueDictionary[str, Name] = weakref.WeakValueDictionary()

    def name(self, host: str) -> Name:
        """The same for all that ask, and for as long as any of them keeps it."""
        name = self._names.get(host)
        if name is None:
            name = self._names[host] = Name(host, self._look_up)
        return name

    def known(self) -> dict[str, list[tuple[int, str, int, int]]]:
        """The addresses of all names, to `take_over` in another process."""
        names = list(self._names.values())
        return {
            name.host: [
                (int(family), text, flow, scope) for family, text, flow, scope in name.hosts
            ]
            for name in names
            if name.hosts
        }

    def take_over(self, known: Mapping[str, Sequence[tuple[int, str, int, int]]]) -> None:
        """What another process knows of the names that are used here."""
        for host, hosts in known.items():
            name = self._names.get(host)
            if name is not None:
                name.seed(hosts)


def literal_address(host: str, port: int) -> Address | None:
    """The address that a URL's host is; None if it is a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return _with_port((family, host, 0, 0), port)
    return None


def _with_port(host: Host, port: int) -> Address:
    family, text, flow, scope = host
    return (
        (family, (text, port)) if family == socket.AF_INET else (family, (text, port, flow, scope))
    )


def _interleaved(hosts: Sequence[Host], turn: int) -> list[Host]:
    by_family: dict[socket.AddressFamily, list[Host]] = {}
    for host in hosts:
        by_family.setdefault(host[0], []).append(host)
    turned = [
        alike[turn % len(alike) :] + alike[: turn % len(alike)] for alike in by_family.values()
    ]
    return [host for host in chain.from_iterable(zip_longest(*turned)) if host is not None]
