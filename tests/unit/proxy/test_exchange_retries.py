"""Retries reach every healthy server, and never amplify a storm."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import detail, eject, gauges, make_fleet
from support.proxy_harness import Client, Rig, lab
from support.scripted_server import (
    END,
    GOOD,
    Script,
    Talk,
    answer,
    answering,
    chunk,
    ok,
    once,
    silent,
    sse_head,
)
from vllm_router.proxy.attempt_history import AttemptHistory
from vllm_router.proxy.failures import RECENT, SAME_MOMENT, End, Failures
from vllm_router.proxy.retry import Outcome

ERROR = answer(500, b"{}")


def body(number: int) -> dict:
    return {"model": "m", "user": str(number)}


class Machines:
    """Servers `a`, `b`, ... that can be stopped, as by SIGKILL.

    Then all connections are closed, and new ones refused. `tokens` comes after a second.
    """

    def __init__(self, kills: bytes = b"killer") -> None:
        self.rig: Rig | None = None
        self.stopped: dict[str, trio.Event] = {name: trio.Event() for name in "abcdef"}
        self._kills = kills

    def stop(self, name: str) -> None:
        assert self.rig is not None
        self.rig.scripted[name].refuses = True
        self.stopped[name].set()

    def script(self, name: str) -> Script:
        async def serve(talk: Talk) -> None:
            async def until_stopped() -> None:
                await self.stopped[name].wait()
                nursery.cancel_scope.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_stopped)
                while True:
                    request = await talk.request()
                    if self._kills in request.body:
                        self.stop(name)
                    await trio.sleep(1)
                    await talk.send(GOOD)

        async def quietly(talk: Talk) -> None:
            try:
                await serve(talk)
            except BaseExceptionGroup:
                talk.close()

        return quietly

    @property
    def dead(self) -> str:
        return "".join(name for name, event in self.stopped.items() if event.is_set())


def statuses(clients: list[Client]) -> Counter[int]:
    return Counter(client.got.status for client in clients)


async def started(rig: Rig, count: int, *, alike: bool = False) -> list[Client]:
    clients = [rig.start(body(0 if alike else number)) for number in range(count)]
    await wait_all_tasks_blocked()
    return clients


@pytest.mark.parametrize(
    ("warm", "alike"),
    [(False, False), (True, False), (True, True)],
    ids=["new connections", "kept connections", "kept connections and one body"],
)
@pytest.mark.parametrize("gap", [0.0, 0.002, 0.05], ids="{}s".format)
@pytest.mark.parametrize("count", [3, 40])
async def test_retry_three_of_four_servers_stopping_loses_no_request(
    autojump_clock, count, gap, warm, alike
):
    machines = Machines()
    async with lab(*map(machines.script, "abcd")) as rig:
        machines.rig = rig
        if warm:
            warmed = await started(rig, 3 * count, alike=alike)
            await trio.sleep(1.5)
            assert statuses(warmed) == {200: 3 * count}
        clients = await started(rig, count, alike=alike)
        for name in "abc":
            machines.stop(name)
            if gap:
                await trio.sleep(gap)
            else:
                await wait_all_tasks_blocked()
        await trio.sleep(10)
        assert statuses(clients) == {200: count}
        assert not rig.context.quarantine.entries


async def test_retry_five_of_six_servers_refusing_reaches_sixth(autojump_clock):
    async with lab(*[answering(GOOD)] * 6) as rig:
        for name in "abcde":
            rig.scripted[name].refuses = True
        for number in range(6):
            rig.prefer("abcde"[number % 5])
            assert (await rig.post(body(number))).status == 200


async def test_retry_with_empty_budget_goes_to_healthy_server(autojump_clock):
    async with lab(answering(ERROR), answering(ERROR), answering(GOOD)) as rig:
        rig.prefer("a")
        rig.context.budget.owed = rig.context.budget.depth
        rig.context.failures.note(rig.server("b"), 1, trio.current_time(), deadly=False)
        assert (await rig.post()).status == 200
        assert [name for name, _ in rig.recorder.attempts] == ["a", "c"]


async def test_retry_all_failing_on_broken_servers_does_not_count_against_request(autojump_clock):
    """Two engines have died and answer 500 until their checks fail; the third is healthy."""
    sick = answering(ERROR)
    options = {"policy": "round_robin", "failure_threshold": 1000}
    async with lab(sick, sick, answering(GOOD), **options) as rig:
        first, *others = [rig.client(body(number)) for number in range(9)]
        assert (await first.run()).status == 500  # on both: the request may be the cause
        for client in others:
            assert (await client.run()).status == 200


@pytest.mark.parametrize("status", [500, 502])
async def test_retry_all_servers_failing_stays_within_budget(autojump_clock, status):
    async with lab(*[answering(answer(status, b"{}"))] * 4) as rig:
        for number in range(300):
            assert (await rig.post(body(number))).status == status
            await trio.sleep(0.01)
        assert rig.requests().total() <= 1.2 * 300 + 3


async def test_retry_crashing_request_among_others_reaches_two_servers(autojump_clock):
    machines = Machines()
    async with lab(*map(machines.script, "abcdef")) as rig:
        machines.rig = rig
        others = await started(rig, 12)
        killer = rig.start({"model": "m", "user": "killer"})
        await trio.sleep(10)
        assert len(machines.dead) == 2
        assert killer.got.status == 502
        again = await rig.post({"model": "m", "user": "killer"})
        assert (again.code, len(machines.dead)) == ("poison_request", 2)
        # Requests that were on both servers look like the cause, too.
        assert statuses(others)[200] >= 10


async def test_retry_crashing_request_over_closed_connections_reaches_two_servers(autojump_clock):
    machines = Machines()
    async with lab(*map(machines.script, "abcd")) as rig:
        machines.rig = rig
        await started(rig, 8)
        await trio.sleep(2)
        got = await rig.post({"model": "m", "user": "killer"})
        assert (got.status, len(machines.dead)) == (502, 2)
        assert rig.recorder.outcomes[-2:] == [Outcome.CONNECTION_LOST, Outcome.CONNECTION_LOST]


def on_hosts(*hosts: str) -> list[dict[str, Any]]:
    """Servers `a`, `b`, ... on these hosts, each with a port of its own."""
    return [
        {"name": name, "url": f"http://{host}:{8000 + number}"}
        for number, (name, host) in enumerate(zip("abcdef", hosts, strict=False))
    ]


async def test_retry_after_a_crash_prefers_another_machine(autojump_clock):
    """Two servers of one machine die with it; the request must not be on both."""
    servers = on_hosts("one.test", "one.test", "two.test")
    async with lab(once(), once(), answering(GOOD), servers=servers) as rig:
        rig.prefer("a")
        rig.server("c").scraped(gauges(9), trio.current_time(), leases=0)
        assert (await rig.post()).status == 200
        assert [name for name, _ in rig.recorder.attempts] == ["a", "c"]


async def test_retry_after_an_error_may_stay_on_the_machine(autojump_clock):
    servers = on_hosts("one.test", "one.test", "two.test")
    async with lab(*[answering(ERROR)] * 2, answering(GOOD), servers=servers) as rig:
        rig.prefer("a")
        rig.server("c").scraped(gauges(9), trio.current_time(), leases=0)
        await rig.post()
        assert [name for name, _ in rig.recorder.attempts] == ["a", "b"]


async def test_retry_after_a_crash_goes_to_the_same_machine_if_there_is_no_other(autojump_clock):
    async with lab(once(), answering(GOOD), servers=on_hosts("one.test", "one.test")) as rig:
        rig.prefer("a")
        assert (await rig.post()).status == 200


@pytest.mark.parametrize(("max_retries", "status"), [(1, 200), (0, 503)])
async def test_retry_unreachable_servers_use_up_no_retries(autojump_clock, max_retries, status):
    async with lab(*[answering(GOOD)] * 4, max_retries=max_retries) as rig:
        for name in "abc":
            rig.scripted[name].refuses = True
        rig.prefer("a")
        got = await rig.post()
        assert got.status == status
        assert (got[b"x-vllm-router-server"] == b"d") is (status == 200)


async def test_retry_unreachable_server_leaves_the_number_of_retries_as_it_is(autojump_clock):
    empty = answering(ok(b""))
    async with lab(answering(GOOD), empty, empty, answering(GOOD), max_retries=1) as rig:
        rig.scripted["a"].refuses = True
        for place, server in enumerate(rig.servers):
            server.scraped(gauges(place), trio.current_time(), leases=0)
        assert (await rig.post()).status == 502
        assert rig.recorder.attempts == [
            ("a", Outcome.CONNECT_FAILED),
            ("b", Outcome.EMPTY),
            ("c", Outcome.EMPTY),
        ]


async def test_retry_without_retries_left_does_not_wait_for_evidence(autojump_clock):
    """Only a request that may have broken two servers waits, for what clears it."""
    async with lab(once(), once(), answering(GOOD), max_retries=1) as rig:
        await trio.sleep(5)
        rig.prefer("a")
        rig.server("c").scraped(gauges(9), trio.current_time(), leases=0)
        for server in rig.servers:
            rig.context.failures.note(server, 1, 1.0, deadly=True)
        got = await rig.post()
        assert (got.status, rig.requests()["c"]) == (502, 0)
        assert got.took == 0.0


@pytest.mark.parametrize(
    "reply",
    [
        sse_head() + chunk(b'data: {"error":{"message":"x","code":500}}\n\n') + END,
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    ],
    ids=["error event", "other protocol"],
)
async def test_retry_failures_that_kill_no_server_cause_no_quarantine(autojump_clock, reply):
    async with lab(once(reply), once(reply), failure_threshold=1000) as rig:
        for number in (1, 2):
            assert (await rig.stream()).status == 502
            assert rig.requests() == {"a": number, "b": number}


class Moving:
    """A request that waits on server `a`, while `b` is healthy."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

    async def begin(self, **body: Any) -> None:
        self.rig.prefer("a")
        self.client = self.rig.start({"model": "m", **body})
        await wait_all_tasks_blocked()

    @property
    def moves(self) -> bool:
        """Whether a report of silence ends its attempt."""
        (lease,) = self.rig.server("a").leases
        assert lease.interrupt is not None
        return lease.interrupt(Outcome.SILENT.value)

    async def end(self) -> Outcome | None:
        self.client.leave()
        await wait_all_tasks_blocked()
        return self.rig.recorder.last.outcome


