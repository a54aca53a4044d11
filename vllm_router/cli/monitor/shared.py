"""The other routers of the fleet as lines of the monitor, and of `status`. Pure."""

from __future__ import annotations

from rich.text import Text

from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.texts import ENGLISH, Texts
from vllm_router.observability.formatting import visible
from vllm_router.web.schema import SharedView

SHOWN_NAMES = 5
"""Names of routers in one line."""


def shared_text(shared: SharedView, texts: Texts = ENGLISH) -> str:
    """`3 routers share their state, 12 requests in flight in the others; …` in one line."""
    if not shared.up:
        return texts("shared_down", store=shared.store, problem=shared.problem)
    live = [router for router in shared.routers if router.live]
    count = 1 + len(live)
    key = "shared_one" if count == 1 else "shared_many"
    parts = [texts(key, count=count, n=shared.in_flight)]
    for names, what in (
        ([one.name for one in shared.routers if not one.live], "shared_silent"),
        ([one.name for one in live if not one.same_configuration], "shared_differs"),
    ):
        if names:
            more = ", …" if len(names) > SHOWN_NAMES else ""
            parts.append(texts(what, names=", ".join(names[:SHOWN_NAMES]) + more))
    return texts("join").join(parts)


def shared_lines(view: View) -> list[Text]:
    """One line for the monitor; none without `[shared]`."""
    shared = view.snapshot.router.shared if view.snapshot is not None else None
    if shared is None:
        return []
    differs = not all(one.live and one.same_configuration for one in shared.routers)
    style = "bold red" if not shared.up else "yellow" if differs else "bright_black"
    return [Text(visible(shared_text(shared, view.texts)), style=style)]
