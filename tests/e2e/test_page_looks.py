"""The page's languages, themes, small screens, keyboard and screen reader support."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from support.browser import Page, contrast, new_page
from support.cli_process import Running, router
from support.router_process import own_machine

LIVE = "document.querySelector('#link').dataset.link === 'live'"
READY = f"{LIVE} && document.querySelectorAll('#fleet tbody tr').length === 3"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("router") / "stderr"
    with router(file, "--demo", "3", "--console") as started:
        yield started


async def opened(page: Page, demo: Running) -> None:
    await page.open(demo.url + "/")
    await page.wait(READY)


async def administrating(page: Page, demo: Running) -> None:
    """Open the page with the rights of the machine's own user, so that it has buttons."""
    await opened(page, demo)
    await sign_in(page, demo)


async def sign_in(page: Page, demo: Running) -> None:
    with own_machine(demo.url) as client:
        code = client.post("/admin/sign-in").json()["code"]
    await page.evaluate(f"location.assign({f'{demo.url}/#sign-in={code}'!r})")
    await page.wait(
        "[...document.querySelectorAll('#fleet button.action')]"
        ".filter(button => button.checkVisibility()).length === 3"
    )


# -- languages --------------------------------------------------------------------------------


async def test_page_language_follows_browser_and_choice_is_kept(browser: str, demo: Running):
    async with new_page(browser) as page:
        await page.tools.call(
            "Emulation.setUserAgentOverride", userAgent="test", acceptLanguage="zh-CN,en"
        )
        await opened(page, demo)
        assert await page.evaluate("document.documentElement.lang") == "zh-CN"
        assert "服务器" in await page.text("main")
        assert "正常" in await page.text("#fleet tbody")
        assert "→ 正常" in await page.text("#events")

        await page.choose("#language", "en")
        await page.wait("document.querySelector('#fleet tbody .chip').innerText === 'up'")
        assert await page.evaluate("document.documentElement.lang") == "en"
        await opened(page, demo)
        assert await page.evaluate("document.documentElement.lang") == "en"
        # The name of the other language stays in that language.
        left = await page.evaluate("document.body.innerText.replace('中文', '')")
        assert not any("\u4e00" <= char <= "\u9fff" for char in left)
        assert page.problems() == []


async def test_page_languages_are_complete(browser: str, demo: Running):
    async with new_page(browser) as page:
        await page.open(demo.url + "/")
        english, chinese = await page.evaluate(
            """Promise.all([import("/static/js/text.en.js"), import("/static/js/text.zh.js")])
               .then(([{en}, {zh}]) => [en, zh])"""
        )
        assert english.keys() == chinese.keys()
        for key, text in english.items():
            assert _placeholders(text) >= _placeholders(chinese[key]), key
        used = await page.evaluate(
            """[...document.querySelectorAll("*")]
               .flatMap(({dataset}) => [dataset.i18n, dataset.i18nLabel, dataset.i18nPlaceholder])
               .filter(Boolean)"""
        )
        assert set(used) <= english.keys()
        said = await page.evaluate(
            """Promise.all([import("/static/js/i18n.js"), import("/static/js/reasons.js")])
               .then(([{use}, {refusalText, saidText}]) => {
                   const leaving = {code: "server_leaving", message: "gone",
                                    values: {server: "a"}};
                   const newer = {code: "newer", message: "as it is"};
                   const failed = {text_code: "request_failed",
                                   text_values: {n: "2", server: "a", why: "queue_full"}};
                   use("en");
                   const english = refusalText(leaving);
                   use("zh");
                   return [english, refusalText(leaving), refusalText(newer), saidText(failed)];
               })"""
        )
        assert said[:3] == [
            "gone",
            chinese["refusal_server_leaving"].format(server="a"),
            "as it is",
        ]
        assert said[3].endswith(chinese["outcome_queue_full"])


async def test_page_sources_tell_what_is_wrong_and_are_hidden_if_there_are_none(
    browser: str, demo: Running
):
    async with new_page(browser) as page:
        await opened(page, demo)
        assert not await page.evaluate("document.querySelector('#sources').checkVisibility()")
        shown = await page.evaluate(_SOURCES)
        assert [row[0] for row in shown] == ["good", "waiting", "bad", "doubt", "part", "bad"]
        assert [row[1] for row in shown] == [
            *("answers\n3 up · 1 draining\n7 s\n", "not read yet\n–\n–\n"),
            *("fails\n3 up\n2 min\nno answer", "doubtful\n1 not ready\n7 s\nit names 1 server"),
            *("some left out\n3 up\n7 s\na: bad\nb: bad", "fails\n0\n7 s\n<b>x</b>"),
        ]
        assert page.problems() == []


