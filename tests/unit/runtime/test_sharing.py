"""Several routers on one store, in virtual time: what they share, and every fault of the store."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from random import Random

import msgspec
import pytest
import trio
from trio.testing import MockClock

from support.fleet_makers import come_up, make_config
from support.shared_bus import Bus
from vllm_router.config.auth import KeyConfig
from vllm_router.config.schema import Config
from vllm_router.config.shared import SharedConfig, read_address
from vllm_router.errors import Refused
from vllm_router.fleet.server import Lease, Server
from vllm_router.proxy.quarantine import fingerprint
from vllm_router.routing.prompt.blocks import Prompt, hash_blocks
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.sharing.messages import MAX_BYTES, About, Batch, ServerLevel, encode
from vllm_router.routing.sharing.peers import RouterView
from vllm_router.runtime.sharing.router_share import configuration_digest, share_alone
from vllm_router.runtime.sharing.store import EntryId, Store, StoreError, Turn
from vllm_router.runtime.sharing.task import LATE, PERIOD, SharedState
from vllm_router.runtime.supervisor import Supervisor

TEXT = bytes(n * n % 251 for n in range(40_000))
LONG = RoutingInfo("m", stream=True, prompt=Prompt(hash_blocks(TEXT), len(TEXT), conversation=1))
RATE = 600.0
TABLES = f"""
[auth]
keys = [{{ name = "team", key = "k", requests_per_minute = {RATE}, max_concurrent_requests = 6 }}]
[shared]
url = "redis://store"
name = "%s"
"""


def config(name: str = "gw", **settings: object) -> Config:
    return make_config(3, tables=TABLES % name, **settings)


class Router:
    """One router of the fleet, without its other tasks."""

    def __init__(self, bus: Bus | Cable, name: str, **settings: object) -> None:
        self.supervisor = Supervisor(config(name, **settings), None, Random(1))
        self.checked: list[str] = []
        self.shared: SharedState = share_alone(
            self.supervisor,
            lambda server: self.checked.append(server.name),
            self.supervisor.scrapes,
            bus.open,
        )
        self.supervisor.shared = self.shared
        self.context = self.supervisor.proxy.context
        for server in self.supervisor.fleet.servers.values():
            come_up(server, trio.current_time())
        self.key = self.supervisor.config.auth.keys[0]
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        self.shared.use(self.supervisor.config.shared)
        with self.scope:
            await self.shared.run()

    def server(self, name: str) -> Server:
        return self.supervisor.fleet.servers[name]

    def send(self, name: str) -> Lease:
        lease = self.server(name).lease(trio.current_time())
        self.context.policies.default.leased(lease, None, LONG, trio.current_time())
        return lease

    def serve(self, name: str) -> None:
        """A request that is answered at once, and leaves only its cached blocks."""
        lease = self.send(name)
        lease.release()
        self.context.policies.default.ended(lease, trio.current_time(), failed=False)

    def picks(self) -> set[str]:
        now = trio.current_time()
        candidates = self.supervisor.fleet.candidates("m", now)
        policy = self.context.policies.default
        return {policy.pick(candidates, LONG, now)[0].name for _ in range(20)}

    def admitted(self, wanted: int, key: KeyConfig | None = None) -> int:
        """How many of these requests the key may send now; each ends at once."""
        count = 0
        for _ in range(wanted):
            try:
                self.context.key_limits.enter(key or self.key, trio.current_time())
            except Refused:
                break
            self.context.key_limits.leave(key or self.key, 0.1)
            count += 1
        return count


def views(router: Router) -> list[RouterView]:
    """The other routers, as this one shows them."""
    status = router.shared.status()
    assert status is not None
    return status.routers


@asynccontextmanager
async def fleet(bus: Bus, count: int = 2, **settings: object) -> AsyncIterator[list[Router]]:
    """Routers that have heard of each other."""
    routers = [Router(bus, f"gw-{number}", **settings) for number in range(1, count + 1)]
    async with trio.open_nursery() as nursery:
        for router in routers:
            nursery.start_soon(router.run)
        await trio.sleep(4 * PERIOD)
        assert [router.shared.routers for router in routers] == [count] * count
        yield routers
        nursery.cancel_scope.cancel()


async def test_sharing_prompt_of_one_router_is_found_by_the_others(autojump_clock: MockClock):
    async with fleet(Bus(), 3) as (one, *others):
        lease = one.send("b")
        await trio.sleep(3 * PERIOD)
        rows = others[0].supervisor.proxy.context.policies.default.explain(
            others[0].supervisor.fleet.candidates("m", trio.current_time()),
            LONG,
            trio.current_time(),
        )
        parts = next(row.parts for row in rows if row.server.name == "b")
        assert parts["queued_tokens"] > 1000  # under way in the first router
        assert parts["cached_tokens"] > 1000
        one.context.policies.default.first_byte(lease)
        await trio.sleep(3 * PERIOD)
        assert [router.picks() for router in others] == [{"b"}, {"b"}]


async def test_sharing_adapters_of_one_router_need_slots_in_the_others(autojump_clock: MockClock):
    async with fleet(Bus()) as (one, other):
        now = trio.current_time()
        for router in (one, other):
            cards = {
                name: {"id": name, "parent": name[1:] and "m"} for name in ("m", "ad-1", "ad-2")
            }
            router.server("b").listed(cards, now)
        lease = one.server("b").lease(now)
        policy = one.context.policies.default
        policy.leased(lease, None, RoutingInfo("ad-1"), now)
        await trio.sleep(3 * PERIOD)
        policies = other.context.policies
        adapters = policies.default._estimate(other.server("b")).adapters
        assert adapters.requests("ad-1") == 1
        assert policies.adapter_requests() == {}
        policy.ended(lease, trio.current_time(), failed=False)
        await trio.sleep(3 * PERIOD)
        assert adapters.requests("ad-1") == 0


async def test_sharing_router_that_starts_reads_the_last_minutes(autojump_clock: MockClock):
    bus = Bus()
    async with fleet(bus, 2) as (one, _):
        one.serve("c")
        one.context.owners.remember("resp_1", one.server("a").url, "team")
        await trio.sleep(30)
        late = Router(bus, "late")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(late.run)
            await trio.sleep(3 * PERIOD)
            assert late.picks() == {"c"}
            owner = late.context.owners.find("resp_1")
            assert owner is not None
            assert owner.url == one.server("a").url
            nursery.cancel_scope.cancel()


async def test_sharing_silent_router_counts_for_nothing_and_is_shown_as_gone(
    autojump_clock: MockClock,
):
    async with fleet(Bus(), 2) as (one, other):
        one.send("a")
        await trio.sleep(3 * PERIOD)
        assert other.shared.peers.in_flight == {one.server("a").url: 1}
        one.scope.cancel()
        await trio.sleep(1.0 + 3 * PERIOD)
        assert other.shared.peers.in_flight == {}
        (view,) = views(other)
        assert (view.about.name, view.live) == ("gw-1", False)
        assert other.shared.routers == 1
        assert other.shared.up


async def test_sharing_views_show_version_and_configuration(autojump_clock: MockClock):
    async with fleet(Bus(), 2) as (one, other):
        (view,) = views(other)
        assert view.about.configuration == configuration_digest(one.supervisor.config)
        assert configuration_digest(config("x")) == configuration_digest(config("y"))
        assert configuration_digest(config(request_timeout=7)) != view.about.configuration
        assert configuration_digest(config(admin_listen="127.0.0.1:1")) == view.about.configuration
        assert view.about.age > 0


# -- drains ------------------------------------------------------------------------------------


async def test_sharing_drain_reaches_all_within_a_second_and_outlasts_routers(
    autojump_clock: MockClock,
):
    bus = Bus()
    async with fleet(bus, 3) as (one, *others):
        one.supervisor.drain_server("a", on=True)
        await trio.sleep(1.0)
        assert [router.server("a").draining for router in others] == [True, True]
    await trio.sleep(2)
    async with fleet(bus, 2) as (new, other):
        assert new.server("a").draining
        assert not new.server("b").draining
        other.supervisor.drain_server("a", on=False)
        await trio.sleep(1.0)
        assert not new.server("a").draining
        assert not other.server("a").draining


async def test_sharing_drain_during_an_outage_is_made_up_for(autojump_clock: MockClock):
    bus = Bus()
    async with fleet(bus, 2) as (one, other):
        bus.gone = True
        await trio.sleep(5)
        one.supervisor.drain_server("a", on=True)
        one.supervisor.drain_server("b", on=True)
        one.supervisor.drain_server("b", on=False)
        await trio.sleep(5)
        assert not other.server("a").draining
        bus.gone = False
        await trio.sleep(2)
        assert other.server("a").draining
        assert not other.server("b").draining


class Cable:
    """One router's way to the bus, which may be cut."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.cut = False

    async def open(self, config: SharedConfig, use: Callable[[Store], Awaitable[None]]) -> None:
        await use(self)

    async def turn(self, batch: bytes | None, drains: Mapping[str, bytes], after: EntryId) -> Turn:
        if self.cut:
            raise StoreError("cut")
        return await self.bus.turn(batch, drains, after)