@pytest.mark.parametrize("max_retries", [0, 1])
async def test_silent_attempt_moves_while_retries_are_left(autojump_clock, max_retries):
    async with lab(silent, answering(GOOD), max_retries=max_retries) as rig:
        moving = Moving(rig)
        await moving.begin()
        assert moving.moves is (max_retries == 1)
        await wait_all_tasks_blocked()
        assert await moving.end() is (Outcome.ANSWERED if max_retries else Outcome.CLIENT_GONE)


@pytest.mark.parametrize("paused", [False, True])
async def test_silent_attempt_that_moves_is_evidence_unless_the_server_is_paused(
    autojump_clock, paused
):
    async with lab(silent, answering(GOOD)) as rig:
        moving = Moving(rig)
        await moving.begin()
        server = rig.server("a")
        if paused:
            server.pause(on=True, now=trio.current_time())
        assert moving.moves
        await wait_all_tasks_blocked()
        assert (server.silence.since is None) is paused


@pytest.mark.parametrize(
    "why", ["not replayable", "no budget", "broke two", "ejected", "silent", "none left"]
)
async def test_silent_attempt_that_cannot_go_elsewhere_stays(autojump_clock, monkeypatch, why):
    replay = why != "not replayable"
    scripts = [silent] if why == "none left" else [silent, answering(GOOD)]
    async with lab(*scripts, replay=replay) as rig:
        moving = Moving(rig)
        await moving.begin()
        other, now = rig.servers[-1], trio.current_time()
        if why == "no budget":
            rig.context.budget.owed = rig.context.budget.depth
        elif why == "broke two":
            monkeypatch.setattr(AttemptHistory, "_broken", lambda _: tuple(rig.servers))
        elif why == "ejected":
            eject(other, now)
        elif why == "silent":
            other.silence.suspect(now, now, detail("silent"), 5.0)
        assert not moving.moves
        assert await moving.end() is Outcome.CLIENT_GONE


