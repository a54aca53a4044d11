"""The parts of the monitor that need no terminal: keys, state, drawing."""

from __future__ import annotations

import json
import shlex

import msgspec
import pytest
from rich.console import Console

from support.feed_makers import (
    NOW,
    event,
    hello,
    other_router,
    server,
    shared,
    snapshot,
)
from support.monitor_view import model, picture, styles, view, with_models
from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.actions import Explain, Overlay, Quit, SetDrain
from vllm_router.cli.monitor.controls import press
from vllm_router.cli.monitor.keys import decode
from vllm_router.cli.monitor.order import SORTS
from vllm_router.cli.monitor.plain import stamped, summary
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.styles import heat
from vllm_router.web import schema

# -- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "keys", "rest"),
    [
        (b"q", ["q"], b""),
        (b"sd", ["s", "d"], b""),
        (b"\x7f\x08", ["backspace", "backspace"], b""),
        (b"\x03", ["ctrl-c"], b""),
        (b"\x1b[A\x1b[B", ["up", "down"], b""),
        (b"\x1bOA", ["up"], b""),
        (b"\x1b[5~x", ["page-up", "x"], b""),
        (b"\x1b", [], b"\x1b"),
        (b"q\x1b[", ["q"], b"\x1b["),
        (b"\x1b[1;5C", [], b""),
        (b"\x1b[200~", [], b""),
        (b"\x1bq", ["q"], b""),
        ("é中".encode(), ["é", "中"], b""),
        ("中".encode()[:2], [], "中".encode()[:2]),
        (b"\xff", [], b"\xff"),
    ],
)
def test_keys_of_bytes_are_decoded(data: bytes, keys: list[str], rest: bytes):
    assert decode(data) == (keys, rest)


def test_keys_any_split_of_bytes_gives_same_keys():
    data = b"a\x1b[A\x1b[6~\x1bOBz\x03"
    for at in range(len(data) + 1):
        first, rest = decode(data[:at])
        second, rest = decode(rest + data[at:])
        assert (first + second, rest) == (["a", "up", "page-down", "down", "z", "ctrl-c"], b"")


def test_monitor_drain_asks_and_only_y_confirms():
    shown = view(server("a"), server("b"))
    assert press(shown, "down") is None
    assert press(shown, "d") is None
    assert shown.question is not None
    assert "b" in shown.question.text
    assert press(shown, "x") is None
    assert shown.question is None
    assert press(shown, "d") is None
    assert press(shown, "y") == SetDrain("b", on=True)


def test_monitor_undrain_applies_to_draining_servers():
    shown = view(server("a", state="draining", reason="draining, 2 in flight"))
    assert press(shown, "d") is None
    assert "already" in shown.message
    press(shown, "u")
    assert press(shown, "y") == SetDrain("a", on=False)


def test_monitor_drain_is_refused_without_rights_or_connection():
    guest = View("http://router:8888")
    guest.take(hello(admin=False), NOW)
    guest.take(snapshot(server("a")), NOW)
    press(guest, "d")
    assert guest.question is None
    assert "own machine" in guest.message

    alone = view(server("a"))
    alone.lost("Connection refused")
    press(alone, "d")
    assert alone.question is None
    assert "Not connected" in alone.message


def test_monitor_quit_of_own_view_asks_except_for_ctrl_c():
    assert press(view(server("a")), "q") == Quit()
    own = view(server("a"), attached=True)
    assert press(own, "q") is None
    assert press(own, "n") is None
    assert press(own, "q") is None
    assert press(own, "y") == Quit()
    press(own, "q")
    assert press(own, "ctrl-c") == Quit()


def test_monitor_selection_follows_its_server_through_sorting():
    shown = view(server("b", 0.2), server("a", 0.9), server("c", 0.5, state="down"))
    assert shown.selected == "c"
    orders = []
    for _ in SORTS:
        orders.append([one.name for one in shown.servers()])
        press(shown, "s")
        assert shown.selected == "c"
    assert orders[:4] == [["c", "b", "a"], ["b", "a", "c"], ["a", "c", "b"], ["a", "b", "c"]]
    assert shown.sort == 0
    press(shown, "end")
    press(shown, "down")
    assert shown.selected == "a"
    shown.take(snapshot(server("a")), NOW)
    assert shown.selected == "a"