async def test_sharing_drain_of_a_router_that_was_cut_off_yields_to_a_later_order(
    autojump_clock: MockClock,
):
    bus = Bus()
    async with fleet(bus, 1) as (other,), trio.open_nursery() as nursery:
        cable = Cable(bus)
        one = Router(cable, "gw-cut")
        nursery.start_soon(one.run)
        await trio.sleep(1)
        cable.cut = True
        await trio.sleep(5)
        one.supervisor.drain_server("a", on=True)
        one.supervisor.drain_server("b", on=True)
        await trio.sleep(30)
        other.supervisor.drain_server("a", on=True)
        await trio.sleep(30)
        other.supervisor.drain_server("a", on=False)
        await trio.sleep(5)
        one.supervisor.drain_server("c", on=True)
        await trio.sleep(5)
        cable.cut = False
        await trio.sleep(2)
        for router in (one, other):
            states = [router.server(name).draining for name in "abc"]
            assert states == [False, True, True]
        nursery.cancel_scope.cancel()


async def test_sharing_drain_survives_a_store_that_was_emptied(autojump_clock: MockClock):
    bus = Bus()
    async with fleet(bus, 2) as (one, other):
        one.supervisor.drain_server("a", on=True)
        await trio.sleep(1)
        bus.flush()
        await trio.sleep(1)
        assert one.server("a").draining
        assert other.server("a").draining
        assert list(bus.drains) == [one.server("a").url.encode()]


