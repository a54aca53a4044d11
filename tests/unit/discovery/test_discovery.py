"""Sources as tasks: what is in force, what is reported, and reloads, in virtual time."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from support.fleet_makers import come_up, go_down
from vllm_router.config.discovered import Read, read_targets
from vllm_router.config.discovery import Found, SourceConfig
from vllm_router.config.parser import parse
from vllm_router.config.schema import Config
from vllm_router.discovery import source_task
from vllm_router.discovery.discovery import START_PATIENCE
from vllm_router.discovery.source import Again, Sink
from vllm_router.errors import ConfigError
from vllm_router.fleet.fleet import Fleet
from vllm_router.runtime.fleet_sources import FleetSources

FILE = '[discovery]\nfile = { path = "a.json" }\n'
TWO = '[discovery]\nfile = [{ path = "a.json" }, { path = "b.json" }]\n'
SERVERS = '[servers]\nservers = [{ url = "http://own:1", name = "own" }]\n'


def config(text: str) -> Config:
    return parse(text.encode(), "servers.toml", {})


class FakeSource:
    """A source that a test speaks for."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.asked = 0
        self.sink: Sink | None = None
        self.error: Exception | None = None

    async def run(self, sink: Sink, again: Again) -> None:
        self.sink = sink
        try:
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            while True:
                if await again.wait(1e6):
                    self.asked += 1
        finally:
            self.sink = None

    def say(self, *addresses: str) -> None:
        assert self.sink is not None
        self.sink.found([Found(address) for address in addresses])

    def say_by_priority(self, **addresses: int) -> None:
        assert self.sink is not None
        self.sink.found([Found(f"{host}:1", priority=number) for host, number in addresses.items()])

    def fail(self, problem: str = "no route") -> None:
        assert self.sink is not None
        self.sink.failed(problem)


class Rig:
    """FleetSources around a fleet, as in the supervisor."""

    def __init__(self, first: Config) -> None:
        self.config = first
        self.fleet = Fleet(first)
        self.made: dict[str, FakeSource] = {}
        self.news: list[str] = []
        self.kinds: list[str] = []
        self.refuse: Callable[[Config], None] = lambda config: None
        self.sources = FleetSources(
            first,
            self.fleet.answers,
            lambda item: self.news.append(item.text),
            lambda: self.config,
            self._prepare,
            self._apply,
            self._make,
        )

    def _make(self, source: SourceConfig) -> FakeSource:
        made = self.made[source.name] = FakeSource(source)
        return made

    async def _prepare(self, new: Config) -> None:
        await trio.lowlevel.checkpoint()

    def _apply(self, old: Config, new: Config, kind: str) -> None:
        self.refuse(new)
        assert old is self.config
        self.fleet.apply(new)
        self.config = new
        self.kinds.append(kind)

    def reload(self, text: str) -> None:
        self.sources.apply_file(self.sources.file_config, config(text))

    @property
    def names(self) -> list[str]:
        return sorted(self.fleet.servers)

    def up(self) -> None:
        for server in self.fleet.servers.values():
            come_up(server, trio.current_time())

    async def settle(self) -> None:
        await trio.sleep(0.5)


@asynccontextmanager
async def running(text: str) -> AsyncIterator[Rig]:
    rig = Rig(config(text))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.sources.run)
        await trio.testing.wait_all_tasks_blocked()
        yield rig
        nursery.cancel_scope.cancel()


async def test_discovery_set_becomes_fleet_and_keeps_live_state(autojump_clock: MockClock) -> None:
    async with running(FILE) as rig:
        rig.made["file"].say("a:1", "b:1")
        await rig.settle()
        assert rig.names == ["a:1", "b:1"]
        rig.up()
        kept = rig.fleet.servers["a:1"]
        rig.made["file"].say("a:1", "c:1")
        await rig.settle()
        assert rig.names == ["a:1", "c:1"]
        assert rig.fleet.servers["a:1"] is kept
        assert rig.kinds == ["discovery", "discovery"]


async def test_discovery_target_that_leaves_drains_with_its_requests(
    autojump_clock: MockClock,
) -> None:
    async with running(FILE) as rig:
        rig.made["file"].say("a:1", "b:1")
        await rig.settle()
        rig.up()
        server = rig.fleet.servers["b:1"]
        lease = server.lease(0.0)
        rig.made["file"].say("a:1")
        await rig.settle()
        assert rig.fleet.leaving == [server]
        assert server.draining
        rig.made["file"].say("a:1", "b:1")
        await rig.settle()
        assert rig.fleet.servers["b:1"] is server
        assert not server.draining
        lease.release()


