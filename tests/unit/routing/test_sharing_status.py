"""The state of `[shared]`, for display."""

from __future__ import annotations

from vllm_router.routing.sharing.messages import About
from vllm_router.routing.sharing.peers import RouterView
from vllm_router.routing.sharing.status import SharedStatus


def about(configuration: str) -> About:
    return About("n", "v", configuration, 1.0, 0)


def view(configuration: str, *, live: bool = True) -> RouterView:
    return RouterView(
        router=configuration,
        about=about(configuration),
        silent=0.0,
        in_flight=0,
        rate=0.0,
        live=live,
    )


def test_shared_status_configurations_leave_out_silent_routers():
    status = SharedStatus(
        store="redis://h:6379",
        fleet="f",
        own=about("new"),
        up=True,
        problem="",
        age=0.0,
        routers=[view("other"), view("old", live=False)],
        in_flight={},
        count=2,
        failures=0,
        dropped=0,
        unsent=0,
        spared=0,
    )
    assert status.configurations == {"new", "other"}