async def test_sharing_unreadable_drains_are_ignored(autojump_clock: MockClock):
    bus = Bus()
    async with fleet(bus, 1) as (one,):
        url = one.server("a").url.encode()
        bus.drains = {url: b"\xff", b"\xff\xfe": b"\x92\xc3\xa1x", b"u" * 5000: b"x" * 5000}
        await trio.sleep(1)
        assert not one.server("a").draining
        assert one.shared.up


# -- limits of keys ----------------------------------------------------------------------------


async def test_sharing_key_rate_holds_for_all_routers_together(autojump_clock: MockClock):
    async with fleet(Bus(), 3) as routers:
        assert routers[0].admitted(400) == 400
        await trio.sleep(3 * PERIOD)
        # One minute's requests, less those, and some that were refilled since.
        assert 190 <= routers[1].admitted(1000) <= 215
        await trio.sleep(3 * PERIOD)
        total = 0
        for _ in range(300):
            total += sum(router.admitted(5) for router in routers)
            await trio.sleep(0.1)
        assert total == pytest.approx(RATE / 2, rel=0.05)  # in half a minute


async def test_sharing_key_concurrency_holds_for_all_routers_together(autojump_clock: MockClock):
    async with fleet(Bus(), 2) as (one, other):
        for _ in range(4):
            one.context.key_limits.enter(one.key, trio.current_time())
        await trio.sleep(3 * PERIOD)
        for _ in range(2):
            other.context.key_limits.enter(other.key, trio.current_time())
        with pytest.raises(Refused, match="6 requests running already"):
            other.context.key_limits.enter(other.key, trio.current_time())
        one.scope.cancel()  # it is gone, and its requests with it
        await trio.sleep(2)
        other.context.key_limits.enter(other.key, trio.current_time())


