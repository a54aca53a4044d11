"""The monitor's table of models, and the line about an outage. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.text import Text

from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.styles import cut, heat, right
from vllm_router.cli.monitor.texts import ENGLISH, Texts
from vllm_router.observability.formatting import visible
from vllm_router.web.schema import ModelView, Snapshot

LEAST_HEIGHT = 22
"""Lines inside the frame from which models are shown."""

SICK = ("down", "ejected", "silent")

_FIGURES: tuple[tuple[str, int, Callable[[ModelView], str]], ...] = (
    ("UP", 7, lambda model: f"{model.available}/{model.servers}"),
    ("RUN", 5, lambda model: f"{model.running:.0f}"),
    ("WAIT", 5, lambda model: f"{model.waiting:.0f}"),
    ("REQ_S", 6, lambda model: words.rate(model.requests_per_s)),
    ("TOK_S", 6, lambda model: words.rate(model.tokens_per_s)),
    ("TTFT50", 7, lambda model: words.seconds(model.ttft.p50 if model.ttft else None)),
    ("TTFT95", 7, lambda model: words.seconds(model.ttft.p95 if model.ttft else None)),
    ("ERR", 5, lambda model: _share(model.errors_per_s, model.requests_per_s)),
    ("REF_S", 6, lambda model: words.rate(model.refused_per_s)),
)


def _share(part: float, whole: float) -> str:
    return words.percent(part / max(part, whole)) if part or whole else words.NONE


def outage(view: View) -> list[Text]:
    """One line: the models without a server, and the servers that are down if half of them are."""
    text = outage_text(view.snapshot, view.texts) if view.snapshot is not None else ""
    return [Text("! " + visible(text), style="bold red")] if text else []


def outage_text(snapshot: Snapshot, texts: Texts = ENGLISH) -> str:
    """The sentence about an outage; empty without one."""
    out = [model for model in snapshot.models if model.without_server_since and not model.fallback]
    parts = []
    if out:
        since = min(model.without_server_since or 0.0 for model in out)
        clock = time.strftime("%H:%M", time.localtime(since))
        key = "outage_model" if len(out) == 1 else "outage_models"
        parts.append(texts(key, model=out[0].name, n=len(out), clock=clock))
    fleet = snapshot.fleet
    sick = sum(fleet.states.get(state, 0) for state in SICK)
    if sick and 2 * sick >= fleet.servers and (out or fleet.servers > 1):
        parts.append(texts("outage_servers", n=sick, all=fleet.servers))
    return texts("join").join(parts)


def models_table(view: View, width: int, height: int) -> list[Text]:
    """The models, trouble first, in a third of the screen; an empty line below."""
    models = view.snapshot.models if view.snapshot is not None else []
    if height < LEAST_HEIGHT or not models:
        return []
    order = sorted(models, key=lambda model: (_health(model), model.name))
    room = max(2, height // 3 - 2)
    shown = order if len(order) <= room else order[: room - 1]
    figures = _fitting(width)
    left = width - sum(cells + 1 for _, cells, _ in figures)
    names = min(40, max(14, left // 2))
    bar = max(0, min(30, left - names - 1 - 6))
    texts = view.texts
    title = Text(style="bright_black").append(cut(texts("MODEL"), names) + " ")
    title.append(" ".join(right(texts(name), cells) for name, cells, _ in figures))
    title.append(" " + cut(texts("LOAD"), bar + 6))
    lines = [title, *(_line(model, names, bar, figures, texts) for model in shown)]
    if len(shown) < len(order):
        more = texts("more_models", n=len(order) - len(shown))
        lines.append(Text(more, style="bright_black"))
    return [*lines, Text()]


def _health(model: ModelView) -> int:
    """The smaller, the worse, in the order of the page: no server, a fallback, some missing."""
    if model.available:
        return 2 if model.available + model.draining < model.servers else 3
    if model.fallback:
        return 1
    return 3 if model.servers and model.draining == model.servers else 0


def _fitting(width: int) -> list[tuple[str, int, Callable[[ModelView], str]]]:
    """The figures that leave 36 cells for name and load."""
    found, left = [], width - 36
    for figure in _FIGURES:
        left -= figure[1] + 1
        if left < 0:
            break
        found.append(figure)
    return found


def _line(
    model: ModelView,
    names: int,
    bar: int,
    figures: list[tuple[str, int, Callable[[ModelView], str]]],
    texts: Texts,
) -> Text:
    note = _note(model, texts)
    out = model.available == 0 and not model.fallback and model.draining < max(model.servers, 1)
    line = Text().append(cut(visible(model.name), names) + " ", "bold red" if out else "")
    if note:
        line.append(f"{model.available}/{model.servers}".rjust(7) + "  ", "bold")
        return line.append(note, "bold red" if out else "yellow")
    line.append(" ".join(read(model).rjust(cells) for _, cells, read in figures) + " ")
    colour = heat(model.load)
    line.append(words.bar(model.load, bar), colour)
    return line.append(words.percent(model.load).rjust(6), f"bold {colour}")


def _note(model: ModelView, texts: Texts) -> str:
    """Why no figures are shown; empty while a server of the model is available."""
    if model.available:
        return ""
    if model.fallback:
        return texts("fallback_answers", model=visible(model.fallback))
    if model.servers and model.draining == model.servers:
        return texts("all_draining")
    if model.without_server_since is None:
        return texts("no_server_yet")
    clock = time.strftime("%H:%M", time.localtime(model.without_server_since))
    return texts("no_server_since", clock=clock)
