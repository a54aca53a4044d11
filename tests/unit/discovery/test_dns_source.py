"""The source `dns`: pace and sets in virtual time, lookups against a small server."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import dns.rcode
import pytest
import trio
from trio.testing import MockClock

from support.dns_server import DnsServer, dns_server
from support.source_notes import Notes
from vllm_router.config.discovery import DnsSource
from vllm_router.config.parser import parse
from vllm_router.discovery import dns_lookup
from vllm_router.discovery.dns_hosts import MOST_AT_ONCE, with_addresses
from vllm_router.discovery.dns_lookup import lookup_of
from vllm_router.discovery.dns_records import Answer, Record
from vllm_router.discovery.dns_source import DnsNames, targets_of
from vllm_router.discovery.source import Again
from vllm_router.discovery.web_client import NoAnswer
from vllm_router.errors import ConfigError


def config(server: DnsServer | None = None, **options: Any) -> DnsSource:
    values: dict[str, Any] = {"name": "dns", "domain": "vllm.test.", "type": "A", "port": 8000}
    values.update({"timeout": 30.0, **options})
    if server is not None:
        values.setdefault("nameservers", (("127.0.0.1", server.port),))
    return DnsSource(**values)


# -- pace and sets ----------------------------------------------------------------------------


class FakeDns:
    def __init__(self) -> None:
        self.answer = Answer([Record("10.0.0.1")], 7.0)
        self.error: str | None = None
        self.asked: list[float] = []

    async def __call__(self) -> Answer:
        await trio.lowlevel.checkpoint()
        self.asked.append(trio.current_time())
        if self.error is not None:
            raise NoAnswer(self.error)
        return self.answer


@asynccontextmanager
async def following(fake: FakeDns, **options: Any) -> AsyncIterator[Notes]:
    notes = Notes()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(DnsNames(config(**options), fake).run, notes, Again())
        yield notes
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("ttl", "gap"), [(7.0, 7.0), (0.0, 1.0), (600.0, 30.0), (2**31 - 1, 30.0)])
async def test_dns_is_asked_when_the_records_expire(
    autojump_clock: MockClock, ttl: float, gap: float
) -> None:
    fake = FakeDns()
    fake.answer = Answer([Record("10.0.0.1")], ttl)
    async with following(fake):
        await trio.sleep(gap * 10.5)
    assert len(fake.asked) == 11


async def test_dns_failure_keeps_the_set_and_is_retried(autojump_clock: MockClock) -> None:
    fake = FakeDns()
    async with following(fake) as notes:
        await notes.until(lambda it: len(it.sets) == 1)
        fake.error = "no nameserver answered within 5 s"
        await notes.until(lambda it: it.problem is not None)
        fake.error = None
        await notes.until(lambda it: it.problem is None)
    assert fake.asked[-1] - fake.asked[-2] == pytest.approx(5, abs=0.1)


async def test_dns_name_without_records_is_an_empty_set(autojump_clock: MockClock) -> None:
    fake = FakeDns()
    fake.answer = Answer([], 0.0)
    async with following(fake) as notes:
        await notes.until(lambda it: it.sets == [[]])
        await trio.sleep(60)
    assert len(fake.asked) <= 13


def addresses(*records: Record) -> list[str]:
    return [one.address for one in targets_of(records, 8000)]


def test_dns_records_become_targets() -> None:
    assert addresses(Record("10.0.0.1"), Record("fd00::1"), Record("10.0.0.1")) == [
        "10.0.0.1:8000",
        "[fd00::1]:8000",
    ]
    assert addresses(Record("gpu-1.test.", 8100)) == ["gpu-1.test:8100"]


def test_dns_srv_weights_count_only_if_they_differ() -> None:
    same = targets_of([Record("a", 1, 33), Record("b", 1, 33)], None)
    assert [one.labels for one in same] == [{}, {}]
    other = targets_of([Record("a", 1, 30), Record("b", 1, 10), Record("c", 1, 0)], None)
    assert [one.labels["weight"] for one in other] == ["2.25", "0.75", "0.01"]


def test_dns_srv_weights_count_within_their_priority() -> None:
    records = [Record("a", 1, 30), Record("b", 1, 10), Record("c", 1, 7, priority=20)]
    found = targets_of(records, None)
    assert [one.labels.get("weight") for one in found] == ["1.50", "0.50", None]
    assert [one.priority for one in found] == [0, 0, 20]


# -- lookups ----------------------------------------------------------------------------------


async def test_lookup_a_records_with_time_to_live() -> None:
    async with dns_server() as server:
        server.records["vllm.test.", "A"] = ["10.0.0.2", "10.0.0.1"]
        answer = await lookup_of(config(server))()
        assert sorted(answer.records) == [Record("10.0.0.1"), Record("10.0.0.2")]
        assert answer.ttl == 30


async def test_lookup_aaaa_and_srv_records() -> None:
    async with dns_server() as server:
        server.records["vllm.test.", "AAAA"] = ["fd00::1"]
        server.records["_http._tcp.vllm.test.", "SRV"] = ["0 5 8000 a.test.", "0 0 0 ."]
        six = await lookup_of(config(server, type="AAAA"))()
        assert six.records == [Record("fd00::1")]
        service = config(server, **SERVICE, scheme="https")
        srv = await lookup_of(service)()
        assert srv.records == [Record("a.test.", 8000, 5)]


SERVICE: dict[str, Any] = {"domain": "_http._tcp.vllm.test.", "type": "SRV", "port": None}


async def test_lookup_srv_hosts_are_asked_of_the_configured_nameserver() -> None:
    async with dns_server() as server:
        services = ["0 5 8000 a.test.", "0 5 8001 b.test.", "0 5 8002 a.test.", "0 5 1 none.test."]
        server.records[SERVICE["domain"], "SRV"] = services
        server.records["a.test.", "A"] = ["10.0.0.2", "10.0.0.1"]
        server.records["b.test.", "AAAA"] = ["fd00::1"]
        found = await lookup_of(config(server, **SERVICE))()
        assert sorted(found.records) == [
            *(Record("10.0.0.1", 8000, 5), Record("10.0.0.1", 8002, 5)),
            Record("fd00::1", 8001, 5),
        ]


async def test_lookup_srv_addresses_sent_with_the_records_are_used() -> None:
    async with dns_server() as server:
        server.records[SERVICE["domain"], "SRV"] = ["1 1 8000 7f000001.addr.dc1.consul."]
        server.additional["7F000001.addr.dc1.consul.", "A"] = ["127.0.0.1"]
        found = await lookup_of(config(server, **SERVICE))()
        assert found.records == [Record("127.0.0.1", 8000, weight=1, priority=1)]
        assert {*server.questions} == {f"{SERVICE['domain']} SRV tcp"}


def many(server: DnsServer, count: int) -> list[str]:
    """Give the service this many hosts with an address each; returns their names."""
    names = [f"pod-{number}.test." for number in range(count)]
    server.records[SERVICE["domain"], "SRV"] = [f"0 5 8000 {name}" for name in names]
    for number, name in enumerate(names):
        server.records[name, "A"] = [f"10.0.1.{number}"]
    return names


async def test_lookup_srv_hosts_are_asked_at_the_same_time_within_a_bound() -> None:
    async with dns_server() as server:
        server.held = set(many(server, 4 * MOST_AT_ONCE))
        server.together = MOST_AT_ONCE
        found = await lookup_of(config(server, **SERVICE))()
        assert len(found.records) == 4 * MOST_AT_ONCE
        assert server.most_held == MOST_AT_ONCE


async def test_lookup_srv_hosts_have_one_timeout_together(autojump_clock: MockClock) -> None:
    records = [Record(f"pod-{number}.test.", 8000) for number in range(8 * MOST_AT_ONCE)]
    asked = []

    async def ask(host: str) -> list[str]:
        asked.append(host)
        await trio.sleep(4)
        raise NoAnswer(f"{host}: no answer")

    with pytest.raises(NoAnswer, match=r"pod-0\.test\.: no answer"):
        await with_addresses(records, ask, [], {}, timeout=5.0)
    assert trio.current_time() == 5
    assert len(asked) == 2 * MOST_AT_ONCE


async def test_lookup_srv_host_that_fails_keeps_its_last_address() -> None:
    async with dns_server() as server:
        names = many(server, 3)
        lookup = lookup_of(config(server, **SERVICE))
        before = await lookup()
        server.failing = {names[1]}
        assert await lookup() == before
        server.failing = {*names}
        assert await lookup() == before


async def test_lookup_srv_host_without_known_address_is_named_and_left_out() -> None:
    async with dns_server() as server:
        names = many(server, 3)
        server.failing = {names[1]}
        del server.records[names[2], "A"]
        found = await lookup_of(config(server, **SERVICE))()
        assert found.records == [Record("10.0.1.0", 8000, 5)]
        assert [line.partition(":")[0] for line in found.problems] == ["pod-1.test", "pod-2.test"]


async def test_lookup_reads_records_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def record(one: object, kind: str) -> Record:
        threads.append(threading.get_ident())
        return Record(str(one))

    monkeypatch.setattr(dns_lookup, "_record", record)
    async with dns_server() as server:
        server.records["vllm.test.", "A"] = ["10.0.0.1"]
        assert (await lookup_of(config(server))()).records == [Record("10.0.0.1")]
    assert threads
    assert threading.get_ident() not in threads


async def test_lookup_srv_host_without_answer_is_a_failure() -> None:
    async with dns_server() as server:
        server.records[SERVICE["domain"], "SRV"] = ["0 5 8000 a.test."]
        server.failing = {"a.test."}
        with pytest.raises(NoAnswer, match=r"a\.test: no usable answer"):
            await lookup_of(config(server, **SERVICE))()


async def test_lookup_name_that_does_not_exist_or_has_no_records_is_empty() -> None:
    async with dns_server() as server:
        assert (await lookup_of(config(server))()).records == ()
        server.records["vllm.test.", "TXT"] = ["x"]
        assert (await lookup_of(config(server))()).records == ()


@pytest.mark.parametrize("code", [dns.rcode.SERVFAIL, dns.rcode.REFUSED, dns.rcode.NOTIMP])
async def test_lookup_refused_by_all_nameservers_is_a_failure(code: dns.rcode.Rcode) -> None:
    async with dns_server() as server:
        server.rcode = code
        with pytest.raises(NoAnswer, match="no usable answer"):
            await lookup_of(config(server))()


async def test_lookup_silent_nameserver_is_a_failure() -> None:
    async with dns_server() as server:
        server.silent = True
        with pytest.raises(NoAnswer, match=r"no nameserver answered within 0\.3 s"):
            await lookup_of(config(server, timeout=0.3))()


async def test_lookup_goes_on_to_the_next_nameserver() -> None:
    async with dns_server() as broken, dns_server() as good:
        broken.rcode = dns.rcode.SERVFAIL
        good.records["vllm.test.", "A"] = ["10.0.0.1"]
        both = (("127.0.0.1", broken.port), ("127.0.0.1", good.port))
        answer = await lookup_of(config(nameservers=both))()
        assert answer.records == [Record("10.0.0.1")]
        assert broken.questions


async def test_lookup_truncated_answer_is_fetched_by_tcp() -> None:
    async with dns_server() as server:
        server.truncate = True
        server.records["vllm.test.", "A"] = [f"10.0.{n // 250}.{n % 250 + 1}" for n in range(300)]
        answer = await lookup_of(config(server))()
        assert len(answer.records) == 300
        assert server.questions[-1].endswith("tcp")


async def test_lookup_gets_records_that_a_nameserver_leaves_out_over_udp() -> None:
    async with dns_server() as server:
        server.trim = 3
        server.records["vllm.test.", "A"] = [f"10.0.0.{n + 1}" for n in range(9)]
        answer = await lookup_of(config(server))()
        assert len(answer.records) == 9


async def test_lookup_without_tcp_is_made_over_udp() -> None:
    async with dns_server() as server:
        server.no_tcp = True
        server.records["vllm.test.", "A"] = ["10.0.0.1"]
        answer = await lookup_of(config(server))()
        assert answer.records == [Record("10.0.0.1")]
        assert {*server.questions} == {"vllm.test. A"}


async def test_source_follows_a_name_by_its_nameserver() -> None:
    async with dns_server() as server, trio.open_nursery() as nursery:
        server.records["vllm.test.", "A"] = ["10.0.0.1"]
        notes = Notes()
        source = DnsNames(config(server, interval=0.05))
        nursery.start_soon(source.run, notes, Again())
        await notes.until(lambda it: it.sets[-1:] == [["10.0.0.1:8000"]])
        server.records["vllm.test.", "A"] = ["10.0.0.2", "10.0.0.1"]
        await notes.until(lambda it: it.sets[-1] == ["10.0.0.1:8000", "10.0.0.2:8000"])
        nursery.cancel_scope.cancel()


# -- the table --------------------------------------------------------------------------------


def table(text: str) -> DnsSource:
    made = parse(f"[discovery]\ndns = {text}\n".encode(), "servers.toml", {}).discovery
    assert made is not None
    (source,) = made.sources
    assert isinstance(source, DnsSource)
    return source


def test_table_type_follows_from_the_name() -> None:
    assert table('{ name = "_http._tcp.vllm" }').type == "SRV"
    assert table('{ name = "tasks.vllm", port = 8000 }').type == "A"


def test_table_nameservers_have_ports() -> None:
    source = table(
        '{ name = "v", port = 1, nameservers = ["10.0.0.53", "127.0.0.1:8600", "::1", "[::1]:53"] }'
    )
    assert source.nameservers == (("10.0.0.53", 53), ("127.0.0.1", 8600), ("::1", 53))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "discovery.dns.name: expected a name in DNS, got none"),
        ('{ name = "a b", port = 1 }', "discovery.dns.name: expected a name in DNS"),
        ('{ name = "a..b", port = 1 }', "discovery.dns.name: expected a name in DNS"),
        ('{ name = "vllm" }', "discovery.dns.port: expected the port of the servers"),
        ('{ name = "_a._tcp.b", port = 1 }', "discovery.dns.port: expected none"),
        ('{ name = "v", port = 1, type = "MX" }', 'expected one of "A", "AAAA", "SRV"'),
        ('{ name = "v", port = 1, nameservers = ["ns1"] }', "expected an IP address"),
        ('{ name = "v", port = 1, nameservers = ["1.1.1.1:0"] }', "expected an IP address"),
        (
            '{ name = "v", port = 1, nameservers = ["1.1.1.1:0000099999"] }',
            "expected an IP address",
        ),
        ('{ name = "v", port = 1, nameservers = ["[::1]53"] }', "expected an IP address"),
        ('{ name = "v", port = 1, nameservers = ["[::1"] }', "expected an IP address"),
        ('{ name = "v", port = 1, nameservers = [] }', "nameservers: expected array"),
    ],
)
def test_table_problem_names_key(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        table(text)
    assert any(problem in line for line in raised.value.problems), raised.value.problems
