"""The other routers of the fleet as lines of the monitor, and of `status`. Pure."""

from __future__ import annotations

from rich.text import Text

from vllm_router.cli.monitor.state import View
from vllm_router.observability.formatting import visible
from vllm_router.web.schema import SharedView

SHOWN_NAMES = 5
"""Names of routers in one line."""


def shared_text(shared: SharedView) -> str:
    """`3 routers share their state, 12 requests in flight in the others; …` in one line."""
    if not shared.up:
        return f"shared state is down: {shared.store}: {shared.problem}"
    live = [router for router in shared.routers if router.live]
    count = 1 + len(live)
    parts = [
        (
            f"{count} router{'s share' if count != 1 else ' shares'} state, "
            f"{shared.in_flight} in flight in the others"
        )
    ]
    for names, what in (
        ([one.name for one in shared.routers if not one.live], "silent"),
        ([one.name for one in live if not one.same_configuration], "another configuration"),
    ):
        if names:
            more = ", …" if len(names) > SHOWN_NAMES else ""
            parts.append(f"{what}: {', '.join(names[:SHOWN_NAMES])}{more}")
    return "; ".join(parts)


def shared_lines(view: View) -> list[Text]:
    """One line for the monitor; none without `[shared]`."""
    shared = view.snapshot.router.shared if view.snapshot is not None else None
    if shared is None:
        return []
    differs = not all(one.live and one.same_configuration for one in shared.routers)
    style = "bold red" if not shared.up else "yellow" if differs else "bright_black"
    return [Text(visible(shared_text(shared)), style=style)]