_SOURCES = """import("/static/js/sources.js").then(({Sources}) => {
    const good = {kind: "dns", place: "vllm. A", targets: {up: 3}, age: 7, problem: null, doubt: "",
                  skipped: []};
    const shown = new Sources();
    shown.show([
        {...good, targets: {up: 3, drain: 1, wait: 0}},
        {...good, age: null, targets: {}},
        {...good, age: 130, problem: "no answer"},
        {...good, targets: {wait: 1}, doubt: "it names 1 server"},
        {...good, skipped: ["a: bad", "b: bad"]},
        {...good, targets: {}, problem: "<b>x</b>"},
    ].map((source, number) => ({...source, name: `source-${number}`})));
    return [...document.querySelectorAll("#sources-table tbody tr")].map(row => [
        row.dataset.health,
        [".s-state", ".s-targets", ".s-age", ".s-note"]
            .map(cell => row.querySelector(cell).innerText).join("\\n"),
    ]);
})"""


async def test_page_routers_show_what_differs_and_are_hidden_without_shared_state(
    browser: str, demo: Running
):
    async with new_page(browser) as page:
        await opened(page, demo)
        assert not await page.evaluate("document.querySelector('#routers').checkVisibility()")
        shown = await page.evaluate(_ROUTERS)
        assert shown == [
            ["own", "gw-1\nthis one\n50 s\n4\n"],
            ["good", "gw-2\nshares\n1 min\n3\n"],
            ["part", "<b>x</b>\ndiffers\n1 min\n3\nanother configuration\nanother version than 2"],
            ["gone", "gw-4\nsilent\n1 min\n0\nnot heard for 7 s"],
        ]
        assert page.problems() == []


_ROUTERS = """import("/static/js/routers.js").then(({Routers}) => {
    const other = {version: "2", uptime: 60, silent: 0, live: true, in_flight: 3, requests_per_s: 1,
                   same_configuration: true};
    const shared = {name: "gw-1", up: true, routers: [
        {...other, name: "gw-2"},
        {...other, name: "<b>x</b>", same_configuration: false, version: "1"},
        {...other, name: "gw-4", live: false, silent: 7, in_flight: 0},
    ]};
    const fleet = {leases: 4, requests_per_s: 9};
    new Routers().show({router: {uptime: 50, shared}, fleet}, "2");
    return [...document.querySelectorAll("#routers-table tbody tr")].map(row => [
        row.dataset.health,
        [".source-name", ".s-state", ".s-age", ".s-flight", ".s-note"]
            .map(cell => row.querySelector(cell).innerText).join("\\n"),
    ]);
})"""


def _placeholders(text: str) -> set[str]:
    return {part.split("}")[0] for part in text.split("{")[1:]}


# -- themes -----------------------------------------------------------------------------------


async def test_page_theme_follows_system_until_chosen(browser: str, demo: Running):
    theme = "document.documentElement.dataset.theme"
    async with new_page(browser) as page:
        await page.dark(True)
        await opened(page, demo)
        assert await page.evaluate(theme) == "dark"
        await page.dark(False)
        await page.wait(f"{theme} === 'light'")
        await page.choose("#theme", "dark")
        await page.wait(f"{theme} === 'dark'")
        await opened(page, demo)
        assert await page.evaluate(theme) == "dark"
        assert page.problems() == []


@pytest.mark.parametrize("dark", [False, True])
async def test_page_text_has_enough_contrast(browser: str, demo: Running, dark: bool):
    """WCAG 2.2 AA: 4.5 for text, 3 for large text. Also in every state of a server."""
    async with new_page(browser) as page:
        await page.dark(dark)
        await opened(page, demo)
        found = await page.evaluate(_COLOURS)
        weak = [
            (text, contrast(ink, ground))
            for text, ink, ground, great in found
            if contrast(ink, ground) < (3 if great else 4.5)
        ]
        assert len(found) > 60
        assert weak == []


_COLOURS = """(() => {
    const row = document.querySelector("#fleet tbody tr");
    for (const state of ["full", "ejected", "asleep", "down", "unknown", "draining"]) {
        const copy = row.cloneNode(true);
        copy.dataset.state = state;
        copy.querySelector(".chip").textContent = state;
        copy.querySelector(".reason").textContent = "a reason of " + state;
        copy.querySelector(".reason").hidden = false;
        // What a server that is away was doing is dimmed on purpose.
        copy.querySelector(".c-load").remove();
        row.parentNode.append(copy);
    }
    for (const mood of ["bad", "some", "good"]) {
        const item = document.createElement("li");
        item.dataset.mood = mood;
        item.append(document.createElement("time"), document.createElement("span"));
        item.lastChild.textContent = "an event that is " + mood;
        document.querySelector("#events").append(item);
    }
    for (const link of ["connecting", "stale", "lost", "draining"]) {
        const copy = document.querySelector("#link").cloneNode(true);
        copy.dataset.link = link;
        document.querySelector(".top").append(copy);
    }
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const colour = getComputedStyle(node).backgroundColor;
            if (!/, 0\\)$|transparent/.test(colour)) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = [];
    while (texts.nextNode()) {
        const {parentElement: parent, data} = texts.currentNode;
        const unseen = parent.closest(".visually-hidden, script, noscript, option, .skip");
        if (!data.trim() || !parent.checkVisibility() || unseen) continue;
        const style = getComputedStyle(parent);
        found.push([data.trim(), style.color, ground(parent), parseFloat(style.fontSize) >= 24]);
    }
    return found;
})()"""


