"""Keys and the mouse: what they show, select and ask for."""

from __future__ import annotations

import time
from typing import Any

import pytest

from support.feed_makers import NOW, event, hello, server, snapshot
from support.monitor_view import picture, view
from vllm_router.cli.monitor.actions import Overlay, Quit, ReloadFile, Suspend
from vllm_router.cli.monitor.controls import click, press
from vllm_router.cli.monitor.draw import server_at
from vllm_router.cli.monitor.keys import Click, decode
from vllm_router.cli.monitor.overlays import KEYS, clamp_scroll
from vllm_router.cli.monitor.state import View
from vllm_router.web import schema


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"\x1b[<0;12;5M", [Click(11, 4)]),
        (b"\x1b[<0;12;5m", []),  # released
        (b"\x1b[<16;300;100M", [Click(299, 99)]),  # with control
        (b"\x1b[<2;12;5M", []),  # the right button
        (b"\x1b[<64;1;1M\x1b[<65;1;1Mq", ["wheel-up", "wheel-down", "q"]),
        (b"\x1b[<0;12M", []),
        (b"\x1b[<0;99999999;5M", []),
        (b"\x1b[M qqx", ["x"]),  # a click in the old form, in column 81 and line 81
        (b"\x1a", ["ctrl-z"]),
    ],
)
def test_mouse_events_are_decoded(data: bytes, keys: list[Any]):
    assert decode(data) == (keys, b"")
    for at in range(len(data)):
        first, rest = decode(data[:at])
        second, rest = decode(rest + data[at:])
        assert (first + second, rest) == (keys, b"")


def place_of(shown: View, name: str, width: int, height: int) -> int:
    """The line of the screen with this server's row."""
    lines = picture(shown, width, height)
    return next(n for n, line in enumerate(lines) if line[2:].lstrip("▸ ").startswith(f"{name} "))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 15), (120, 40), (200, 60)])
def test_click_selects_the_server_in_that_line_and_opens_it_the_second_time(
    width: int, height: int
):
    shown = view(*(server(f"gpu-{n:02}") for n in range(20)))
    shown.take(event(1, "something"), NOW)
    row = place_of(shown, "gpu-03", width, height)
    assert server_at(shown, width, height, row) == "gpu-03"
    assert server_at(shown, width, height, 0) is None
    assert server_at(shown, width, height, height - 1) is None
    click(shown, server_at(shown, width, height, row))
    assert (shown.selected, shown.overlay) == ("gpu-03", None)
    click(shown, None)
    assert (shown.selected, shown.overlay) == ("gpu-03", None)
    click(shown, "gpu-03")
    assert shown.overlay is Overlay.DETAILS
    assert server_at(shown, width, height, row) is None
    click(shown, None)
    assert shown.overlay is None


def test_click_answers_a_question_with_no():
    shown = view(server("a"))
    press(shown, "d")
    click(shown, "a")
    assert (shown.question, shown.overlay) == (None, None)


def test_wheel_moves_the_selection():
    shown = view(*(server(f"s{n}") for n in range(9)))
    press(shown, "wheel-down")
    assert shown.selected == "s3"
    press(shown, "wheel-up")
    assert shown.selected == "s0"


def test_ctrl_z_suspends_only_a_monitor_of_its_own():
    assert press(view(server("a")), "ctrl-z") == Suspend()
    own = view(server("a"), attached=True)
    assert press(own, "ctrl-z") is None
    assert "would stop the router" in own.message


# -- reload -----------------------------------------------------------------------------------


def with_file(admin: bool = True, source: str | None = "servers.toml") -> View:
    reload = schema.ReloadView(source=source, generation=1, applied=0, refused=0, error=None)
    shown = View("http://router:8888")
    shown.take(hello(admin=admin), NOW)
    shown.take(snapshot(server("a"), reload=reload), NOW)
    return shown


def test_reload_asks_and_only_y_confirms():
    shown = with_file()
    assert press(shown, "R") is None
    assert "Read servers.toml again? y/n" in "".join(picture(shown))
    assert press(shown, "n") is None
    press(shown, "R")
    assert press(shown, "y") == ReloadFile()


def test_reload_without_rights_file_or_router_says_why():
    for shown, why in (
        (with_file(admin=False), "own machine"),
        (with_file(source=None), "command line"),
    ):
        press(shown, "R")
        assert shown.question is None
        assert why in shown.message
    assert press(View("http://router:8888"), "R") is None