def test_monitor_trouble_is_first_and_other_servers_keep_their_order():
    states = {"d": "up", "c": "full", "b": "up", "a": "draining", "e": "down", "f": "new"}
    shown = view(*(server(name, state=state) for name, state in states.items()))
    assert [one.name for one in shown.servers()] == ["e", "a", "d", "c", "b", "f"]


# -- the feed ---------------------------------------------------------------------------------


def test_monitor_events_are_kept_once_across_reconnects_and_restarts():
    shown = View("http://router:8888")
    shown.take(hello(event(1, "one"), event(2, "two")), NOW)
    shown.take(event(3, "three"), NOW)
    shown.take(hello(event(2, "two"), event(3, "three"), event(4, "four")), NOW)
    assert [one.text for one in shown.events] == ["one", "two", "three", "four"]
    shown.take(hello(event(1, "anew"), started=NOW), NOW)
    shown.take(event(0, "missed", kind="missed"), NOW)
    assert [one.text for one in shown.events][-2:] == ["anew", "missed"]


def test_monitor_unheard_events_do_not_depend_on_clocks():
    shown = View("http://router:8888")
    shown.take(hello(event(1, "one"), event(2, "two")), NOW)
    shown.take(snapshot(server("a")), NOW - 3600)  # this machine's clock is behind
    again = hello(event(1, "one"), event(2, "two"), event(3, "three"))
    assert [one.text for one in shown.unheard(again)] == ["three"]
    restarted = hello(event(1, "anew"), started=NOW)
    assert [one.text for one in shown.unheard(restarted)] == ["anew"]


def test_monitor_history_continues_when_the_clock_is_set_back():
    shown = view(server("a"))
    before = len(shown.trend.values("load", hour=False))
    for second in range(1, 6):
        shown.take(snapshot(server("a"), moment=NOW - 3600 + second), NOW)
    assert len(shown.trend.values("load", hour=False)) == before + 5
    assert len(shown.loads["a"]) == before + 5


def test_monitor_history_has_one_value_per_second():
    shown = view(server("a", 0.3))
    assert list(shown.loads["a"]) == [0.1, 0.5, 1.0, 0.3]
    shown.take(snapshot(server("a", 0.4), moment=NOW + 0.5), NOW + 0.5)
    assert list(shown.loads["a"])[3:] == [0.3]
    shown.take(snapshot(server("a", 0.6), server("new", 0.2), moment=NOW + 1), NOW + 1)
    assert list(shown.loads["a"])[3:] == [0.3, 0.6]
    assert list(shown.loads["new"]) == [0.2]
    assert list(shown.trend.values("load", hour=False)) == [None, 0.1, 0.9, 0.45, 0.45]


def test_monitor_newer_schema_is_refused():
    newer = hello()
    newer = schema.Hello(
        **{name: getattr(newer, name) for name in newer.__struct_fields__} | {"schema": 99}
    )
    with pytest.raises(ValueError, match="newer"):
        View("http://router:8888").take(newer, NOW)


# -- the screen -------------------------------------------------------------------------------


def test_monitor_small_screen_shows_servers_totals_and_events():
    shown = view(server("gpu-1", 0.5), server("gpu-2", 0.75), server("gpu-3", 1.2))
    shown.take(event(1, "gpu-1: unknown → up", server="gpu-1", old="unknown", new="up"), NOW)
    lines = picture(shown)
    text = "\n".join(lines)
    assert "vLLM Router 1.2.3 on box http://router:8888 live" in lines[0]
    assert "3/3 up · 12 running · 3 waiting · 9 in flight · load 45 % of 30" in lines[-1]
    assert "7.2 req/s" in text
    assert "250 ms TTFT p95" in text
    assert "▸ gpu-1" in text
    assert "120 %" in text
    assert "gpu-1: unknown → up" in text
    assert "up for 1 min" in text
    assert "drain" in lines[-2]


