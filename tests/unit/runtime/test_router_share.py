"""A router announces itself, and the levels of its servers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from support.fleet_makers import make_config, make_fleet
from vllm_router.routing.sharing.messages import ServerLevel
from vllm_router.runtime.sharing import router_share


def shared(monkeypatch: pytest.MonkeyPatch, tables: str = "", **parts: Any) -> Any:
    """The functions `about` and `levels` of a router with three servers, and its fleet."""
    monkeypatch.setattr(router_share, "SharedState", lambda *args: args)
    fleet = make_fleet(3)
    share: Any = SimpleNamespace(
        levels=lambda: dict(parts.get("queued", {})),
        peers=SimpleNamespace(siblings=lambda _now: parts.get("siblings", {})),
        settle=None,
    )
    context = SimpleNamespace(key_limits=None)
    router: Any = SimpleNamespace(
        fleet=fleet,
        config=make_config(3, tables=tables),
        proxy=SimpleNamespace(context=context),
        started_at=trio.current_time(),
    )
    scrapes: Any = SimpleNamespace(look=lambda _leases, _now: None)
    unused: Any = None
    made: Any = router_share.share_through(router, share, unused, scrapes, unused)
    return SimpleNamespace(about=made[5], levels=made[6], fleet=fleet)


async def test_share_levels_add_up_processes_and_own_leases(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
):
    a, b, c = (f"http://{name}.test:1" for name in "abc")
    found = shared(
        monkeypatch,
        queued={a: ServerLevel(2.0, 0)},
        siblings={a: ServerLevel(3.0, 5), b: ServerLevel(1.0, 7)},
    )
    for name in "ac":
        found.fleet.servers[name].lease(0.0)
    assert found.levels() == {
        a: ServerLevel(5.0, 1),
        b: ServerLevel(1.0, 0),
        c: ServerLevel(0.0, 1),
    }


async def test_share_about_has_name_of_configuration_or_machine(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(router_share.platform, "node", lambda: "machine")
    assert shared(monkeypatch).about().name == "machine"
    tables = '[shared]\nurl = "redis://h"\nname = "north"'
    assert shared(monkeypatch, tables).about().name == "north"
