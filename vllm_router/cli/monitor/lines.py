"""Single lines of the monitor: the figures, the selected server, the keys, the first request. Pure.

Names, reasons and problems are escaped, as in `draw`.
"""

from __future__ import annotations

import json

from rich.cells import cell_len
from rich.text import Text

from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.order import SORTS
from vllm_router.cli.monitor.servers import models_of
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.styles import STATE_STYLES
from vllm_router.cli.monitor.texts import reason_of
from vllm_router.observability.formatting import visible

_FIRST_REQUEST = 5
"""Lines that say how to send a first request."""

_PAGE_ROOM = 12
"""Lines from which an empty one is above, and one below names the page; the frame does, too."""


def first_request_lines(view: View, room: int) -> list[Text]:
    """What to do on a router that no client has used; empty if there is no room for it."""
    if view.snapshot is None or not view.snapshot.router.unused or room < _FIRST_REQUEST:
        return []
    url = view.url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
    models = [model for server in view.snapshot.servers for model in server.models or ()]
    # Servers choose the names: one with an apostrophe must not end the quoted argument.
    model = json.dumps(models[0] if models else "MODEL").replace("'", "'\\''")
    page = visible(view.texts("first_page", url=url))
    # Short lines: what the frame cuts cannot be copied.
    lines = (
        f"  curl {url}/v1/chat/completions \\",
        "    -H 'Content-Type: application/json' \\",
        f"""    -d '{{"model": {model},""",
        """         "messages": [{"role": "user", "content": "Hello!"}]}'""",
    )
    roomy = room >= _PAGE_ROOM
    return [
        *([Text()] if roomy else ()),
        Text(view.texts("first_request"), style="bold"),
        *(Text(visible(line), style="cyan") for line in lines),
        *([Text(page, style="bold")] if roomy else ()),
    ]


def figures_line(view: View, width: int) -> Text:
    texts, trouble = view.texts, visible(view.texts.trouble(view.trouble))
    if view.snapshot is None:
        return Text(trouble and texts("no_router", why=trouble))
    if not view.connected:
        return Text(texts("figures_old", why=trouble), style="bold red not dim")
    fleet, router = view.snapshot.fleet, view.snapshot.router
    text = Text()
    for figure, name, style in (
        (words.rate(fleet.requests_per_s), "req_s", ""),
        (words.rate(fleet.tokens_per_s), "tok_s", ""),
        (words.seconds(fleet.ttft.p95 if fleet.ttft else None), "ttft_p95", ""),
        (words.rate(fleet.errors_per_s), "err_s", "red" if fleet.errors_per_s else ""),
        (str(router.open_streams), "in_flight", ""),
    ):
        part = Text().append(figure, f"bold {style}".strip()).append(f" {texts(name)}  ")
        if text.cell_len + part.cell_len - 2 <= width:
            text.append_text(part)
    room = min(60, width - text.cell_len - 6)
    if room >= 8:
        text.append(f"{texts('load')} ", "bright_black")
        text.append(words.sparkline(view.trend.values("load", hour=view.hour), room), "cyan")
    return text


def detail_lines(view: View) -> list[Text]:
    """Two lines about the selected server."""
    server, texts = view.chosen(), view.texts
    if server is None or view.snapshot is None:
        return [Text(texts("no_servers") if view.snapshot is not None else "")]
    first = Text().append(visible(server.name), "bold").append(f"  {visible(server.url)}  ")
    span = words.span(view.snapshot.time - server.since, texts)
    state = texts("state_for", state=texts.word("state", server.state), span=span)
    style = STATE_STYLES.get(server.state, "")
    if server.reason:
        reason = visible(reason_of(texts, server))
        before, after = texts("with_reason", state="\0", reason=reason).split("\0")
        first.append(before + state, style).append(after)
    else:
        first.append(state, style)
    key = "metrics_stale" if server.stale else "metrics_age"
    age = words.seconds(server.metrics_age)
    metrics = texts("metrics_never") if server.metrics_age is None else texts(key, age=age)
    second = Text(f"{metrics} {models_of(server, texts)}", style="bright_black")
    return [first, second]


def keys_line(view: View, width: int) -> Text:
    """The question or message, else the filter, else the keys that fit."""
    texts = view.texts
    if view.question is not None:
        return Text(style="bold").append(visible(view.question.text) + " ").append("y/n", "reverse")
    if view.message:
        return Text(visible(view.message), style="bold yellow")
    if view.typing or view.filter:
        text = Text(texts("filter"), style="bold").append(visible(view.filter))
        if view.typing:
            return text.append("▏").append(texts("filter_typing"), "bright_black")
        return text.append(texts("filter_kept"), "bright_black")
    reload = view.snapshot.router.reload if view.snapshot is not None else None
    if reload is not None and reload.error:
        first = visible(reload.error.splitlines()[0])
        return Text(texts("file_refused"), style="bold red").append(first, "red")
    text = Text()
    for key, does in (
        ("q", texts("key_stop" if view.attached else "key_quit")),
        ("?", texts("key_help")),
        ("s", texts("key_sort", name=texts(SORTS[view.sort][0]))),
        ("/", texts("key_filter")),
        ("d", texts("key_drain")),
        ("u", texts("key_undrain")),
        ("e", texts("key_explain")),
        ("m", texts("key_models")),
        ("r", texts("key_minutes" if view.hour else "key_hour")),
        ("enter", texts("key_details")),
        ("t", texts("key_requests")),
        *([("l", texts("key_log"))] if view.attached else ()),
        *([("R", texts("key_reload"))] if reload is not None and reload.source else ()),
    ):
        if text.cell_len + len(key) + cell_len(does) + 4 <= width:
            text.append(f" {key} ", "reverse").append(f" {does} ")
    return text
