"""Addresses of host names: looked up in the background, and kept while the resolver fails.

One task at a time looks up a name, for any number of connections that wait for it. Once addresses
are known, no connection waits for the resolver: they are used during a look-up, and stay in use if
it fails, hangs or finds nothing (RFC 8767, serving stale data). An address that refuses
connections is tried last for a while, and starts a new look-up at once.
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
"""Seconds after a successful look-up until the next use of the name starts another."""

AGAIN_AFTER = 1.0
"""Minimum of seconds between the starts of two look-ups of a name."""

LOOK_UP_LIMIT = 60.0
"""Seconds until a look-up is abandoned; the C library usually fails before."""

FAILED_FOR = 60.0
"""Seconds for which an address is tried last after a failed connection attempt."""

MAX_ADDRESSES = 64
"""Addresses used of one name: every new connection sorts them."""

MAX_LOOK_UPS = 16
"""Concurrent look-ups: each has a thread, which cannot be stopped while it hangs."""

Host = tuple[socket.AddressFamily, str, int, int]
"""An address without a port: family, text, and the flow and scope of IPv6."""

Address = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]
"""A family, and the argument of `socket.connect` for it."""

LookUp = Callable[[str], Awaitable[Sequence[Host]]]
"""Finds the addresses of a name, best first. Raises OSError, or UnicodeError for invalid names."""


_FAMILIES: frozenset[int] = frozenset({socket.AF_INET, socket.AF_INET6})


def system_look_up() -> LookUp:
    """`getaddrinfo` in separate threads: it honours hosts files, search domains and nsswitch.

    A hanging look-up does not take a thread from other work. Tests may replace
    `socket.getaddrinfo` at any time.
    """
    limiter = trio.CapacityLimiter(MAX_LOOK_UPS)

    def run_getaddrinfo(name: str) -> list[Host]:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        hosts = [
            (family, str(address[0]), *((address[2], address[3]) if len(address) == 4 else (0, 0)))
            for family, _, _, _, address in found
            if family in _FAMILIES
        ]
        return list(dict.fromkeys(hosts))

    async def look_up(name: str) -> list[Host]:
        return await trio.to_thread.run_sync(
            run_getaddrinfo, name, abandon_on_cancel=True, limiter=limiter
        )

    return look_up


class Name:
    """One host name and its addresses. `Resolver` refers to it weakly.

    `failure` is the reason of the last failed look-up; empty after a successful one.
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
        """Whether a look-up is running."""
        return self._looking is not None

    def refresh(self, now: float) -> None:
        """Start a look-up, unless one is running or started less than AGAIN_AFTER ago."""
        if self._looking is None and now - self._began_at >= AGAIN_AFTER:
            self._began_at = now
            self._looking = trio.Event()
            # A system task: it outlives the request that starts it, and serves all others.
            trio.lowlevel.spawn_system_task(self._run, self._looking)

    def refresh_if_old(self, now: float) -> None:
        if now - self._found_at >= BELIEVED_FOR:
            self.refresh(now)

    async def looked(self) -> None:
        """Wait for the end of the running look-up, if any."""
        if self._looking is not None:
            await self._looking.wait()

    async def found(self) -> None:
        """Wait until an address is known. Raises NameNotResolved if the look-up finds none."""
        if not self.hosts:
            await self.looked()
        if not self.hosts:
            raise NameNotResolved(f"cannot resolve {self.host}: {self.failure}")

    async def _run(self, ended: trio.Event) -> None:
        """Run one look-up. Raises nothing: an error in a system task would end the process."""
        failure = f"no answer from the resolver in {LOOK_UP_LIMIT:g} s"
        found: Sequence[Host] = ()
        try:
            with trio.move_on_after(LOOK_UP_LIMIT):
                found = await self._look_up(self.host)
                failure = "" if found else "the resolver knows no address"
        except OSError as error:
            failure = error.strerror or str(error)
        except UnicodeError:
            failure = "it is not a valid host name"
        except Exception:  # see above: `look_up` may be any function
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
            # Old addresses stay as a fallback until a new one has worked: resolvers may be wrong.
            self._before, self._unproven = self.hosts, hosts
            logger.debug("%s has the addresses %s", self.host, ", ".join(h[1] for h in hosts))
            alike = [host[1] for host in hosts if host[0] == hosts[0][0]]
            if len(alike) > 1 >= len([h for h in self.hosts if h[0] == hosts[0][0]]):
                logger.warning(
                    "%s has %d addresses (%s), which are used in turn as one server; if they are "
                    "different machines, list each of them in servers.toml",
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
                "; its last known addresses stay in use" if self.hosts else "",
            )
        self.failure = failure

    def seed(self, hosts: Sequence[tuple[int, str, int, int]]) -> None:
        """Use addresses that another process knows, unless some are known here."""
        if not self.hosts:
            self.hosts = tuple((socket.AddressFamily(one[0]), *one[1:]) for one in hosts)

    # -- using --------------------------------------------------------------------------------

    def addresses(self, port: int, now: float, turn: int) -> list[Address]:
        """Addresses in the order in which to try them.

        The preferred family first, then both alternately (RFC 8305 section 4). `turn` rotates the
        addresses of each family, which are equals. Addresses of the previous look-up follow, and
        addresses that have failed recently come last.
        """
        current = _interleaved(self.hosts, turn)
        before = [host for host in self._before if host not in current]
        addresses = [_with_port(host, port) for host in (*current, *before)]
        return sorted(addresses, key=lambda address: self._has_failed(address, now))

    def _has_failed(self, address: Address, now: float) -> bool:
        return self._failed.get(address, -math.inf) > now

    def mark_failed(self, address: Address, now: float) -> None:
        """An attempt failed or is slow: try the address last, and look up the name again."""
        self._failed[address] = now + FAILED_FOR
        self.refresh(now)

    def mark_working(self, address: Address) -> None:
        """A connection attempt to the address succeeded."""
        self._failed.pop(address, None)
        if self._unproven and any(host[1] == address[1][0] for host in self._unproven):
            self._unproven = self._before = ()


class Resolver:
    """The names of all servers. `look_up` replaces the system's resolver."""

    def __init__(self, look_up: LookUp | None = None) -> None:
        self._look_up = look_up or system_look_up()
        self._names: weakref.WeakValueDictionary[str, Name] = weakref.WeakValueDictionary()

    def name(self, host: str) -> Name:
        """The shared `Name` of a host; it lives as long as a caller keeps it."""
        name = self._names.get(host)
        if name is None:
            name = self._names[host] = Name(host, self._look_up)
        return name

    def known(self) -> dict[str, list[tuple[int, str, int, int]]]:
        """Addresses of all names, for `take_over` in another process."""
        names = list(self._names.values())
        return {
            name.host: [
                (int(family), text, flow, scope) for family, text, flow, scope in name.hosts
            ]
            for name in names
            if name.hosts
        }

    def take_over(self, known: Mapping[str, Sequence[tuple[int, str, int, int]]]) -> None:
        """Use addresses that another process knows."""
        for host, hosts in known.items():
            name = self._names.get(host)
            if name is not None:
                name.seed(hosts)


def literal_address(host: str, port: int) -> Address | None:
    """The address if a URL's host is a literal one; None for a name."""
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