def test_monitor_wide_screen_shows_more_figures():
    text = "\n".join(picture(view(server("gpu-1"), models=True), 160, 50))
    for title in ("TTFT95", "REQ/S", "TOK/S", "ERR/S", "KV", "5 MIN", "MODELS"):
        assert title in text
        assert title not in "\n".join(picture(view(server("gpu-1"))))[: 80 * 5] or title[0] == "L"


def test_monitor_models_have_servers_rates_and_load():
    lines = picture(with_models(model("qwen")), 140, 40)
    title = next(line for line in lines if "MODEL " in line)
    row = next(line for line in lines if "qwen" in line)
    for name, figure in (("UP", "1/2"), ("TOK/S", "77"), ("TTFT95", "250 ms"), ("ERR", "25 %")):
        assert title.index(name) + len(name) == row.index(figure) + len(figure)
    assert "44 %" in row
    assert "MODEL " not in "".join(picture(with_models(model("qwen")), 80, 20))


def test_monitor_model_without_server_is_first_and_named_in_one_line():
    text = "\n".join(picture(with_models(model("fine"), model("lost", 0)), 120, 40))
    assert "! lost has had no server since" in text
    assert text.index("no server since", text.index("MODEL ")) < text.index(" fine")
    text = "\n".join(
        picture(
            with_models(model("a-whole", 2), model("b-drains", 1, draining=1), model("c-part")),
            120,
            40,
        )
    )
    assert text.index("c-part") < text.index("a-whole") < text.index("b-drains")
    text = "\n".join(picture(with_models(model("one", 0), model("two", 0)), 120, 40))
    assert "! 2 models have had no server since" in text


def test_monitor_model_with_fallback_or_drained_servers_is_no_outage():
    shown = with_models(
        model("x", 0, fallback="small"), model("y", 0, draining=2, without_server_since=None)
    )
    text = "\n".join(picture(shown, 120, 40))
    assert "! " not in text
    assert "small answers for it" in text
    assert "all its servers are draining" in text


def test_monitor_models_beyond_a_third_of_the_screen_are_counted():
    text = "\n".join(picture(with_models(*(model(f"m{n:02}") for n in range(50))), 120, 40))
    assert "and 41 more models" in text
    assert "▸ a" in text


def test_monitor_outage_names_servers_once_half_are_down():
    down = [server(f"s{n}", state="down", reason="unreachable") for n in range(3)]
    shown = view(*down, server("up"))
    assert "! 3 of 4 servers are down" in "\n".join(picture(shown, 120, 40))
    assert "! " not in "\n".join(picture(view(down[0], server("b"), server("c")), 120, 40))


@pytest.mark.parametrize(("load", "colour"), [(0.69, "green"), (0.7, "yellow"), (0.9, "red")])
def test_monitor_load_has_colour(load: float, colour: str):
    assert heat(load) == colour
    assert any(colour in style for style in styles(view(server("a", load)), "█"))


def test_monitor_unhealthy_server_shows_reason_instead_of_figures():
    shown = view(server("a"), server("b", state="down", reason="Connection refused (3 checks)"))
    line = next(line for line in picture(shown) if " b " in line)
    assert "down" in line
    assert "Connection refused (3 checks)" in line
    assert "%" not in line
    assert any("red" in style for style in styles(shown, "Connection refused"))


def test_monitor_foreign_text_never_controls_the_terminal():
    evil = "\x1b]0;owned\x07\x1b[2J\n"
    shown = view(server(f"a{evil}", models=(evil,), reason=evil, state="down"), models=True)
    shown.take(event(1, evil, kind="reload_refused"), NOW)
    shown.lost(evil)
    press(shown, "d")
    text = "".join(picture(shown, 160, 40))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\\x1b]0;owned" in text
    assert "\x1b" not in stamped(NOW, evil)


def test_monitor_wide_characters_keep_columns():
    shown = view(server("显卡服务器一号机房东侧"), server("b"))
    lines = picture(shown)
    row, other = (next(line for line in lines if name in line) for name in ("显卡", " b "))
    assert Console().render_str(row[: row.index("up")]).cell_len == other.index("up")