def test_reload_key_is_shown_where_there_is_a_file():
    assert " R  reload" in "".join(picture(with_file(), 160, 24))
    assert " R  reload" not in "".join(picture(with_file(source=None), 160, 24))


# -- last requests ----------------------------------------------------------------------------


def request(**facts: Any) -> dict[str, Any]:
    known = {
        "time": NOW,
        "model": "llama",
        "served_model": "llama",
        "server": "gpu-1",
        "attempts": 2,
        "retries": ["connect_failed"],
        "outcome": "answered",
        "status": 200,
        "code": None,
        "failed": False,
        "first_byte_seconds": 0.25,
        "duration_seconds": 1.5,
    }
    return known | facts


def test_requests_key_shows_the_last_requests():
    shown = view(server("gpu-1"))
    press(shown, "t")
    assert "No request yet." in "".join(picture(shown))
    shown.requests = [
        request(),
        request(model="gpt", served_model="llama", server=None, status=503, code="no_server"),
        request(model=None, served_model=None, duration_seconds=None, evil="\x1b[2J"),
    ]
    lines = picture(shown, 120, 24)
    clock = time.strftime("%H:%M:%S", time.localtime(NOW + 1.5))
    first = next(line for line in lines if "200 answered" in line)
    words = f"│ {clock} llama gpu-1 200 answered 2 250 ms 1.50 s │"
    assert first.split() == words.split()
    assert any("gpt → llama" in line and "503 no_server" in line for line in lines)
    shown.requests_problem = "An API key is needed"
    assert "An API key is needed" in "".join(picture(shown))
    press(shown, "q")
    assert shown.overlay is None


def test_requests_are_beside_the_events_of_a_wide_screen_and_below_them_on_a_narrow_one():
    shown = view(*(server(f"gpu-{n}") for n in range(4)))
    shown.take(event(1, "something happened"), NOW)
    shown.requests = [request(model=f"model-{n}") for n in range(50)]
    wide = picture(shown, 200, 60)
    assert any("EVENTS" in line and "LAST REQUESTS" in line for line in wide)
    assert any("something happened" in line and "model-0" in line for line in wide)
    narrow = "\n".join(picture(shown, 100, 40))
    assert narrow.index("EVENTS") < narrow.index("LAST REQUESTS") < narrow.index("model-3")
    assert "REQUESTS/S" in narrow  # beside the charts, not instead of them
    assert "LAST REQUESTS" not in "".join(picture(shown, 80, 24))
    shown.events.clear()
    assert any("LAST REQUESTS" in line for line in picture(shown, 200, 60))


# -- the log, and scrolling -------------------------------------------------------------------


def test_log_key_shows_the_end_of_the_log_and_scrolls_back():
    shown = view(server("a"), attached=True)
    press(shown, "l")
    assert "The log is empty." in "".join(picture(shown))
    shown.log = [f"2026-11-30 ERROR serve: line {n}" for n in range(100)]
    text = "".join(picture(shown))
    assert "line 99" in text
    assert "line 79" not in text
    press(shown, "wheel-up")
    assert "line 99" not in "".join(picture(shown))
    press(shown, "home")
    clamp_scroll(shown, 76, 22)
    assert "line 0" in "".join(picture(shown))
    press(shown, "down")
    press(shown, "down")
    assert "line 0 " not in "".join(picture(shown))
    press(shown, "end")
    assert "line 99" in "".join(picture(shown))


def test_log_of_another_monitor_is_elsewhere():
    shown = view(server("a"))
    press(shown, "l")
    assert shown.overlay is None
    assert "where the router runs" in shown.message


def test_overlay_longer_than_the_screen_scrolls_and_says_where():
    shown = view(server("a"))
    press(shown, "?")
    assert "Lines 1-" in "".join(picture(shown, 80, 15))
    press(shown, "end")
    clamp_scroll(shown, 76, 13)
    assert shown.scroll < 100
    assert "red from 90 %" in "".join(picture(shown, 80, 15))
    press(shown, "up")
    assert shown.overlay is Overlay.HELP
    press(shown, "?")
    assert shown.overlay is None


def test_help_names_every_key_that_works():
    help_text = " ".join(key for key, _ in KEYS)
    for key in "s/ertlduRmq?":
        assert key in help_text


def test_small_screen_gives_the_lines_about_the_selected_server_to_servers():
    shown = view(*(server(f"gpu-{n:02}") for n in range(20)))
    for number in range(1, 9):
        shown.take(event(number, "something"), NOW)
    lines = picture(shown, 60, 15)
    assert sum("gpu-" in line for line in lines) == 10
    assert press(shown, "q") == Quit()