async def test_sharing_key_use_outlasts_a_restart(autojump_clock: MockClock):
    bus = Bus()
    async with fleet(bus, 2) as (one, _):
        one.admitted(600)
        await trio.sleep(3 * PERIOD)
    await trio.sleep(3)
    async with fleet(bus, 1) as (new,):
        assert new.admitted(1000) <= 60  # what a few seconds have refilled


async def test_sharing_key_limits_are_divided_while_the_store_is_gone(autojump_clock: MockClock):
    bus = Bus()
    async with fleet(bus, 3) as routers:
        for router in routers:
            router.admitted(1000)
        bus.gone = True
        await trio.sleep(3)
        for router in routers:
            router.admitted(1000)
        assert [router.context.key_limits.routers for router in routers] == [3, 3, 3]
        total = 0
        for _ in range(60):
            total += sum(router.admitted(100) for router in routers)
            await trio.sleep(1)
        assert total == pytest.approx(RATE, rel=0.05)  # in one minute
        for _ in range(2):
            routers[0].context.key_limits.enter(routers[0].key, trio.current_time())
            await trio.sleep(1)
        with pytest.raises(Refused):
            routers[0].context.key_limits.enter(routers[0].key, trio.current_time())
        bus.gone = False
        await trio.sleep(2)
        assert [router.context.key_limits.routers for router in routers] == [1, 1, 1]
        # What was spent during the outage is not subtracted once more.
        assert routers[1].admitted(5) == 5


@pytest.mark.parametrize("taken", [False, True])
async def test_sharing_key_use_of_a_short_outage_is_not_subtracted_afterwards(
    autojump_clock: MockClock, taken: bool
):
    bus = Bus()
    async with fleet(bus, 3) as routers:
        routers[0].admitted(1000)
        await trio.sleep(3 * PERIOD)
        assert [router.admitted(1000) < 10 for router in routers] == [True] * 3
        # A frozen store takes the batches that it has received when it thaws.
        bus.takes_when_thawed = taken
        bus.freeze()
        await trio.sleep(3)
        for _ in range(20):
            for router in routers:
                router.admitted(100)
            await trio.sleep(1)
        bus.thaw()
        await trio.sleep(3)
        assert [router.shared.up for router in routers] == [True] * 3
        # Three seconds refill 30 requests; the outage had 200.
        assert sum(router.admitted(5) for router in routers) == 15


@pytest.mark.parametrize("outage", [5, 20, 400])
@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("meanwhile", [False, True])
async def test_sharing_router_that_starts_after_an_outage_counts_what_keys_used_in_it(
    autojump_clock: MockClock, outage: int, emptied: bool, meanwhile: bool
):
    """It had no part of the limits in the outage; a full bucket would be one minute's requests."""
    bus = Bus()
    async with fleet(bus, 3) as routers, trio.open_nursery() as nursery:
        for router in routers:
            router.admitted(1)
        bus.gone = True
        await trio.sleep(3)
        new = Router(bus, "gw-4")
        if meanwhile:
            nursery.start_soon(new.run)
        for _ in range(outage):
            for router in routers:
                router.admitted(1000)
            await trio.sleep(1)
        if emptied:
            bus.entries.clear()
        bus.gone = False
        for number in range(40):
            await trio.sleep(0.1)
            for router in routers:
                router.admitted(1000)
            if number == 20 and not meanwhile:
                nursery.start_soon(new.run)
        assert [router.shared.routers for router in (*routers, new)] == [4] * 4
        assert new.admitted(1000) <= 40  # refilled since, less what the others used
        nursery.cancel_scope.cancel()