@pytest.mark.parametrize(("width", "height"), [(160, 50), (80, 24), (60, 12), (30, 8)])
def test_monitor_unused_router_shows_how_to_send_a_request(width: int, height: int):
    shown = View("http://0.0.0.0:8888")
    shown.take(hello(), NOW)
    shown.take(event(1, "one happened"), NOW)
    shown.take(event(2, "two happened"), NOW)
    unused = snapshot(*(server(f"gpu-{n}", models=["m"]) for n in range(3)), unused=True)
    shown.take(msgspec.structs.replace(unused, models=[model("m")]), NOW)
    text = "\n".join(picture(shown, width, height))
    assert ("curl http://127.0.0.1:8888/v1/chat/completions" in text) is (width >= 80)
    if width >= 80:
        lines = [line.strip("│ ") for line in text.splitlines()]
        first = next(n for n, line in enumerate(lines) if line.startswith("curl "))
        *_, body = shlex.split("\n".join(lines[first : first + 4]))
        assert json.loads(body)["messages"] == [{"role": "user", "content": "Hello!"}]
        assert "one happened" in text
    shown.take(snapshot(server("gpu-1"), unused=False), NOW)
    assert "curl" not in "\n".join(picture(shown, width, height))


def test_monitor_first_request_quotes_a_model_name_for_the_shell():
    name = "it's; touch /tmp/x #"
    shown = View("http://router:8888")
    shown.take(snapshot(server("a", models=[name]), unused=True), NOW)
    lines = [line.strip("│ ") for line in picture(shown, 100, 40)]
    first = next(n for n, line in enumerate(lines) if line.startswith("curl "))
    *_, body = shlex.split("\n".join(lines[first : first + 4]), comments=True)
    assert json.loads(body)["model"] == name


def test_monitor_lost_connection_is_shown_and_figures_stay():
    shown = view(server("gpu-1"))
    shown.lost("Connection refused")
    lines = picture(shown, now=NOW + 65)
    assert "no data for 1 min, trying again" in lines[0]
    assert "Connection refused; the figures are old" in lines[1]
    assert any("gpu-1" in line for line in lines)


def test_monitor_hundred_servers_scroll_with_selection():
    shown = view(*(server(f"gpu-{n:03}") for n in range(100)))
    assert any("gpu-000" in line for line in picture(shown))
    assert any("1-15 of 100" in line for line in picture(shown))
    press(shown, "end")
    lines = picture(shown)
    assert any("▸ gpu-099" in line for line in lines)
    assert not any("gpu-000" in line for line in lines)
    for _ in range(6):
        press(shown, "page-up")
    assert any("▸ gpu-039" in line for line in picture(shown))


@pytest.mark.parametrize(("width", "height"), [(20, 6), (40, 10), (80, 24), (300, 100)])
def test_monitor_fills_every_screen_size_exactly(width: int, height: int):
    shown = view(*(server(f"gpu-{n}", n / 10) for n in range(20)), models=True)
    for number in range(1, 50):
        shown.take(event(number, "something " * 10, kind="reload"), NOW)
    picture(shown, width, height)
    press(shown, "?")
    picture(shown, width, height)


def test_monitor_before_first_snapshot_draws_a_screen():
    picture(View("http://router:8888"))


# -- formatting -------------------------------------------------------------------------------


def test_bar_is_exact_to_an_eighth_and_never_empty_for_load():
    assert words.bar(0, 4) == "    "
    assert words.bar(0.001, 4) == "▏   "
    assert words.bar(0.5, 4) == "██  "
    assert words.bar(0.53, 4) == "██▏ "
    assert words.bar(1, 4) == "████"


@pytest.mark.parametrize(("share", "bar"), [(1.01, "███┃"), (2, "██┃█"), (10, "┃███"), (3, "")])
def test_bar_beyond_capacity_has_a_mark_at_the_capacity(share: float, bar: str):
    assert words.bar(share, len(bar)) == bar


