"""Names of servers: a resolver that fails, hangs, changes and lies.

Also addresses that swallow SYNs.
"""

from __future__ import annotations

import errno
import gc
import logging
import socket
from collections.abc import Callable

import pytest
import trio

from support.scripted_server import ScriptedServer
from vllm_router.errors import ConnectFailed, NameNotResolved, OwnFault
from vllm_router.http.client import connect, race
from vllm_router.http.client.connect import SLOW_AFTER
from vllm_router.http.client.pool import Pool
from vllm_router.http.client.race import FRESH_WAIT, Race
from vllm_router.http.client.resolver import (
    AGAIN_AFTER,
    BELIEVED_FOR,
    FAILED_FOR,
    LOOK_UP_LIMIT,
    MAX_ADDRESSES,
    Address,
    Host,
    Name,
    Resolver,
    literal_address,
)

V4, V6 = socket.AF_INET, socket.AF_INET6
NO_SUCH_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
NO_ANSWER = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def host(text: str) -> Host:
    return (V6 if ":" in text else V4), text, 0, 0


def texts(addresses: list[Address]) -> list[str]:
    return [address[1][0] for address in addresses]


class FakeResolver:
    """Answers as configured: addresses, an exception, or after a delay (None: never)."""

    def __init__(self, *answer: str) -> None:
        self.answer: tuple[str, ...] | Exception = answer
        self.delay: float | None = 0.01
        self.asked: list[tuple[str, float]] = []

    async def __call__(self, name: str) -> list[Host]:
        self.asked.append((name, trio.current_time()))
        await trio.sleep(self.delay if self.delay is not None else float("inf"))
        if isinstance(self.answer, Exception):
            raise self.answer
        return [host(text) for text in self.answer]

    def name(self, of: str = "gpu.test") -> Name:
        return Resolver(self).name(of)