async def test_sharing_key_use_of_an_outage_makes_no_debt_of_a_router_that_starts(
    autojump_clock: MockClock,
):
    """When in ten minutes the requests came is not known: at most its bucket is empty."""
    bus = Bus()
    async with fleet(bus, 2) as routers:
        bus.gone = True
        for _ in range(600):
            for router in routers:
                router.admitted(3)
            await trio.sleep(1)
        bus.gone = False
        await trio.sleep(2)
        async with trio.open_nursery() as nursery:
            new = Router(bus, "gw-3")
            nursery.start_soon(new.run)
            await trio.sleep(3)
            assert new.admitted(20) == 20
            nursery.cancel_scope.cancel()


# -- ejections and crashes ---------------------------------------------------------------------


async def test_sharing_ejection_is_a_hint_that_ejects_nothing_alone(autojump_clock: MockClock):
    async with fleet(Bus(), 2) as (one, other):
        for _ in range(3):
            one.supervisor.fleet.failed(
                one.server("a"), trio.current_time(), trial=False, jitter=1.0
            )
        one.supervisor.fleet.settle(trio.current_time())
        assert one.server("a").passive_health.ejected
        await trio.sleep(3 * PERIOD)
        health = other.server("a").passive_health
        assert other.checked == ["a"]
        assert (health.ejected, health.failures_in_row) == (False, 1)
        for _ in range(10):
            health.hint()
        assert not health.ejected
        now = trio.current_time()
        other.server("a").failed(now, trial=False, jitter=1.0)
        assert health.ejected


async def test_sharing_request_that_crashed_servers_is_refused_by_the_others(
    autojump_clock: MockClock,
):
    async with fleet(Bus(), 2) as (one, other):
        now = trio.current_time()
        body = b'{"prompt": "query of death"}'
        one.context.quarantine.remember(fingerprint(b"/v1/x", body), body, (), now)
        one.context.quarantine.tell(b"/v1/x", body)
        await trio.sleep(3 * PERIOD)
        quarantine = other.context.quarantine
        assert quarantine.entries
        assert quarantine.refuses(b"/v1/x", body, trio.current_time())
        assert not quarantine.refuses(b"/v1/x", body + b" ", trio.current_time())
        await trio.sleep(61)
        assert not quarantine.refuses(b"/v1/x", body, trio.current_time())


# -- faults of the store -----------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["gone", "frozen", "full"])
async def test_sharing_store_fails_and_returns(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, fault: str
):
    bus = Bus()
    caplog.set_level(logging.INFO)
    async with fleet(bus, 2) as (one, other):
        if fault == "frozen":
            bus.freeze()
        else:
            setattr(bus, fault, True)
        await trio.sleep(LATE + 1)
        assert not one.shared.up
        assert one.shared.problem
        await trio.sleep(60)
        assert one.shared.routers == 2
        one.serve("b")  # meanwhile
        assert other.shared.peers.in_flight == {}
        bus.thaw()
        bus.gone = bus.full = False
        await trio.sleep(3)
        assert one.shared.up
        assert other.shared.up
        assert other.picks() == {"b"}
        texts = [record.getMessage() for record in caplog.records]
        assert len([text for text in texts if "shared state is down" in text]) == 2  # one a router
        assert len([text for text in texts if "shared state is up" in text]) >= 4


async def test_sharing_store_that_is_never_there_costs_one_line(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
):
    bus = Bus()
    bus.gone = True
    router = Router(bus, "gw")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(router.run)
        await trio.sleep(30)
        assert not router.shared.up
        assert router.context.key_limits.routers == 1
        assert router.admitted(100) == 100
        nursery.cancel_scope.cancel()
    assert len([one for one in caplog.records if "shared state is down" in one.message]) == 1