def test_sparkline_keeps_peaks_and_gaps_with_newest_at_right():
    assert words.sparkline([], 4) == "    "
    assert words.sparkline([0.0, 0.5, 1.0], 5) == "  ▁▄█"
    assert words.sparkline([0.0, 1.0, 0.0, 0.0, None, None], 3) == "█▁ "
    assert words.sparkline([9.0], 1) == "█"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3700, "1 h 1 min"),
        (90000, "1 d 1 h"),
        (-1, "0 s"),
    ],
)
def test_span_is_formatted(value: float, text: str):
    assert words.span(value) == text


def test_monitor_summary_is_one_line_with_unhealthy_servers():
    shown = snapshot(server("a"), server("b", state="down"))
    assert summary(shown) == (
        "1/2 servers (1 down), 12 running, 3 waiting, 9 in flight, load 45 %, 7.2 req/s, 0 err/s, "
        "TTFT p95 250 ms"
    )


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (shared(), "1 router shares state, 0 in flight in the others"),
        (shared(other_router("b")), "2 routers share state, 3 in flight in the others"),
        (
            shared(other_router("b"), other_router("c", live=False, in_flight=0)),
            "2 routers share state, 3 in flight in the others; silent: c",
        ),
        (
            shared(*(other_router(name, same_configuration=False) for name in "bcdefg")),
            (
                "7 routers share state, 18 in flight in the others; another configuration: "
                "b, c, d, e, f, …"
            ),
        ),
        (
            shared(up=False, problem="no answer\x1b"),
            "shared state is down: redis://store:6379: no answer\\x1b",
        ),
    ],
)
def test_monitor_shows_the_other_routers(state: schema.SharedView, text: str):
    shown = view(server("a"))
    assert "in the others" not in "".join(picture(shown))
    shown.take(snapshot(server("a"), shared=state), NOW)
    assert text in "\n".join(picture(shown, 140, 30))
    assert stamped(NOW, summary(snapshot(server("a"), shared=state))).endswith("; " + text)


# -- charts, filter, one server, explanations ---------------------------------------------------


def with_history(shown: View, values: list[float | None]) -> View:
    history = schema.History(
        interval=1.0,
        end=NOW - 1,
        fleet={"requests_per_s": values, "tokens_per_s": [2000.0] * 300, "running": values},
        servers={},
    )
    hour = schema.History(interval=10.0, end=NOW - 1, fleet={"requests_per_s": [7.0]}, servers={})
    shown.take(msgspec.structs.replace(hello(), history=history, hour=hour), NOW)
    return shown


@pytest.mark.parametrize(
    ("servers", "width", "height", "titles"),
    [
        (9, 80, 24, ""),
        (3, 80, 24, "REQUESTS/S TOKENS/S"),
        (3, 80, 40, "REQUESTS/S TOKENS/S"),
        (3, 120, 40, "REQUESTS/S TOKENS/S FIRST TOKEN P95"),
        (20, 200, 60, "REQUESTS/S TOKENS/S FIRST TOKEN P95 RUNNING"),
        (60, 200, 60, ""),
    ],
)
def test_monitor_charts_use_the_room_that_servers_leave(
    servers: int, width: int, height: int, titles: str
):
    shown = with_history(view(*(server(f"s{n}") for n in range(servers))), [9.0] * 300)
    lines = picture(shown, width, height)
    assert [len(lines), {len(line) for line in lines}] == [height, {width}]
    found = [line for line in lines if "REQUESTS/S" in line]
    names = ("REQUESTS/S", "TOKENS/S", "FIRST TOKEN P95", "RUNNING")
    assert " ".join(name for name in names if found and name in found[0]) == titles


def test_monitor_chart_is_as_high_as_its_value_and_names_the_greatest():
    shown = with_history(view(server("a")), [None] * 200 + [10.0] * 50 + [5.0] * 50)
    lines = picture(shown, 80, 40)
    title = next(n for n, line in enumerate(lines) if "REQUESTS/S" in line)
    assert "REQUESTS/S 5.0" in lines[title]
    assert "max 10, 5 min" in lines[title]
    rows = [line[2:38] for line in lines[title + 1 : title + 13]]
    assert rows[0].rstrip().endswith("█")
    assert rows[0][-1] == " "  # five of ten: half the height
    assert rows[-1][-1] == "█"
    assert rows[-1].startswith(" ")  # nothing is known of the time before