async def test_discovery_same_set_changes_nothing(autojump_clock: MockClock) -> None:
    async with running(FILE) as rig:
        rig.made["file"].say("a:1", "b:1")
        await rig.settle()
        before = rig.config
        rig.made["file"].say("b:1", "a:1")
        await rig.settle()
        assert rig.config is before


async def test_discovery_set_that_a_source_repeats_is_read_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a thousand targets holds up the event loop for 30 ms."""
    reads: list[int] = []

    def read(found: Iterable[Found], *others: Any) -> Read:
        reads.append(len(list(found)))
        return read_targets(found, *others)

    monkeypatch.setattr(source_task, "read_targets", read)
    async with running(FILE) as rig:
        for addresses in (["a:1"], ["a:1", "b:1"], ["a:1", "b:1"], ["a:1"], []):
            rig.made["file"].say(*addresses)
            await rig.settle()
        assert reads == [1, 2, 1, 0]
        assert rig.names == []


async def test_discovery_failing_source_keeps_its_set_and_says_so(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(FILE) as rig:
        rig.made["file"].say("a:1")
        await rig.settle()
        for _ in range(900):
            await trio.sleep(1)
            rig.made["file"].fail("connection refused")
        assert rig.names == ["a:1"]
        (status,) = rig.sources.discovery.statuses
        assert status.problem == "connection refused"
        assert status.age(trio.current_time()) == pytest.approx(900.5)
        assert status.failures == 900
        warnings = [one for one in caplog.records if one.levelno == logging.WARNING]
        assert len(warnings) == 1, "said once"
        rig.made["file"].say("a:1")
        assert status.problem is None
        assert rig.news[-1] == "source file: answers again"


async def test_discovery_lost_fleet_is_kept_until_second_look(autojump_clock: MockClock) -> None:
    async with running(FILE) as rig:
        source = rig.made["file"]
        source.say("a:1", "b:1", "c:1", "d:1")
        await rig.settle()
        rig.up()
        source.say("d:1")
        await rig.settle()
        assert rig.names == ["a:1", "b:1", "c:1", "d:1"]
        assert "it names 1 server, but 3 that it left out still answer" in rig.news[-1]
        values = {"named": "1", "kept": "3"}
        assert rig.sources.discovery.statuses[0].doubt_values == values
        await trio.sleep(31)
        assert source.asked == 1, "the second look is asked for"
        assert rig.names == ["a:1", "b:1", "c:1", "d:1"]
        source.say("d:1")
        await rig.settle()
        assert rig.names == ["d:1"]
        assert not rig.sources.discovery.statuses[0].doubt


async def test_discovery_lost_fleet_that_the_checks_confirm_leaves_at_once(
    autojump_clock: MockClock,
) -> None:
    async with running(FILE) as rig:
        rig.made["file"].say("a:1", "b:1", "c:1")
        await rig.settle()
        rig.up()
        rig.made["file"].say()
        await rig.settle()
        assert len(rig.names) == 3
        for server in rig.fleet.servers.values():
            go_down(server, trio.current_time())
        await trio.sleep(2)
        assert rig.names == []


async def test_discovery_confirmed_set_is_a_second_look(autojump_clock: MockClock) -> None:
    async with running(FILE) as rig:
        source = rig.made["file"]
        source.say("a:1", "b:1", "c:1")
        await rig.settle()
        rig.up()
        source.say("a:1")
        await trio.sleep(32)
        assert len(rig.names) == 3
        assert source.sink is not None
        source.sink.confirmed()
        await rig.settle()
        assert rig.names == ["a:1"]


async def test_discovery_higher_priority_number_is_used_while_all_lower_ones_fail(
    autojump_clock: MockClock,
) -> None:
    async with running(FILE) as rig:
        source = rig.made["file"]
        source.say_by_priority(a=10, b=10, c=20, d=30)
        await trio.sleep(60)
        assert rig.names == ["a:1", "b:1"], "not checked yet is not failed"
        rig.up()
        first, second = rig.fleet.servers.values()
        go_down(first, trio.current_time())
        await trio.sleep(60)
        assert rig.names == ["a:1", "b:1"]
        go_down(second, trio.current_time())
        await trio.sleep(2)
        assert rig.names == ["a:1", "b:1", "c:1"]
        assert rig.news == ["source file: its servers up to priority 20 are used, before up to 10"]
        come_up(rig.fleet.servers["c:1"], trio.current_time())
        lease = rig.fleet.servers["c:1"].lease(0.0)
        come_up(second, trio.current_time())
        await trio.sleep(2)
        assert rig.names == ["a:1", "b:1"]
        assert [server.name for server in rig.fleet.leaving] == ["c:1"], "its request ends there"
        lease.release()


async def test_discovery_set_without_unused_priorities_is_not_doubtful(
    autojump_clock: MockClock,
) -> None:
    async with running(FILE) as rig:
        source = rig.made["file"]
        source.say_by_priority(a=10, b=10, c=10)
        await rig.settle()
        rig.up()
        source.say_by_priority(a=10, b=20, c=20)
        await rig.settle()
        assert rig.names == ["a:1"]
        (status,) = rig.sources.discovery.statuses
        assert (status.doubt, status.states) == ("", {"up": 1, "wait": 2})
        source.say()
        await rig.settle()
        source.say_by_priority(a=10, b=20)
        await rig.settle()
        assert (rig.names, status.doubt) == (["a:1"], "")
        assert not [text for text in rig.news if "priority" in text]


async def test_discovery_bad_target_is_named_once(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(FILE) as rig:
        for _ in range(5):
            rig.made["file"].say("a:1", "no host:x", "b b:2")
            await rig.settle()
        assert rig.names == ["a:1"]
        (status,) = rig.sources.discovery.statuses
        assert status.skipped_total == 2
        assert len([one for one in caplog.records if "left out" in one.message]) == 1


async def test_discovery_source_that_raises_is_started_again(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(config(TWO))
    make = rig._make

    def broken(source: SourceConfig) -> FakeSource:
        made = make(source)
        if source.name == "file" and not rig.news:
            made.error = RuntimeError("a bug")
        return made

    rig.sources.discovery._make = broken
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.sources.run)
        await trio.sleep(0.5)
        assert "internal error RuntimeError" in rig.news[0]
        rig.made["file-2"].say("b:1")
        await trio.sleep(2)
        rig.made["file"].say("a:1")
        await rig.settle()
        assert rig.names == ["a:1", "b:1"]
        nursery.cancel_scope.cancel()


async def test_discovery_reload_keeps_sets_and_follows_sources(autojump_clock: MockClock) -> None:
    async with running(FILE) as rig:
        rig.made["file"].say("a:1")
        await rig.settle()
        rig.reload(TWO + "[config]\nmax_retries = 1\n")
        assert rig.names == ["a:1"]
        assert rig.fleet.probed or not rig.fleet.awaited, "a new source is not awaited"
        await rig.settle()
        rig.made["file-2"].say("b:1")
        await rig.settle()
        assert rig.names == ["a:1", "b:1"]
        rig.reload(SERVERS)
        await rig.settle()
        assert rig.names == ["own"]
        assert all(source.sink is None for source in rig.made.values()), "the sources have stopped"


async def test_discovery_changed_source_starts_anew_and_keeps_its_set(
    autojump_clock: MockClock,
) -> None:
    async with running(FILE) as rig:
        first = rig.made["file"]
        first.say("a:1")
        await rig.settle()
        rig.reload(FILE.replace("a.json", "z.json"))
        await rig.settle()
        assert first.sink is None
        assert rig.made["file"] is not first
        assert rig.names == ["a:1"]
        rig.made["file"].say("z:1")
        await rig.settle()
        assert rig.names == ["z:1"]


def two_files(*sources: str) -> str:
    return "".join(f"[[discovery.file]]\n{source}\n" for source in sources)


A, B = 'path = "a.json"', 'path = "b.json"'


async def test_discovery_first_of_two_sources_removed_leaves_with_its_servers_alone(
    autojump_clock: MockClock,
) -> None:
    """The second one gets the name of the first, as neither has an id."""
    async with running(two_files(A, B)) as rig:
        rig.made["file"].say("a:1")
        rig.made["file-2"].say("b:1", "b:2")
        await rig.settle()
        rig.up()
        rig.reload(two_files(B))
        assert rig.names == ["b:1", "b:2"]
        await rig.settle()
        assert rig.names == ["b:1", "b:2"]
        rig.made["file"].say("b:1", "b:2", "b:3")
        await rig.settle()
        assert rig.names == ["b:1", "b:2", "b:3"]


@pytest.mark.parametrize("after", [(B, A), ('id = "other"\n' + A, B), (A, B + '\nid = "other"')])
async def test_discovery_sources_with_other_names_keep_their_servers(
    after: tuple[str, ...], autojump_clock: MockClock
) -> None:
    async with running(two_files(A, B)) as rig:
        rig.made["file"].say("a:1")
        rig.made["file-2"].say("b:1")
        await rig.settle()
        before = dict(rig.fleet.servers)
        rig.reload(two_files(*after))
        assert rig.fleet.servers == before
        assert rig.config.discovery is not None
        sources = {source.name for source in rig.config.discovery.sources}
        assert {server.source for server in rig.config.servers} == sources
        await rig.settle()
        assert rig.fleet.servers == before


async def test_discovery_changed_defaults_apply_to_found_servers(autojump_clock: MockClock) -> None:
    async with running(FILE) as rig:
        rig.made["file"].say("a:1")
        await rig.settle()
        rig.reload(FILE + "defaults = { max_concurrent_requests = 9 }\n")
        assert rig.fleet.servers["a:1"].capacity == 9


async def test_discovery_server_in_the_file_wins(autojump_clock: MockClock) -> None:
    async with running(SERVERS + FILE) as rig:
        rig.made["file"].say("own:1", "b:1")
        await rig.settle()
        assert rig.names == ["b:1", "own"]
        assert rig.fleet.servers["own"].config.source is None


async def test_discovery_first_sets_are_awaited(autojump_clock: MockClock) -> None:
    async with running(TWO) as rig:
        assert not rig.fleet.probed
        rig.made["file"].say("a:1")
        await rig.settle()
        rig.up()
        assert not rig.fleet.probed
        await trio.sleep(START_PATIENCE + 2)
        assert rig.fleet.probed, "another source has servers, so the second is not waited for"


async def test_discovery_only_source_is_awaited_for_ever(autojump_clock: MockClock) -> None:
    async with running(FILE) as rig:
        rig.made["file"].fail()
        await trio.sleep(3600)
        assert not rig.fleet.probed
        rig.made["file"].say()
        await rig.settle()
        assert rig.fleet.probed


async def test_discovery_refused_servers_leave_the_fleet_as_it_is(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(new: Config) -> None:
        raise ConfigError(["too many servers"])

    async with running(FILE) as rig:
        rig.made["file"].say("a:1")
        await rig.settle()
        rig.refuse = refuse
        for found in (["a:1", "b:1"], ["a:1", "b:1"], ["a:1"], ["a:1", "b:1"]):
            rig.made["file"].say(*found)
            await rig.settle()
        assert rig.names == ["a:1"]
        said = [one for one in caplog.records if "too many servers" in one.message]
        assert len(said) == 2, "once, and again when a good set came between"


async def test_discovery_servers_refused_for_a_passing_reason_are_tried_again(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """No descriptor was left for a certificate file, and the source has no news afterwards."""

    def refuse(config: Config) -> None:
        raise ConfigError(["server a: ca: too many open files"], passing=True)

    async with running(FILE) as rig:
        allowed, rig.refuse = rig.refuse, refuse
        rig.made["file"].say("a:1")
        await trio.sleep(10.0)
        assert rig.names == []
        assert caplog.text.count("too many open files") == 1
        rig.refuse = allowed
        await rig.settle()
        assert rig.names == ["a:1"]


async def test_discovery_restarted_process_begins_with_the_known_set(
    autojump_clock: MockClock,
) -> None:
    async with running(SERVERS + FILE) as rig:
        rig.made["file"].say("a:1")
        await rig.settle()
        known = rig.config
    again = Rig(known)
    assert again.names == ["a:1", "own"]
    assert not again.fleet.awaited
    again.sources.apply_file(again.sources.file_config, config(SERVERS + FILE))
    assert again.names == ["a:1", "own"]


async def test_discovery_flapping_source_changes_the_fleet_at_most_five_times_a_second(
    autojump_clock: MockClock,
) -> None:
    async with running(FILE) as rig:
        for number in range(1000):
            rig.made["file"].say("a:1", f"x{number % 2}:1")
            await trio.sleep(0.001)
        assert len(rig.kinds) <= 7
