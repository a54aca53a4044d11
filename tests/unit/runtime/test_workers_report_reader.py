"""A worker's report makes the leader call what the worker would have called on its own servers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from support.web_harness import make_record
from vllm_router.fleet.refusals import RequestKind
from vllm_router.proxy.retry import Outcome
from vllm_router.runtime.workers.messages import Report, Verdict
from vllm_router.runtime.workers.report_reader import ReportReader
from vllm_router.runtime.workers.reporter import pack

URL = "http://a.test:1"


class Calls:
    """Notes each method call as name, positional and named arguments."""

    def __init__(self, **attributes: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> None:
            self.calls.append((name, *arguments, named) if named else (name, *arguments))

        return call


class Leader:
    """A report reader, and the parts of the leader that it may call."""

    def __init__(self) -> None:
        self.server = Calls(served=0, url=URL)
        self.fleet = Calls(by_url=lambda url: self.server if url == URL else None)
        self.recorder, self.metrics, self.feed = Calls(), Calls(), Calls()
        proxy = SimpleNamespace(context=SimpleNamespace(recorder=self.recorder))
        parts: tuple[Any, ...] = (self.fleet, proxy, self.metrics, self.feed)
        self.reader = ReportReader(*parts)

    async def read(self, **parts: Any) -> None:
        empty: dict[str, Any] = {"verdicts": [], "attempts": [], "ended": [], "refusals": []}
        await self.reader.apply(Report(**{**empty, **parts}))


def verdict(what: str, **more: Any) -> Verdict:
    return Verdict(what, URL, 5.0, jitter=0.5, **more)


ASKED = RequestKind("/v1/chat/completions", "m", 7)
OF_SERVER = [
    (verdict("answered", trial=True), ("answered", 5.0, {"trial": True})),
    (verdict("refused", retry_after=2.0), ("refused", 5.0, 2.0)),
]
OF_FLEET = [
    (
        verdict("failed", trial=True, body=7, odd=True),
        ("failed", 5.0, {"trial": True, "jitter": 0.5, "body": 7, "odd": True}),
    ),
    (
        verdict("answered_elsewhere", body=7),
        ("answered_elsewhere", 5.0, {"jitter": 0.5, "body": 7}),
    ),
    (
        verdict("timed_out", since=3.0, sure=True),
        ("timed_out", 5.0, 3.0, {"trial": False, "jitter": 0.5, "stream": True}),
    ),
    (verdict("request_starved", since=3.0), ("request_starved", 5.0, 3.0)),
    (
        verdict("accepted_elsewhere", name="tools", size=9, words="no tools", body=7, sure=True),
        ("accepted_elsewhere", "tools", 9, "no tools", 5.0, {"body": 7, "sure": True}),
    ),
    (verdict("refused_again", name="tools"), ("refused_again", "tools", 5.0)),
    (verdict("accepted", asked=ASKED), ("accepted", ASKED)),
    (verdict("unlist", name="m"), ("unlist", "m")),
]


@pytest.mark.parametrize(("given", "call"), OF_SERVER, ids=lambda one: getattr(one, "what", ""))
async def test_report_reader_verdict_of_a_server_is_repeated(given: Verdict, call: Any):
    leader = Leader()
    await leader.read(verdicts=[given])
    assert leader.server.calls == [call]
    assert [name for name, *_ in leader.fleet.calls] == ["settle"]


@pytest.mark.parametrize(("given", "call"), OF_FLEET, ids=lambda one: getattr(one, "what", ""))
async def test_report_reader_verdict_of_a_fleet_is_repeated(given: Verdict, call: Any):
    leader = Leader()
    await leader.read(verdicts=[given])
    name, *arguments = call
    made, settled = leader.fleet.calls
    assert made == (name, leader.server, *arguments)
    assert settled[0] == "settle"


@pytest.mark.parametrize("what", ["answered_elsewhere", "accepted_elsewhere", "accepted"])
async def test_report_reader_incomplete_verdict_is_ignored(what: str):
    leader = Leader()
    await leader.read(verdicts=[verdict(what)])
    assert [name for name, *_ in leader.fleet.calls] == ["settle"]


async def test_report_reader_counts_attempts_exchanges_and_refusals():
    leader = Leader()
    record = make_record(5.0, model="m")
    await leader.read(
        attempts=[(URL, "connect_failed"), (URL, "answered")],
        ended=[pack(record)],
        refusals=["no_such_key"],
    )
    assert leader.server.served == 2
    assert leader.recorder.calls == [
        ("attempt_ended", leader.server, Outcome.CONNECT_FAILED),
        ("attempt_ended", leader.server, Outcome.ANSWERED),
    ]
    ended, refused = leader.metrics.calls
    assert (ended[0], ended[1].model, ended[1].request_id) == ("exchange_ended", "m", b"id-1")
    assert refused == ("refused", "no_such_key")
    assert leader.feed.calls == [ended]
    assert leader.fleet.calls == []  # nothing to settle


async def test_report_reader_server_that_was_removed_is_ignored():
    leader = Leader()
    gone = "http://removed.test:1"
    await leader.read(
        verdicts=[Verdict("answered", gone, 5.0)], attempts=[(gone, Outcome.ANSWERED.value)]
    )
    assert leader.server.calls == leader.recorder.calls == []
    assert leader.server.served == 0