async def test_page_of_unused_router_shows_how_to_send_a_request(browser: str, demo: Running):
    async with new_page(browser) as page:
        await opened(page, demo)
        command = await page.evaluate(
            "document.querySelector('.banner[data-mood=hint] pre').textContent"
        )
    assert command.startswith(f"curl -N {demo.url}/v1/chat/completions ")
    assert '"model":"demo"' in command


# -- small screens ----------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(320, 640), (390, 844), (768, 1024), (1024, 768)])
async def test_page_fits_every_screen(browser: str, demo: Running, width: int, height: int):
    async with new_page(browser, width=width, height=height, mobile=width < 700) as page:
        await opened(page, demo)
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        if width < 700:
            cut = await page.evaluate(
                """[...document.querySelectorAll("button, select, input")]
                   .filter((node) => node.checkVisibility() && node.closest("main"))
                   .filter((node) => node.getBoundingClientRect().right > innerWidth)
                   .map((node) => node.innerText)"""
            )
            assert cut == []


# -- keyboards and screen readers -------------------------------------------------------------


@pytest.mark.parametrize("width", [390, 1440])
async def test_page_screen_reader_finds_names_roles_and_table(
    browser: str, demo: Running, width: int
):
    """The accessibility tree, also where the table is drawn as cards."""
    async with new_page(browser, width=width, mobile=width < 700) as page:
        await administrating(page, demo)
        await page.evaluate("document.querySelector('#settings').click()")
        await page.wait("document.querySelector('#language').checkVisibility()")
        tree = (await page.tools.call("Accessibility.getFullAXTree"))["nodes"]
        nodes = [node for node in tree if not node["ignored"]]

        def of(role: str) -> list[dict[str, Any]]:
            return [node for node in nodes if node["role"]["value"] == role]

        def name(node: dict[str, Any]) -> str:
            return str(node.get("name", {}).get("value", ""))

        for role in ("button", "combobox", "searchbox", "table", "image", "region", "group"):
            assert of(role) or role == "group"
            assert all(name(node) for node in of(role)), role
        assert len(of("main")) == len(of("banner")) == 1
        levels = [
            next(p["value"]["value"] for p in node["properties"] if p["name"] == "level")
            for node in of("heading")
        ]
        assert levels.count(1) == 1
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        assert len(of("rowheader")) == 3 + await page.evaluate(
            "document.querySelectorAll('#models-table tbody tr').length"
        )
        assert len(of("row")) >= 3
        assert {name(node) for node in of("button")} >= {"Drain demo-1", "Drain demo-2"}
        if width > 700:
            # Of the models without the budget of errors, as there are no objectives.
            assert len(of("columnheader")) == 12 + 10
        assert await page.evaluate(
            "[...document.querySelectorAll('[id]')].length"
            " === new Set([...document.querySelectorAll('[id]')].map(node => node.id)).size"
        )


async def test_page_buttons_have_names_once_signed_in(browser: str, demo: Running):
    async with new_page(browser) as page:
        await opened(page, demo)
        await page.evaluate(
            """new MutationObserver(() => {
                const shown = [...document.querySelectorAll("#fleet button.action")];
                window.names = shown.filter(b => b.checkVisibility()).map(b => b.textContent);
            }).observe(document.querySelector("#fleet"), {attributeFilter: ["data-admin"]})"""
        )
        await sign_in(page, demo)
        assert await page.evaluate("window.names") == ["Drain"] * 3


async def test_page_keyboard_reaches_everything_with_visible_focus(browser: str, demo: Running):
    async with new_page(browser) as page:
        await administrating(page, demo)
        reached = []
        for _ in range(40):
            await page.press("Tab", 9)
            reached.append(
                await page.evaluate(
                    """(() => {
                        const {activeElement: node} = document;
                        const {outlineStyle, outlineWidth} = getComputedStyle(node);
                        return [node.id || node.className || node.innerText,
                                outlineStyle !== "none" && parseFloat(outlineWidth) >= 2];
                    })()"""
                )
            )
            if reached[-1][0] == "action" and sum(what == "action" for what, _ in reached) == 3:
                break
        names = [what for what, _ in reached]
        assert names[0] == "skip"
        assert {"settings", "60 min", "log-scroll", "columns", "search", "server-name"} <= set(
            names
        )
        assert names.count("action") == 3
        assert all(seen for _, seen in reached), reached


async def test_page_without_scripts_says_where_figures_are(browser: str, demo: Running):
    async with new_page(browser) as page:
        await page.tools.call("Emulation.setScriptExecutionDisabled", value=True)
        await page.tools.call("Page.navigate", url=demo.url + "/")
        await page.wait("document.querySelector('noscript a')")
        assert "load-stats" in await page.text("body")


def test_page_vendored_library_has_licence_and_version():
    vendored = Path(__file__).parents[2] / "vllm_router/web/static/vendor/uplot"
    head = (vendored / "uPlot.iife.min.js").read_text()[:200]
    assert "v1.6.32" in head
    assert "1.6.32" in (vendored / "README.txt").read_text()
    assert "MIT License" in (vendored / "LICENSE").read_text()
