"""The effect of keys and clicks on the monitor's state. Pure."""

from __future__ import annotations

from vllm_router.cli.monitor.actions import (
    Action,
    Explain,
    Overlay,
    Question,
    Quit,
    ReloadFile,
    SetDrain,
    Suspend,
)
from vllm_router.cli.monitor.order import SORTS
from vllm_router.cli.monitor.state import View

PAGE = 10
WHEEL = 3
"""Lines of one step of the mouse's wheel."""

MOST_LINES = 100_000
"""More lines than anything shown has."""

_STEPS = {
    "up": -1,
    "k": -1,
    "wheel-up": -WHEEL,
    "page-up": -PAGE,
    "down": 1,
    "j": 1,
    "wheel-down": WHEEL,
    "page-down": PAGE,
}
"""Lines by which a key moves."""


def press(view: View, key: str) -> Action | None:
    """The action of a key, if it does more than change the display."""
    view.message = ""
    if key == "ctrl-c":
        return Quit()
    if key == "ctrl-z":
        return _suspend(view)
    if view.question is not None:
        question, view.question = view.question, None
        return question.action if key in ("y", "Y") else None
    if view.overlay is not None and key == "/":
        view.overlay = None  # the filter is below it
    if view.overlay is not None:
        _overlaid(view, key)
        return None
    if view.typing:
        _type(view, key)
        return None
    if key in ("q", "Q", "ctrl-d"):
        return _leave(view)
    if key == "e":
        server = view.chosen()
        return Explain(server.models[0] if server is not None and server.models else None)
    if key in ("d", "u"):
        _ask_drain(view, on=key == "d")
    elif key == "R":
        _ask_reload(view)
    elif key == "/":
        view.typing = True
    elif key == "escape":
        view.set_filter("")
    elif key == "r":
        view.hour = not view.hour
    elif key in ("s", "S"):
        view.sort = (view.sort + (1 if key == "s" else -1)) % len(SORTS)
    elif key == "m":
        view.models = not view.models
    elif not _open(view, key):
        _move(view, key)
    return None


def click(view: View, server: str | None) -> None:
    """A click: on the line of a server, or elsewhere. It selects; a second one shows more."""
    view.message = ""
    if view.question is not None:
        view.question = None
    elif view.overlay is not None:
        view.overlay = None
    elif server is not None and server == view.selected:
        view.show(Overlay.DETAILS)
    elif server is not None:
        view.selected = server


def _open(view: View, key: str) -> bool:
    """Open what the key shows; False if it shows nothing."""
    if key == "enter" and view.chosen() is not None:
        view.show(Overlay.DETAILS)
    elif key == "t":
        view.show(Overlay.REQUESTS)
    elif key == "l" and view.attached:
        view.show(Overlay.LOG)
    elif key == "l":
        view.message = view.texts("log_elsewhere")
    elif key in ("?", "h"):
        view.show(Overlay.HELP)
    else:
        return False
    return True


def _overlaid(view: View, key: str) -> None:
    """A key while the fleet is hidden: it scrolls or goes back."""
    steps = {**_STEPS, "home": -MOST_LINES, "g": -MOST_LINES, "end": MOST_LINES}
    step = steps.get(key, MOST_LINES if key == "G" else 0)
    if not step:
        view.overlay = None
    elif view.overlay is Overlay.LOG:
        view.scroll = max(0, view.scroll - step)
    else:
        view.scroll = max(0, view.scroll + step)


def _type(view: View, key: str) -> None:
    """A key of the filter: enter keeps it, escape drops it."""
    if key in ("enter", "escape"):
        view.typing = False
    if key == "escape":
        view.set_filter("")
    elif key == "backspace":
        view.set_filter(view.filter[:-1])
    elif len(key) == 1 and key.isprintable():
        view.set_filter(view.filter + key)
    else:
        _move(view, key)


def _leave(view: View) -> Action | None:
    if not view.attached:
        return Quit()
    streams = view.snapshot.router.open_streams if view.snapshot is not None else 0
    view.question = Question(view.texts("ask_stop", more=_in_flight(view, streams)), Quit())
    return None


def _suspend(view: View) -> Action | None:
    if not view.attached:
        return Suspend()
    view.message = view.texts("no_suspend")
    return None


def _may_change(view: View) -> bool:
    """Whether this client may administrate the router; says why not."""
    if view.hello is not None and not view.hello.admin:
        view.message = view.texts("not_admin")
    elif not view.connected:
        view.message = view.texts("not_connected")
    return not view.message


def _ask_drain(view: View, *, on: bool) -> None:
    server = view.chosen()
    if server is None or not _may_change(view):
        return
    if on == (server.state == "draining"):
        key = "already_draining" if on else "not_draining"
        view.message = view.texts(key, server=server.name)
    elif on:
        more = _in_flight(view, server.leases)
        text = view.texts("ask_drain", server=server.name, more=more)
        view.question = Question(text, SetDrain(server.name, on=True))
    else:
        text = view.texts("ask_undrain", server=server.name)
        view.question = Question(text, SetDrain(server.name, on=False))


def _ask_reload(view: View) -> None:
    if view.snapshot is None or not _may_change(view):
        return
    file = view.snapshot.router.reload.source
    if file is None:
        view.message = view.texts("no_file")
    else:
        view.question = Question(view.texts("ask_reload", file=file), ReloadFile())


def _in_flight(view: View, number: int) -> str:
    return view.texts("some_in_flight" if number else "none_in_flight", n=number)


def _move(view: View, key: str) -> None:
    names = [server.name for server in view.servers()]
    if not names:
        return
    at = names.index(view.selected) if view.selected in names else 0
    ends = {"home": 0, "g": 0, "end": len(names) - 1, "G": len(names) - 1}
    at = ends.get(key, at + _STEPS.get(key, 0))
    view.selected = names[min(max(at, 0), len(names) - 1)]