def test_monitor_range_key_shows_the_last_hour():
    shown = with_history(view(server("a")), [9.0] * 300)
    assert press(shown, "r") is None
    assert any("max 7.0, 60 min" in line for line in picture(shown, 80, 40))
    press(shown, "r")
    assert any("max 9.0, 5 min" in line for line in picture(shown, 80, 40))


def test_monitor_trend_keeps_the_mean_of_ten_seconds_for_the_hour_as_the_router_does():
    shown = with_history(view(server("a")), [])
    for second in range(1, 21):
        fleet = msgspec.structs.replace(
            snapshot(server("a"), moment=NOW + second).fleet, requests_per_s=float(second)
        )
        shown.take(
            msgspec.structs.replace(snapshot(server("a"), moment=NOW + second), fleet=fleet),
            NOW + second,
        )
    assert list(shown.trend.values("requests_per_s", hour=True)) == [7.0, 5.5, 15.5]


def test_monitor_charts_have_a_gap_where_the_router_stood_still():
    shown = with_history(view(server("a")), [1.0])
    shown.take(snapshot(server("a", 0.2), moment=NOW), NOW)
    shown.take(snapshot(server("a", 0.3), moment=NOW + 10), NOW + 10)
    now = snapshot(server("a")).fleet.requests_per_s
    assert list(shown.trend.values("requests_per_s", hour=False)) == [1.0, now, *[None] * 9, now]
    assert list(shown.loads["a"])[-11:] == [0.2, *[None] * 9, 0.3]


def test_monitor_charts_of_rare_snapshots_have_the_right_time_and_no_gaps():
    shown = view(server("a"))
    rare = msgspec.structs.replace(hello().config, feed_interval=5.0)
    shown.take(msgspec.structs.replace(hello(), config=rare), NOW)
    before = len(shown.trend.values("running", hour=False))
    for seconds in (5, 10, 15):
        shown.take(snapshot(server("a", 0.2), moment=NOW + seconds), NOW + seconds)
    values = list(shown.trend.values("running", hour=False))[before:]
    assert len(values) == 15 + 1, "the history of the hello ends a second before"
    assert None not in values
    assert list(shown.loads["a"])[-14:] == [0.2] * 14


@pytest.mark.parametrize("key", ["?", "enter", "t"])
def test_monitor_filter_key_leaves_what_hides_the_servers(key: str):
    shown = view(server("gpu-1"), server("gpu-2"))
    press(shown, key)
    assert shown.overlay is not None
    for letter in "/2":
        press(shown, letter)
    assert shown.overlay is None
    assert [one.name for one in shown.servers()] == ["gpu-2"]


def test_monitor_filter_shows_matching_servers_until_escape():
    shown = view(server("gpu-1"), server("gpu-2", models=("Llama",)), server("cpu-3"))
    for key in ("/", "l", "L"):
        press(shown, key)
    assert [one.name for one in shown.servers()] == ["gpu-2"]
    assert shown.selected == "gpu-2"
    assert "filter: lL" in "".join(picture(shown))
    press(shown, "backspace")
    press(shown, "backspace")
    for key in "gpu":
        press(shown, key)
    press(shown, "enter")
    assert [one.name for one in shown.servers()] == ["gpu-1", "gpu-2"]
    assert press(shown, "q") == Quit()  # a key again, no letter of the filter
    assert "2 with gpu" in "".join(picture(shown))
    press(shown, "escape")
    assert len(shown.servers()) == 3


def test_monitor_filter_takes_no_control_characters():
    shown = view(server("gpu-1"))
    press(shown, "/")
    keys, _ = decode(b"g\x04\x01\tp")
    for key in keys:
        assert isinstance(key, str)
        press(shown, key)
    assert shown.filter == "gp"
    press(shown, "enter")
    (end,), _ = decode(b"\x04")
    assert isinstance(end, str)
    assert press(shown, end) == Quit()


def test_monitor_filter_without_match_says_so():
    shown = view(server("gpu-1"))
    for key in "/x":
        press(shown, key)
    assert "0 with x" in "".join(picture(shown))
    assert press(shown, "down") is None