class Network:
    """The result of connecting to each address: a socket at once, after seconds, or an error.

    An address that is missing swallows the SYN.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_there: dict[str, float | Exception] = {}
        self.tried: list[tuple[str, float]] = []
        self.sockets: list[socket.socket] = []
        self._peers: list[socket.socket] = []
        monkeypatch.setattr(race, "connect", self.connect)

    async def connect(self, address: Address, slow: Callable[[], None]) -> socket.socket:
        text = address[1][0]
        self.tried.append((text, trio.current_time()))
        does = self.is_there.get(text, float("inf"))
        if isinstance(does, Exception):
            await trio.lowlevel.checkpoint()
            raise does
        if does > SLOW_AFTER:
            await trio.sleep(SLOW_AFTER)
            slow()
            does -= SLOW_AFTER
        await trio.sleep(does)
        ours, theirs = socket.socketpair()
        self.sockets.append(ours)
        self._peers.append(theirs)
        return ours

    def close(self) -> None:
        for sock in (*self.sockets, *self._peers):
            sock.close()

    @property
    def open(self) -> int:
        return sum(sock.fileno() >= 0 for sock in self.sockets)


@pytest.fixture
def network(monkeypatch):
    network = Network(monkeypatch)
    yield network
    network.close()


async def reach(name: Name, turn: int = 0, within: float = 5.0) -> str:
    """The address of a new connection."""
    with trio.fail_after(within):
        _, address = await Race(name, 80, turn).next()
    return address[1][0]


# -- the resolver ------------------------------------------------------------------------------


async def test_name_many_connections_look_up_once(autojump_clock, network):
    resolver = FakeResolver("10.0.0.1")
    names = Resolver(resolver)
    network.is_there["10.0.0.1"] = 0.0
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(reach, names.name("gpu.test"))
    assert len(resolver.asked) == 1


async def test_name_known_is_refreshed_in_background(autojump_clock, network):
    resolver = FakeResolver("10.0.0.1")
    name = resolver.name()
    network.is_there["10.0.0.1"] = 0.0
    await reach(name)
    resolver.delay = 20.0
    await trio.sleep(BELIEVED_FOR)
    began = trio.current_time()
    await reach(name)
    assert trio.current_time() == began
    assert name.looking
    assert len(resolver.asked) == 2


@pytest.mark.parametrize(
    "trouble", [NO_ANSWER, NO_SUCH_NAME, OSError("broken"), (), None, ValueError()]
)
async def test_name_addresses_survive_any_resolver_failure(
    autojump_clock, network, caplog, trouble
):
    """For two hours in which it fails, knows no such name, finds nothing, or hangs."""
    resolver = FakeResolver("10.0.0.1")
    name = resolver.name()
    network.is_there["10.0.0.1"] = 0.0
    await reach(name)
    if trouble is None:
        resolver.delay = None
    else:
        resolver.answer = trouble
    for _ in range(120):
        await trio.sleep(60)
        began = trio.current_time()
        assert await reach(name) == "10.0.0.1"
        assert trio.current_time() == began
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "cannot resolve gpu.test" in warnings[0]
    assert "last known addresses stay in use" in warnings[0]


async def test_name_recovers_with_the_resolver(autojump_clock, network):
    resolver = FakeResolver("10.0.0.1")
    name = resolver.name()
    network.is_there.update({"10.0.0.1": 0.0, "10.0.0.2": 0.0})
    await reach(name)
    resolver.answer = NO_ANSWER
    await trio.sleep(BELIEVED_FOR)
    await reach(name)
    resolver.answer = ("10.0.0.2",)
    await trio.sleep(AGAIN_AFTER)
    await reach(name)
    await name.looked()
    assert await reach(name) == "10.0.0.2"
    assert name.failure == ""


async def test_name_never_resolved_is_not_counted_against_server(autojump_clock, network):
    name = FakeResolver().name()
    with pytest.raises(NameNotResolved, match=r"gpu\.test: the resolver knows no address"):
        await reach(name)


async def test_name_hanging_resolver_is_abandoned_and_asked_again(autojump_clock, network):
    resolver = FakeResolver("10.0.0.1")
    resolver.delay = None
    name = resolver.name()
    with pytest.raises(NameNotResolved, match="no answer from the resolver in 60 s"):
        await reach(name, within=LOOK_UP_LIMIT + 1)
    resolver.delay = 0.1
    network.is_there["10.0.0.1"] = 0.0
    assert await reach(name) == "10.0.0.1"


async def test_name_failing_resolver_is_not_flooded(autojump_clock, network):
    resolver = FakeResolver()
    resolver.answer = NO_ANSWER
    name = resolver.name()
    for _ in range(100):
        with pytest.raises(NameNotResolved):
            await reach(name)
        await trio.sleep(0.1)
    assert len(resolver.asked) <= 12


async def test_resolver_forgets_unused_names(autojump_clock):
    resolver = Resolver(FakeResolver("10.0.0.1"))
    name = resolver.name("gpu.test")
    assert resolver.name("gpu.test") is name
    del name
    gc.collect()
    assert not list(resolver._names)


async def test_system_lookup_reads_hosts_file():
    name = Resolver().name("localhost")
    name.refresh(trio.current_time())
    with trio.fail_after(30):
        await name.found()
    assert {host[1] for host in name.hosts} <= {"127.0.0.1", "::1"}


async def test_system_lookup_invalid_name_is_not_resolved():
    with pytest.raises(NameNotResolved), trio.fail_after(30):
        await Pool(f"http://{'a' * 70}.test:1").open()


# -- addresses ---------------------------------------------------------------------------------


async def test_addresses_alternate_families_and_rotate_equals(autojump_clock):
    name = FakeResolver("fd00::1", "fd00::2", "10.0.0.1", "10.0.0.2", "10.0.0.3").name()
    name.refresh(0.0)
    await name.found()
    assert texts(name.addresses(80, 0.0, 0)) == [
        *("fd00::1", "10.0.0.1", "fd00::2", "10.0.0.2", "10.0.0.3")
    ]
    assert texts(name.addresses(80, 0.0, 1))[:2] == ["fd00::2", "10.0.0.2"]
    assert name.addresses(80, 0.0, 0)[:2] == [
        (V6, ("fd00::1", 80, 0, 0)),
        (V4, ("10.0.0.1", 80)),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1", (V4, ("127.0.0.1", 8000))),
        ("::1", (V6, ("::1", 8000, 0, 0))),
        ("gpu-1", None),
        ("1.2.3", None),
        ("", None),
    ],
)
def test_literal_address_needs_no_lookup(text, expected):
    assert literal_address(text, 8000) == expected


async def test_addresses_are_limited(autojump_clock):
    many = [f"10.{number // 250}.1.{number % 250}" for number in range(10_000)]
    name = FakeResolver(*many).name()
    name.refresh(0.0)
    await name.found()
    assert texts(name.addresses(80, 0.0, 0)) == many[:MAX_ADDRESSES]


async def test_pool_rotates_addresses_of_a_name(autojump_clock, network, caplog):
    resolver = Resolver(FakeResolver("10.0.0.1", "10.0.0.2"))
    network.is_there.update({"10.0.0.1": 0.0, "10.0.0.2": 0.0})
    pool = Pool("http://gpu.test:80", resolver=resolver)
    probes = Pool("http://gpu.test:80", resolver=resolver, spread=False)
    for _ in range(10):
        (await pool.open()).close()
    assert {text for text, _ in network.tried[:2]} == {"10.0.0.1", "10.0.0.2"}
    assert [text for text, _ in network.tried].count("10.0.0.1") == 5
    network.tried.clear()
    for _ in range(10):
        (await probes.open()).close()
    assert {text for text, _ in network.tried} == {"10.0.0.1"}
    assert "gpu.test has 2 addresses (10.0.0.1, 10.0.0.2)" in caplog.text


async def test_pool_name_in_both_families_logs_no_warning(autojump_clock, network, caplog):
    network.is_there["fd00::1"] = 0.0
    pool = Pool("http://gpu.test:80", resolver=Resolver(FakeResolver("fd00::1", "10.0.0.1")))
    for _ in range(4):
        (await pool.open()).close()
    assert [text for text, _ in network.tried] == ["fd00::1"] * 4
    assert "addresses" not in caplog.text


# -- the race ----------------------------------------------------------------------------------


async def test_race_swallowing_first_address_costs_a_quarter_second_once(autojump_clock, network):
    name = FakeResolver("10.0.0.1", "10.0.0.2").name()
    network.is_there["10.0.0.2"] = 0.0
    began = trio.current_time()
    assert await reach(name) == "10.0.0.2"
    assert trio.current_time() - began == pytest.approx(SLOW_AFTER + 0.01)
    began = trio.current_time()
    assert await reach(name) == "10.0.0.2"
    assert trio.current_time() == began
    await trio.sleep(FAILED_FOR + 1)
    assert await reach(name) == "10.0.0.2"
    assert network.open == 3


async def test_race_refused_address_costs_nothing(autojump_clock, network):
    name = FakeResolver("10.0.0.1", "10.0.0.2").name()
    network.is_there.update({"10.0.0.1": ConnectFailed("Connection refused"), "10.0.0.2": 0.0})
    name.refresh(0.0)
    await name.found()
    began = trio.current_time()
    assert await reach(name) == "10.0.0.2"
    assert trio.current_time() == began


@pytest.mark.parametrize("old", [float("inf"), ConnectFailed("Connection refused")])
@pytest.mark.parametrize("delay", [0.01, 1.5])
async def test_race_moved_name_is_followed_within_one_request(autojump_clock, network, old, delay):
    """The old address swallows or refuses; if it swallows, a slow resolver is waited for."""
    resolver = FakeResolver("10.0.0.1")
    name = resolver.name()
    network.is_there["10.0.0.1"] = 0.0
    await reach(name)
    await trio.sleep(5)
    network.is_there.update({"10.0.0.1": old, "10.0.0.2": 0.0})
    resolver.answer, resolver.delay = ("10.0.0.2",), delay
    if isinstance(old, Exception) and delay > FRESH_WAIT:
        with pytest.raises(ConnectFailed, match=r"Connection refused \(gpu\.test: 10\.0\.0\.1\)"):
            await reach(name)
        await trio.sleep(delay)
    assert await reach(name, within=2.0) == "10.0.0.2"
    assert await reach(name) == "10.0.0.2"


async def test_race_lying_resolver_does_not_cut_off_working_server(autojump_clock, network):
    """It returns an address without a listener for ten minutes."""
    resolver = FakeResolver("10.0.0.1")
    name = resolver.name()
    network.is_there.update({"10.0.0.1": 0.0, "192.0.2.1": ConnectFailed("refused")})
    await reach(name)
    resolver.answer = ("192.0.2.1",)
    for _ in range(60):
        await trio.sleep(10)
        assert await reach(name) == "10.0.0.1"


async def test_race_old_address_is_forgotten_once_new_one_works(autojump_clock, network):
    resolver = FakeResolver("10.0.0.1")
    name = resolver.name()
    network.is_there.update({"10.0.0.1": 0.0, "10.0.0.2": 0.0})
    await reach(name)
    resolver.answer = ("10.0.0.2",)
    await trio.sleep(BELIEVED_FOR)
    await reach(name)
    await name.looked()
    assert await reach(name) == "10.0.0.2"
    assert texts(name.addresses(80, trio.current_time(), 0)) == ["10.0.0.2"]


async def test_race_all_refused_reports_addresses_and_reasons(autojump_clock, network):
    name = FakeResolver("10.0.0.1", "fd00::1").name()
    network.is_there["10.0.0.1"] = ConnectFailed("Connection refused")
    network.is_there["fd00::1"] = ConnectFailed("Network is unreachable")
    with pytest.raises(ConnectFailed) as caught:
        await reach(name)
    assert str(caught.value) == (
        "gpu.test: Connection refused (10.0.0.1); Network is unreachable (fd00::1)"
    )


async def test_race_router_error_at_one_address_tries_the_others(autojump_clock, network):
    name = FakeResolver("::1", "127.0.0.1").name()
    network.is_there.update({"::1": OwnFault("cannot assign"), "127.0.0.1": 0.0})
    assert await reach(name) == "127.0.0.1"
    network.is_there["127.0.0.1"] = OwnFault("Too many open files")
    with pytest.raises(OwnFault):
        await reach(name)


async def test_race_losers_and_cancelled_races_leak_no_socket(autojump_clock, network):
    name = FakeResolver("10.0.0.1", "10.0.0.2").name()
    network.is_there.update({"10.0.0.1": 0.4, "10.0.0.2": 0.149})
    await reach(name)
    await trio.sleep(1)
    assert network.open == 1
    network.is_there.clear()
    with trio.move_on_after(1) as scope:
        await reach(name)
    assert scope.cancelled_caught
    assert network.open == 1


async def test_race_hanging_resolver_does_not_delay_refusal(autojump_clock, network):
    resolver = FakeResolver("10.0.0.1")
    name = resolver.name()
    network.is_there["10.0.0.1"] = ConnectFailed("Connection refused")
    with pytest.raises(ConnectFailed):
        await reach(name)
    resolver.delay = None
    await trio.sleep(2)
    began = trio.current_time()
    with pytest.raises(ConnectFailed, match="refused"):
        await reach(name)
    assert trio.current_time() - began == pytest.approx(FRESH_WAIT)


# -- sockets -----------------------------------------------------------------------------------


async def test_connect_enables_keepalive_on_sockets():
    async with trio.open_nursery() as nursery:
        server = ScriptedServer(nursery)
        port = await nursery.start(server.listen)
        with await connect.connect((V4, ("127.0.0.1", port))) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 15
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 4
        nursery.cancel_scope.cancel()


async def test_connect_slow_is_logged_and_continues():
    calls: list[str] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        target = listener.getsockname()
        crowd = [socket.socket() for _ in range(4)]
        for sock in crowd:
            sock.setblocking(False)
            assert sock.connect_ex(target) in (0, errno.EINPROGRESS)
        with trio.move_on_after(30) as scope:
            await connect.connect((V4, target), lambda: (calls.append("slow"), scope.cancel()))
        for sock in crowd:
            sock.close()
    assert calls == ["slow"]
