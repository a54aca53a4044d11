"""The monitor's languages: every text has both, codes are translated, wide characters fit."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from support.feed_makers import NOW, event, hello, other_router, server, shared, snapshot
from support.monitor_view import model, picture, view, with_models
from vllm_router.cli import monitor
from vllm_router.cli.common import KEY_ADVICE
from vllm_router.cli.monitor import servers, words
from vllm_router.cli.monitor.actions import Overlay
from vllm_router.cli.monitor.events import event_text
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.table import TEXTS
from vllm_router.cli.monitor.texts import ENGLISH, Texts, language_of, reason_of
from vllm_router.fleet.reason import TEXTS as REASONS
from vllm_router.fleet.reason import because
from vllm_router.fleet.state import State
from vllm_router.proxy.retry import Outcome
from vllm_router.web.reasons import reason_fields

ZH = Texts("zh")
SOURCES = [
    *Path(monitor.__file__).parent.glob("*.py"),
    Path(monitor.__file__).parents[1] / "explain.py",
]
HAN = re.compile(r"[\u4e00-\u9fff]")
WITHOUT_HAN = {
    "TTFT50",
    "TTFT95",
    "event_state",
    "event_state_why",
    "with_reason",
    "sentences",
    "join",
    "tok_s",
    "TOK_S",
    "chart_tokens",
    "KV",
}
"""Keys whose Chinese text is punctuation, or a word that Chinese readers use as it is."""


def strings_in(path: Path) -> set[str]:
    constants = [
        node for node in ast.walk(ast.parse(path.read_text())) if type(node) is ast.Constant
    ]
    return {node.value for node in constants if isinstance(node.value, str)}


def test_texts_every_key_has_both_languages_with_the_same_values():
    for key, (english, chinese) in TEXTS.items():
        names = [sorted(re.findall(r"\{(\w+)", text)) for text in (english, chinese)]
        assert names[0] == names[1], key
        assert english, key
        assert HAN.search(chinese) or key in WITHOUT_HAN, key


def test_texts_every_key_is_used():
    found = set().union(*(strings_in(path) for path in SOURCES if "table.py" not in path.name))
    computed = ("trouble_", "source_", "done_reload_", "event_", "refusal_")
    assert [key for key in TEXTS if key not in found and not key.startswith(computed)] == []


def test_texts_of_troubles_are_the_ones_of_the_connection():
    folder = Path(monitor.__file__).parent
    sources = [folder / "link.py", folder / "state.py", folder.parent / "router_client.py"]
    said = "".join(path.read_text() for path in sources).replace("{self.url}", "{url}")
    said = said.replace("{describe(error)}", "{why}")
    for key, (english, _) in TEXTS.items():
        if key.startswith("trouble_") and not key.startswith("trouble_os_"):
            assert f'"{english}"' in said, key
    assert ZH.trouble("Connection refused") == "连接被拒绝"
    assert ZH.trouble("odd") == "odd"


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("the router was silent for 12 s", "路由器已 12 秒没有发送数据"),
        ("the router 2.0 is newer than this program", "路由器 2.0 比本程序新"),
        (
            "no router answers at http://gpu:8888: No route to host",
            "http://gpu:8888 没有路由器响应：无法到达主机",
        ),
    ],
)
def test_trouble_is_translated_with_its_values(english: str, chinese: str):
    assert (ZH.trouble(english), ENGLISH.trouble(english)) == (chinese, english)


def test_refusal_is_translated_with_its_values():
    found = ZH.refusal("no", "server_not_found", {"server": "x", "known": "a, b"})
    assert found == "没有服务器 x。现有：a, b。"
    assert ZH.refusal("odd", "of_a_newer_router", {}) == "odd"
    assert ENGLISH.refusal("There is no server 'x'.", "server_not_found", {}).endswith("'x'.")
    for code, advice in KEY_ADVICE.items():
        assert ENGLISH.refusal("", code, {}) == advice
        assert HAN.search(ZH.refusal("", code, {}))


@pytest.mark.parametrize(
    ("environ", "language"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LC_ALL": "zh", "LANG": "de_DE"}, "zh"),
        ({"LC_ALL": "", "LC_MESSAGES": "zh_CN", "LANG": "en_US"}, "zh"),
        ({"LC_ALL": "C.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "zha"}, "en"),
        ({}, "en"),
    ],
)
def test_language_is_of_the_first_locale_variable_that_is_set(
    environ: dict[str, str], language: str
):
    assert language_of(environ) == language


def test_texts_codes_of_the_router_have_chinese_words():
    for state in State:
        assert HAN.search(ZH.word("state", state.value)), state
    for outcome in Outcome:
        assert HAN.search(ZH.word("outcome", outcome.value)), outcome
    for code in REASONS.keys() - {"check_failed"}:
        assert HAN.search(ZH.reason("", [(code, {})])), code
    assert (ZH.word("state", "new"), ENGLISH.word("state", "up")) == ("new", "up")


def test_reason_is_translated_with_its_values_and_further_reasons():
    reason = because("check_status", path="/health", status=500).in_row(3)
    fields = reason_fields(reason.and_also(because("trial_in", seconds="4.0")))
    assert reason_of(ZH, server("a", **fields)) == "/health 返回 500（连续 3 次检查）；4.0 秒后试探"
    assert reason_of(ENGLISH, server("a", **fields)) == fields["reason"]
    row: dict[str, Any] = {**fields, "reason_also": [{"code": "trial_due", "values": {}}]}
    assert reason_of(ZH, row).endswith("；即将试探")
    assert (
        reason_of(ZH, {"reason": "of a newer router", "reason_code": "new"}) == "of a newer router"
    )


@pytest.mark.parametrize(
    ("kind", "facts", "text"),
    [
        ("state", {"server": "a", "old": "up", "new": "full"}, "a：正常 → 满载"),
        (
            "state",
            {
                "server": "a",
                "old": "up",
                "new": "down",
                **reason_fields(because("connection_refused")),
            },
            "a：正常 → 故障（连接被拒绝）",
        ),
        (
            "states",
            {"old": "up", "new": "down", "count": 9, "servers": ["a", "b"]},
            "另有 9 台服务器：正常 → 故障",
        ),
        ("full", {"servers": ["a", "b"], "count": 70}, "2 台服务器：一分钟内满载 70 次"),
        ("full", {"server": "a", "count": 7}, "a：一分钟内满载 7 次"),
        ("drained", {"server": "a"}, "a：已排空，没有在途请求"),
        ("missed", {"count": 3}, "漏掉 3 个事件"),
        ("reload", {}, "配置：the text"),
        ("discovery", {}, "发现服务器：the text"),
        ("reload_refused", {}, "配置被拒绝：the text"),
        (
            "reload_refused",
            {
                "text_code": "key_refused_more",
                "text_values": {
                    "where": "s.toml:3:1",
                    "key": "config.policy",
                    "problem": "expected text, got 3",
                    "n": "2",
                },
            },
            "配置被拒绝：s.toml:3:1，键 config.policy：expected text, got 3；另有 2 个问题",
        ),
        (
            "retries_exhausted",
            {
                "text_code": "request_failed",
                "text_values": {"request": "r", "n": "2", "server": "a", "why": "queue_full"},
            },
            "一个请求失败：尝试 2 次，最后一次在 a：等待队列已满",
        ),
        ("later", {}, "the text"),
        (
            "reload",
            {
                "text_code": "changes",
                "text_values": {"added": "2", "removed": "0", "details": "a → b", "more": "3"},
            },
            "配置：新增 2 台服务器，a → b，另有 3 项",
        ),
        (
            "discovery",
            {"text_code": "changes", "text_values": {"added": "0", "removed": "1"}},
            "发现服务器：移除 1 台服务器",
        ),
        ("reload", {"text_code": "changes"}, "配置：没有变化"),
        (
            "source",
            {
                "text_code": "source_doubt",
                "text_values": {"source": "dns", "doubt": "…", "named": "1", "kept": "3"},
            },
            "来源 dns：它只列出 1 台服务器，但未列出的 3 台仍能通过检查；暂时保留",
        ),
        (
            "source",
            {"text_code": "source_answers", "text_values": {"source": "dns"}},
            "来源 dns：已恢复",
        ),
        (
            "retries_exhausted",
            {"text_code": "requests_failed", "text_values": {"n": "7"}},
            "一秒内另有 7 个请求失败",
        ),
        ("source", {"text_code": "of a newer router"}, "the text"),
    ],
)
def test_event_is_translated_by_its_kind(kind: str, facts: dict[str, Any], text: str):
    assert event_text(ZH, event(1, "the text", kind, **facts)) == text


def in_chinese(*fleet: Any) -> View:
    return view(*fleet, texts=ZH)


@pytest.mark.parametrize(("width", "height"), [(30, 8), (60, 15), (80, 24), (120, 40), (200, 60)])
def test_monitor_in_chinese_fills_every_screen_exactly(width: int, height: int):
    down = reason_fields(because("connection_refused").in_row(3))
    shown = with_models(model("中文模型"), model("lost", 0), texts=ZH)
    assert shown.snapshot is not None
    shown.take(
        snapshot(
            server("显卡一号", 1.5),
            server("b", state="down", **down),
            shared=shared(other_router("网关")),
        ),
        NOW,
    )
    picture(shown, width, height)
    for overlay in Overlay:
        shown.show(overlay)
        picture(shown, width, height)


def test_monitor_in_chinese_translates_states_reasons_and_keys():
    shown = in_chinese(
        server("a", 0.5),
        server("b", state="down", **reason_fields(because("connection_refused"))),
        server("c", state="refusing"),
    )
    text = "\n".join(picture(shown, 120, 24))
    for part in (
        "实时",
        "2/3 可用" if "2/3" in text else "1/3 可用",
        "故障",
        "连接被拒绝",
        "拒绝部",
        "排空",
        "筛选",
        "在途",
    ):
        assert part in text
    shown.lost("the router is stopping")
    assert "路由器正在停止；显示的是旧数据" in "".join(picture(shown, 120, 24))


def test_monitor_in_chinese_keeps_columns_below_their_titles():
    lines = picture(in_chinese(server("显卡服务器", 0.5, running=7.0)), 120, 24)
    title = next(line for line in lines if "运行" in line and "状态" in line)
    row = next(line for line in lines if "显卡服务器" in line)
    assert cell_len(title[: title.index("运行") + 2]) == cell_len(row[: row.index(" 7 ") + 2])
    assert cell_len(title[: title.index("状态")]) == cell_len(row[: row.index("正常")])


def test_monitor_in_chinese_explains_a_choice():
    shown = in_chinese(server("a", models=("m",)))
    shown.show(Overlay.EXPLAINED)
    shown.explained = {
        "model": "m",
        "picked": "a",
        "policy": "adaptive",
        **reason_fields(because("equal_servers", n=2), "note"),
        "candidates": [{"server": "a", "load": 0.5, "score": 1.0, "parts": {}}],
        "out": [
            {"server": "b", "load": 0, "state": "down", **reason_fields(because("list_unread"))}
        ],
    }
    text = "\n".join(picture(shown, 120, 24))
    assert "对模型 m 的请求会发往 a，因为只有它可以接收（策略 adaptive）。" in text
    assert "2 台服务器得分相同" in text
    assert "无法读取其模型列表" in text


def test_span_in_chinese():
    spans = [words.span(value, ZH) for value in (5, 65, 3700, 90000)]
    assert spans == ["5 秒", "1 分钟", "1 小时 1 分", "1 天 1 小时"]


def test_every_column_title_fits_in_both_languages():
    for column in servers._columns(300):
        for text in TEXTS[column.title]:
            assert cell_len(text) <= column.width, text


def test_monitor_before_the_first_message_is_in_chinese():
    shown = View("http://router:8888", texts=ZH)
    shown.lost("Connection refused")
    assert "还没有路由器：连接被拒绝" in "".join(picture(shown))
    shown.take(hello(), NOW)
    assert "正在连接" in picture(shown)[0]