def test_monitor_enter_shows_one_server_with_its_events():
    shown = view(server("a"), server("b", state="down", reason="Connection refused"))
    shown.take(event(7, "b: up → down", server="b", new="down"), NOW)
    shown.take(event(8, "a: down → up", server="a", new="up"), NOW)
    facts = {"kind": "states", "old": "up", "new": "down", "count": 2, "servers": ["b", "c"]}
    shown.take(event(9, "2 more servers: up → down", **facts), NOW)
    press(shown, "enter")
    lines = "\n".join(picture(shown))
    assert "down for 1 min: Connection refused" in lines
    assert "p50 100 ms, p95 250 ms, p99 1.50 s" in lines
    assert "b: up → down" in lines
    assert "2 more servers: up → down" in lines
    assert "a: down → up" not in lines
    assert press(shown, "x") is None
    assert "RUN" in "\n".join(picture(shown))


def test_monitor_explain_key_asks_for_the_model_of_the_server_and_shows_the_answer():
    shown = view(server("a", models=("m", "n")), server("b", models=None))
    assert press(shown, "e") == Explain("m")
    press(shown, "down")
    assert press(shown, "e") == Explain(None)
    row = {"server": "a", "load": 0.5, "score": 1.25, "parts": {}}
    out = {"server": "b", "load": 0.0, "state": "down", "reason": "Connection refused"}
    shown.show(Overlay.EXPLAINED)
    shown.explained = {
        "model": "m",
        "picked": "a",
        "policy": "adaptive",
        "note": "",
        "candidates": [row],
        "out": [out],
    }
    lines = picture(shown)
    why = "A request for the model 'm' would go to a because no other"
    assert any(why in line for line in lines)
    assert any("▸ a" in line and "50 %" in line and "1.25" in line for line in lines)
    assert any("Connection refused" in line for line in lines)
    press(shown, "escape")
    assert shown.overlay is None


def test_monitor_small_screen_keeps_the_share_of_the_load():
    shown = view(*(server(f"gpu-{n}", load=1.25) for n in range(9)))
    lines = picture(shown, 60, 15)
    assert sum("125 %" in line for line in lines) >= 6
    assert not any("IN FLT" in line for line in lines)


def test_monitor_failed_requests_leave_room_for_other_events():
    shown = view(server("a"))
    shown.take(event(1, "a: down → up"), NOW)
    for number in range(2, 300):
        shown.take(event(number, f"request {number} failed", kind="retries_exhausted"), NOW)
    assert len(shown.events) == 21
    lines = picture(shown, 80, 40)
    assert sum("request" in line for line in lines) == 4
    assert any("a: down → up" in line for line in lines)
    assert any("request 299" in line for line in lines)


def test_monitor_of_a_stopping_router_says_so():
    shown = view(server("a"))
    shown.take(snapshot(server("a"), draining=True), NOW)
    assert "stopping" in picture(shown)[0]


def test_monitor_refused_configuration_is_in_the_last_line():
    reload = schema.ReloadView(
        source="s.toml", generation=1, applied=0, refused=1, error="servers[0]: \x1b bad\nmore"
    )
    shown = view(server("a"))
    shown.take(snapshot(server("a"), reload=reload), NOW)
    assert "configuration refused: servers[0]: \\x1b bad" in picture(shown)[-2]


def test_monitor_details_of_a_removed_server_show_no_other_server():
    shown = view(server("a"), server("b"))
    press(shown, "down")
    press(shown, "enter")
    shown.take(snapshot(server("a")), NOW)
    assert "The server was removed." in "".join(picture(shown))
    shown.take(snapshot(server("a"), server("b")), NOW)
    assert "http://b:8000" in "".join(picture(shown))
    shown.take(snapshot(server("a")), NOW)
    press(shown, "escape")
    shown.take(snapshot(server("a")), NOW)
    assert shown.selected == "a"


def test_monitor_details_of_a_vanished_server_say_so():
    shown = view(server("a"))
    press(shown, "enter")
    shown.take(snapshot(), NOW)
    assert "The server was removed." in "".join(picture(shown))