async def test_sharing_store_emptied_or_with_another_clock_is_followed(autojump_clock: MockClock):
    bus = Bus()
    async with fleet(bus, 2) as (one, other):
        bus.flush()
        bus.clock -= 3_600_000
        await trio.sleep(2)
        one.serve("a")
        await trio.sleep(2)
        assert one.shared.up
        assert other.shared.routers == 2
        assert other.picks() == {"a"}
        bus.clock += 7_200_000
        await trio.sleep(2)
        assert other.shared.routers == 2


async def test_sharing_hostile_entries_are_dropped_and_counted(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
):
    bus = Bus()
    async with fleet(bus, 2) as (one, other):
        good = Batch("evil", 1, About("n", "v", "c", 1.0, 0))
        for content in (b"\xc1", bytes(MAX_BYTES + 1), encode(good)[:-1], b"\x92\x07\xc0"):
            bus.append(content)
        bus.append(b"")
        await trio.sleep(2)
        assert one.shared.dropped_batches == other.shared.dropped_batches == 4
        assert one.shared.up
        assert len([1 for one in caplog.records if "dropped a batch" in one.message]) == 2


async def test_sharing_flood_of_entries_does_not_stop_the_turns(autojump_clock: MockClock):
    """A store that always has more entries must not keep the task from its own batches."""
    bus = Bus()
    async with fleet(bus, 2) as (one, other):
        level = {one.server("a").url: ServerLevel(1.0, 1)}
        for number in range(3000):
            bus.append(encode(Batch(f"r{number}", 1, About("n", "v", "c", 1.0, 0), level)))
        await trio.sleep(5)
        assert one.shared.up
        assert other.shared.up
        assert len(views(one)) <= 128


async def test_sharing_follows_a_new_configuration(autojump_clock: MockClock):
    first, second = Bus(), Bus()
    async with fleet(first, 2) as (one, other):
        one.shared._open = second.open
        one.shared.use(make_config(1, tables='[shared]\nurl = "redis://elsewhere"').shared)
        await trio.sleep(3)
        assert one.shared.up
        assert second.entries
        assert other.shared.routers == 1
        one.shared.use(None)
        turns = second.turns
        await trio.sleep(3)
        assert second.turns == turns
        assert not one.shared.up
        assert one.context.key_limits.routers == 1


async def test_sharing_entry_that_is_too_long_is_skipped(autojump_clock: MockClock):
    bus = Bus()
    async with fleet(bus, 2) as (one, other):
        one.supervisor.drain_server("b", on=True)
        bus.longest = 1_000_000
        bus.append(bytes(bus.longest + 1))
        await trio.sleep(2)
        assert one.shared.failures
        assert (one.shared.up, one.shared.routers) == (True, 2)
        assert other.server("b").draining
        one.serve("c")
        await trio.sleep(3 * PERIOD)
        assert other.picks() == {"c"}


async def test_sharing_clock_of_the_store_set_back_spends_nothing_twice(autojump_clock: MockClock):
    bus = Bus()
    async with fleet(bus, 2) as (one, other):
        one.admitted(600)
        await trio.sleep(61)
        bus.clock -= 3_600_000
        await trio.sleep(2)
        late = Router(bus, "late")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(late.run)
            await trio.sleep(3 * PERIOD)
            assert late.admitted(500) == 500
            assert late.shared.routers == 3
            await trio.sleep(3 * PERIOD)
            assert other.admitted(200) < 150  # what the new router spends counts as ever
            nursery.cancel_scope.cancel()


async def test_sharing_another_address_keeps_limits_divided_and_reports_its_faults(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
):
    bus = Bus()
    async with fleet(bus, 3) as (one, *_):
        bus.gone = True
        await trio.sleep(3)
        shared = one.supervisor.config.shared
        assert shared is not None
        caplog.clear()
        one.shared.use(msgspec.structs.replace(shared, address=read_address("redis://new")))
        assert one.context.key_limits.routers == 3
        await trio.sleep(3)
        assert one.context.key_limits.routers == 3
        assert [text for text in caplog.messages if "down: redis://new" in text]
        one.shared.use(None)
        assert one.context.key_limits.routers == 1
