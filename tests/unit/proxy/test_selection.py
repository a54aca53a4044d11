"""Selection by refusals and context lengths, for one request on a fleet without a proxy."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from support.fleet_makers import make_fleet
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.proxy.retry import Outcome
from vllm_router.proxy.selection import LONGEST_PATH, Selection

PATH = "/v1/chat/completions"
JSON = b"application/json"
ROUTE_GONE = (405, b"")
TOO_LARGE = (413, b"")
ODD_403 = (403, b"")


def error(message: str, **fields: Any) -> bytes:
    return json.dumps({"error": {"message": message, **fields}}).encode()


NO_MODEL = (404, error("The model `m` does not exist.", param="model"))
TOO_LONG = (400, error("maximum context length is 50 tokens", code="context_length_exceeded"))
TOO_LONG_UNNAMED = (400, error("Too many tokens.", code="context_length_exceeded"))


def fleet_of(**lengths: int | None) -> tuple[Fleet, list[Server]]:
    fleet = make_fleet(len(lengths))
    for name, length in lengths.items():
        card = {"id": "m", **({"max_model_len": length} if length else {})}
        fleet.servers[name].listed({"m": card}, 0.0)
    fleet.settle(0.0)
    return fleet, list(fleet.servers.values())


def select(fleet: Fleet, *, model: str | None = "m", path: str = PATH, size: int = 10) -> Selection:
    request: Any = SimpleNamespace(
        info=SimpleNamespace(model=model), body=b"{}", target=path.encode()
    )
    record: Any = SimpleNamespace(path=path.encode(), bytes_in=size)
    return Selection(fleet, request, record)


def judge(
    selection: Selection,
    tried: list[Server],
    response: tuple[int, bytes | None],
    **headers: bytes,
) -> Outcome:
    fields = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    status, body = response
    return selection.judge(tried, 1.0, status, JSON, fields, body, client_key=False)


def names(servers: Any) -> str:
    return "".join(sorted(server.name for server in servers))


def test_selection_asks_for_path_model_and_size():
    fleet, _ = fleet_of(a=None)
    asked = select(fleet, path="/v1/" + "x" * 500, size=7).asked()
    assert (asked.path, asked.model, asked.size) == (("/v1/" + "x" * 500)[:LONGEST_PATH], "m", 7)


@pytest.mark.parametrize(
    ("response", "path", "size", "refused"),
    [
        (ROUTE_GONE, PATH, 1, True),
        (ROUTE_GONE, "/v1/other", 10, False),
        (TOO_LARGE, PATH, 10, True),
        (TOO_LARGE, PATH, 9, False),
        (ODD_403, PATH, 10, False),  # the first of its kind
    ],
)
def test_selection_refusal_applies_once_another_server_accepts(response, path, size, refused):
    fleet, (a, b) = fleet_of(a=None, b=None)
    selection = select(fleet)
    assert judge(selection, [a], response) is Outcome.REFUSED
    selection.note_refusal(a, 1.0)
    assert select(fleet, path=path, size=size).unfit(1.0) == set()
    selection.taken(1.0)
    assert names(select(fleet, path=path, size=size).unfit(1.0)) == ("a" if refused else "")
    expected = "b" if refused else "ab"
    assert names(select(fleet, path=path, size=size).servers(1.0, ())) == expected
    assert b not in select(fleet, path=path, size=size).unfit(1.0)


def test_selection_refused_again_prolongs_the_refusal():
    fleet, (a, _) = fleet_of(a=None, b=None)
    first = select(fleet)
    judge(first, [a], ROUTE_GONE)
    first.note_refusal(a, 1.0)
    first.taken(1.0)
    (until,) = a.refusals.moments()
    again = select(fleet)
    judge(again, [a], ROUTE_GONE)
    again.note_refusal(a, until)
    assert a.refusals.moments() == [until + 2 * (until - 1.0)]


def test_selection_without_model_removes_it_from_the_servers_list():
    fleet, (a, _) = fleet_of(a=None, b=None)
    selection = select(fleet)
    assert judge(selection, [a], NO_MODEL) is Outcome.NO_MODEL
    assert (a.models, fleet.servers["b"].models) == ((), ("m",))
    assert judge(selection, [a], NO_MODEL) is Outcome.ANSWERED  # it never had the model
    selection = select(fleet)
    judge(selection, [fleet.servers["b"]], NO_MODEL)
    selection.note_refusal(a, 1.0)
    selection.taken(1.0)
    (refusal,) = a.refusals.all()
    assert (refusal.what, refusal.size, refusal.confirmed) == ("model m", 0, False)


@pytest.mark.parametrize(
    ("encoding", "outcome"), [(b"identity", Outcome.NO_MODEL), (b"gzip", Outcome.ANSWERED)]
)
def test_selection_reads_only_plain_bodies(encoding, outcome):
    fleet, (a, _) = fleet_of(a=None, b=None)
    found = judge(select(fleet), [a], NO_MODEL, content_encoding=encoding)
    assert found is outcome


@pytest.mark.parametrize(
    ("known", "response", "longer_than", "outcome"),
    [
        (80, TOO_LONG, 80, Outcome.TOO_LONG),
        (None, TOO_LONG, 50, Outcome.TOO_LONG),
        (80, TOO_LONG_UNNAMED, 80, Outcome.TOO_LONG),
        (None, TOO_LONG_UNNAMED, 0, Outcome.ANSWERED),
        (100, TOO_LONG, 100, Outcome.ANSWERED),  # the other one is no longer
    ],
)
def test_selection_too_long_needs_a_longer_server(known, response, longer_than, outcome):
    fleet, (a, _) = fleet_of(a=known, b=100)
    selection = select(fleet)
    assert judge(selection, [a], response) is outcome
    assert selection.longer_than == longer_than
    if outcome is Outcome.TOO_LONG:
        assert names(selection.servers(1.0, [a])) == "b"
        assert names(selection.unfit(1.0)) == "a"
        selection.note_refusal(a, 1.0)
        selection.taken(1.0)
        assert not a.refusals.known  # the length says it all


def test_selection_too_long_keeps_the_longest():
    fleet, (a, b, _) = fleet_of(a=80, b=60, c=100)
    selection = select(fleet)
    judge(selection, [b], TOO_LONG)
    assert selection.longer_than == 60
    judge(selection, [b, a], TOO_LONG)
    assert selection.longer_than == 80
    judge(selection, [b, a, b], TOO_LONG)
    assert selection.longer_than == 80


def test_selection_too_long_without_model_goes_by_the_named_length():
    fleet, (a, _) = fleet_of(a=80, b=100)
    selection = select(fleet, model=None)
    assert judge(selection, [a], TOO_LONG) is Outcome.ANSWERED  # no length is known without a model
    assert selection.longer_than == 50


@pytest.mark.parametrize(("short", "fitting"), [(80, "b"), (100, "ab")])
def test_selection_reads_the_needed_tokens_once_where_lengths_differ(short, fitting):
    fleet, _ = fleet_of(a=short, b=100)
    selection = select(fleet)
    request: Any = selection._request
    request.body = b'{"max_tokens": 90}'
    assert names(selection.servers(1.0, ())) == fitting
    request.body = b'{"max_tokens": 1}'
    assert names(selection.servers(1.0, ())) == fitting
    # Lengths that are equal for all servers are no reason to read the body.
    fleet, _ = fleet_of(a=80, b=80)
    selection = select(fleet)
    request = selection._request
    request.body = b'{"max_tokens": 90}'
    assert names(selection.unfit(1.0)) == ""