# -- the evidence -------------------------------------------------------------------------------

X, Y = 1, 2


def test_failures_suspect_request_alone_on_two_crashed_servers():
    a, b, c = make_fleet(3).servers.values()
    failures = Failures()
    ends = (End(a, 10.0, 11.0, True), End(b, 11.0, 11.5, True))
    for end in ends:
        failures.note(end.server, X, end.at, deadly=True)
        failures.note(end.server, Y, end.at, deadly=True)
    assert failures.suspect(ends, X, (a, b, c)) == (a, b)


def test_failures_suspect_excludes_server_that_failed_before():
    a, b = make_fleet(2).servers.values()
    failures = Failures()
    failures.note(b, Y, 10.9, deadly=True)
    ends = (End(a, 10.0, 11.0, True), End(b, 11.0, 11.5, True))
    assert failures.suspect(ends, X, (a, b)) == (a,)
    assert failures.suspect(ends, Y, (a, b)) == (a, b)  # the same body, again
    b.answered(10.95, trial=False)
    assert failures.suspect(ends, X, (a, b)) == (a, b)  # it survived that


def test_failures_suspect_earlier_error_does_not_explain_crash():
    a, b = make_fleet(2).servers.values()
    failures = Failures()
    failures.note(b, Y, 10.9, deadly=False)
    deaths = (End(a, 10.0, 11.0, True), End(b, 11.0, 11.5, True))
    assert failures.suspect(deaths, X, (a, b)) == (a, b)
    errors = (End(a, 10.0, 11.0, True), End(b, 11.0, 11.5, False))
    assert failures.suspect(errors, X, (a, b)) == (a,)


@pytest.mark.parametrize("apart", [0.0, SAME_MOMENT, SAME_MOMENT + 1])
@pytest.mark.parametrize("seen_by", ["a request", "a connect", "the checks"])
def test_failures_suspect_third_failing_server_clears_the_request(seen_by, apart):
    a, b, c = make_fleet(3).servers.values()
    failures, at = Failures(), 11.5 + apart
    if seen_by == "the checks":
        c.went_down_at = at
    else:
        failures.note(c, Y if seen_by == "a request" else None, at, deadly=True)
    ends = (End(a, 10.0, 11.5, True), End(b, 11.5, 11.5, True))
    assert failures.suspect(ends, X, (a, b, c)) == ((a, b) if apart > SAME_MOMENT else ())


def test_failures_expire_and_forget_removed_servers():
    (a,) = make_fleet(1).servers.values()
    failures = Failures()
    assert failures.is_free(a, 1.0)
    failures.note(a, X, 1.0, deadly=True)
    assert not failures.is_free(a, 1.0 + RECENT - 0.1)
    assert failures.is_free(a, 1.0 + RECENT)
    failures.note(a, X, 1.0, deadly=True)
    failures.forget(a)
    assert failures.is_free(a, 1.0)
