"""The rows of models: which servers count, under which name, and what answers without a server."""

from __future__ import annotations

import pytest

from support.fleet_makers import come_up, eject, gauges, go_down, make_fleet
from vllm_router.fleet.fleet import Fleet
from vllm_router.observability.model_rows import MAX_ROWS, ModelCount, ModelRow, without_server


def model_rows(fleet: Fleet, now: float) -> list[ModelRow]:
    count = ModelCount(fleet)
    for server in fleet.servers.values():
        count.add(server, server.current_state(now)[0])
    return count.rows(now)


def rows(fleet: Fleet, now: float = 10.0) -> dict[str, ModelRow]:
    fleet.settle(now)
    return {row.name: row for row in model_rows(fleet, now)}


def test_model_rows_count_servers_by_state():
    fleet = make_fleet(5)
    a, b, c, d, e = fleet.servers.values()
    go_down(a, 5.0)
    eject(b, 5.0)
    c.drain(on=True)
    d.refused(9.9, None)
    e.scraped(gauges(4, 2), 9.9, 0)
    row = rows(fleet)["m"]
    assert (row.servers, row.available, row.draining) == (5, 2, 1)
    assert (row.running, row.waiting) == (4, 2)
    assert row.capacity == d.capacity + e.capacity
    assert row.load == 5 / row.capacity


@pytest.mark.parametrize("parent", [["m"], {"id": "m"}, "", False, 7])
def test_model_rows_with_parent_that_is_no_name_count_model_by_itself(parent):
    fleet = make_fleet(1)
    cards = {"m": {"id": "m"}, "odd": {"id": "odd", "parent": parent}}
    fleet.servers["a"].listed(cards, 1.0)
    assert sorted(rows(fleet)) == ["m", "odd"]


def test_model_rows_of_unavailable_model_have_no_load():
    fleet = make_fleet(1)
    go_down(fleet.servers["a"], 5.0)
    row = rows(fleet)["m"]
    assert (row.available, row.capacity, row.load, row.fallback) == (0, 0, 0.0, None)
    assert without_server([row]) == ["m"]


def test_model_rows_join_names_that_engines_have_for_one_model():
    fleet = make_fleet(2)
    a, b = fleet.servers.values()
    same = {name: {"id": name, "root": "/models/q"} for name in ("b-name", "a-name")}
    a.listed(same, 1.0)
    b.listed({"b-name": {"id": "b-name", "root": "/models/q"}}, 1.0)
    found = rows(fleet)
    assert list(found) == ["a-name"]
    assert (found["a-name"].names, found["a-name"].servers) == (["b-name"], 2)


def test_model_rows_count_adapters_with_their_model():
    fleet = make_fleet(1)
    cards = {"base": {"id": "base"}, "ad": {"id": "ad", "parent": "base"}, "lost": {"parent": "x"}}
    fleet.servers["a"].listed(cards, 1.0)
    found = rows(fleet)
    assert list(found) == ["base"]
    assert (found["base"].names, found["base"].adapters) == (["ad"], 1)


def test_model_rows_have_aliases_and_fallback_in_use():
    tables = """
[models]
gpt = { serves = "big", fallback = "small" }
small = { serves = "m" }
absent = "nowhere"
"""
    fleet = make_fleet(2, tables=tables)
    a, b = fleet.servers.values()
    come_up(a, 1.0, "big")
    come_up(b, 1.0, "m")
    found = rows(fleet)
    assert (found["big"].aliases, found["big"].fallback) == (["gpt"], None)
    assert found["m"].aliases == ["small"]
    assert (found["nowhere"].aliases, found["nowhere"].servers) == (["absent"], 0)
    go_down(a, 5.0)
    assert rows(fleet)["big"].fallback == "small"
    go_down(b, 5.0)
    assert rows(fleet)["big"].fallback is None


def test_model_rows_are_bounded():
    fleet = make_fleet(1)
    fleet.servers["a"].listed({f"m{n}": {"id": f"m{n}"} for n in range(300)}, 1.0)
    assert len(model_rows(fleet, 1.0)) == MAX_ROWS


def test_model_rows_servers_with_equal_and_other_lists_count_once_in_each_model():
    fleet = make_fleet(4)
    a, b, c, d = fleet.servers.values()
    for server, names in ((a, "mn"), (b, "mn"), (c, "n"), (d, "nm")):
        server.listed({name: {"id": name} for name in names}, 1.0)
    found = rows(fleet)
    assert {name: row.listing for name, row in found.items()} == {
        "m": [a, b, d],
        "n": [a, b, c, d],
    }
    assert [row.servers for row in found.values()] == [3, 4]
