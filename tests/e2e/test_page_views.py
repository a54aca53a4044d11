"""The page's panel of a server, its views, its address, and how it suits people's settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.browser import Page, new_page
from support.cli_process import Running, router
from support.router_process import chat, own_machine

AXE = (Path(__file__).parents[1] / "data/axe/axe.min.js").read_text()
READY = (
    "document.querySelector('#link').dataset.link === 'live'"
    " && document.querySelectorAll('#fleet tbody tr').length === 3"
)
REFUSED = "A request for nope would be refused: no server can take it."
PANEL = "document.querySelector('#details')"
PLOTS = "document.querySelectorAll('#details-charts .plot canvas').length"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A router that has answered two requests and refused one."""
    file = tmp_path_factory.mktemp("router") / "stderr"
    with (
        router(file, "--demo", "3", "--console") as started,
        httpx.Client(base_url=started.url, trust_env=False, timeout=60) as client,
    ):
        for model in ("demo", "demo", "nope"):
            client.post("/v1/chat/completions", json=chat(max_tokens=2, model=model))
        yield started


async def opened(page: Page, demo: Running, query: str = "") -> None:
    await page.open(f"{demo.url}/{query}")
    await page.wait(READY)


async def sign_in(page: Page, demo: Running) -> None:
    with own_machine(demo.url) as client:
        code = client.post("/admin/sign-in").json()["code"]
    await page.evaluate(f"location.hash = 'sign-in={code}'")
    await page.wait("document.querySelector('#fleet button.action').checkVisibility()")


# -- the panel of a server --------------------------------------------------------------------


async def test_page_server_panel_opens_by_click_and_key_and_drains(browser: str, demo: Running):
    link = "[...document.querySelectorAll('.server-name')].find(b => b.innerText === 'demo-2')"
    async with new_page(browser) as page:
        await opened(page, demo)
        await sign_in(page, demo)
        await page.click("#fleet .server-name[title='Details of demo-2']")
        await page.wait(f"{PANEL}.open && {PLOTS} === 4")
        assert "server=demo-2" in await page.evaluate("location.search")
        await page.press("Escape", 27)
        await page.wait(f"!{PANEL}.open")
        assert await page.evaluate(f"document.activeElement === {link}")

        await page.press("Enter", 13)
        await page.wait(f"{PANEL}.open && document.activeElement.id === 'details-close'")
        assert await page.text("#details-title") == "demo-2"
        await page.click("#details-drain")
        await page.wait("document.querySelector('#confirm').open")
        await page.click("#confirm-yes")
        try:
            await page.wait("document.querySelector('#details-chip').innerText === 'draining'")
            await page.wait(
                "document.querySelector('#details-events').innerText.includes('up → draining')"
            )
            assert await page.text("#details-reason") == "draining, 0 in flight"
            await page.wait("document.querySelector('#details-drain').innerText === 'Undrain'")
        finally:
            with own_machine(demo.url) as client:
                client.post("/admin/servers/demo-2/undrain")
        await page.wait("document.querySelector('#details-chip').innerText === 'up'")
        assert page.problems() == []


# -- views ------------------------------------------------------------------------------------


async def test_page_requests_view_filters_failed_and_keeps_it_in_the_address(
    browser: str, demo: Running
):
    rows = "[...document.querySelectorAll('#decisions-table tbody tr')]"
    async with new_page(browser) as page:
        await opened(page, demo)
        await page.click("[data-view=decisions]")
        await page.wait(f"{rows}.length === 3")
        assert not await page.evaluate("document.querySelector('#fleet').checkVisibility()")
        newest = await page.evaluate(f"{rows}.map(row => row.querySelector('.d-1').innerText)")
        assert newest == ["nope", "demo", "demo"]
        statuses = await page.evaluate(f"{rows}.map(row => row.querySelector('.d-3').innerText)")
        assert statuses == ["404 model_not_found", "200 answered", "200 answered"]

        await page.evaluate("document.querySelector('#decisions-search').focus()")
        for key in "nope":
            await page.press(key)
        await page.wait(f"{rows}.length === 1")
        query = await page.evaluate("location.search")
        assert query == "?view=decisions&find=nope"
        await opened(page, demo, query)
        await page.wait(f"{rows}.length === 1")
        assert page.problems() == []


async def test_page_explain_view_says_where_and_why_not(browser: str, demo: Running):
    verdict = "document.querySelector('#explain-result .verdict')?.innerText"
    out = "document.querySelector('#explain-result tbody tr:last-child')?.innerText"
    async with new_page(browser) as page:
        await opened(page, demo, "?view=explain&ask=demo")
        await page.wait(f"{verdict}?.startsWith('A request for demo would go to demo-')")
        assert (
            await page.evaluate(
                "document.querySelectorAll('#explain-result tr[data-picked]').length"
            )
            == 1
        )
        await page.evaluate("document.querySelector('#explain-model').select()")
        for key in "nope":
            await page.press(key)
        await page.press("Enter", 13)
        await page.wait(
            f"{verdict} === 'A request for nope would be refused: no server can take it.'"
        )
        assert "does not list the model" in await page.evaluate(out)
        assert "ask=nope" in await page.evaluate("location.search")

        await page.choose("#language", "zh")
        await page.wait(f"{out}?.includes('未列出该模型')")
        assert "没有服务器列出模型" in await page.text("#explain-result")
        assert page.problems() == []


# -- charts -----------------------------------------------------------------------------------


async def test_page_drag_in_a_chart_zooms_all_and_the_button_ends_it(browser: str, demo: Running):
    spans = (
        "[...document.querySelectorAll('#charts .plot')].length === 4"
        " && document.querySelector('#charts canvas')"
    )
    async with new_page(browser) as page:
        await opened(page, demo)
        await page.wait(spans)
        x, y, width = await page.evaluate(
            """(() => {
                const over = document.querySelector("#charts .u-over");
                over.scrollIntoView({block: "center"});
                const box = over.getBoundingClientRect();
                return [box.x, box.y + box.height / 2, box.width];
            })()"""
        )

        async def mouse(kind: str, share: float, buttons: int) -> None:
            await page.tools.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x + share * width,
                y=y,
                button="left" if kind != "mouseMoved" or buttons else "none",
                buttons=buttons,
                clickCount=0 if kind == "mouseMoved" else 1,
            )

        await mouse("mouseMoved", 0.2, 0)
        await mouse("mousePressed", 0.2, 1)
        for share in (0.3, 0.5, 0.7):
            await mouse("mouseMoved", share, 1)
        await mouse("mouseReleased", 0.7, 0)
        await page.wait("document.querySelector('#unzoom').checkVisibility()")
        # The time at the cursor.
        await page.wait("/^\\d\\d:\\d\\d/.test(document.querySelector('#cursor-time').innerText)")
        await page.click("#unzoom")
        await page.wait("!document.querySelector('#unzoom').checkVisibility()")
        assert page.problems() == []


async def test_page_sort_filter_range_and_theme_are_restored_from_the_address(
    browser: str, demo: Running
):
    shown = (
        "[...document.querySelectorAll('#fleet tbody tr')].filter(row => !row.hidden)"
        ".map(row => row.querySelector('.server-name').innerText).join()"
    )
    async with new_page(browser) as page:
        await opened(page, demo)
        await page.choose("#theme", "dark")
        await page.choose("#sort", "name")
        await page.evaluate("document.querySelector('#ranges button:nth-child(2)').click()")
        await page.press("/")
        for key in "o-3":
            await page.press(key)
        await page.wait(f"{shown} === 'demo-3'")
        await page.evaluate("document.querySelector('#models-table .model-name').click()")
        query = await page.evaluate("location.search")
        assert "model=demo" in query
    # Another browser, without what this one has stored.
    async with new_page(browser) as page:
        await opened(page, demo, query)
        await page.wait(f"{shown} === 'demo-3'")
        assert await page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert await page.evaluate("document.querySelector('#sort').value") == "name"
        assert await page.evaluate("document.querySelector('#search').value") == "o-3"
        chip = "document.querySelector('#model-filter')"
        assert (
            await page.evaluate(f"{chip}.checkVisibility() && {chip}.innerText") == "Model demo ×"
        )
        pressed = "document.querySelector('#ranges [aria-pressed=true]').innerText"
        assert await page.evaluate(pressed) == "15 min"
        assert page.problems() == []


# -- people's settings ------------------------------------------------------------------------

DRAWN = {
    "": "document.querySelectorAll('#charts .plot canvas').length === 4",
    "?view=decisions": "document.querySelectorAll('#decisions-table tbody tr').length === 3",
    "?view=explain&ask=demo": "document.querySelector('#explain-result .verdict')",
    "?server=demo-1": f"{PANEL}.open && {PLOTS} === 4",
}
"""The views, and what shows that each is drawn."""


ENGLISH = re.compile(r"[A-Za-z][A-Za-z_-]+")
NAMES = {
    *("vLLM", "Router", "English", "CPU", "KV", "LoRA", "TTFT", "token", "p50", "p95", "p99"),
    *("MB", "ms", "demo", "nope", "adaptive", "model_not_found"),
}
TEXTS = """(() => {
    const page = document.body.cloneNode(true);
    const names = "pre, code, time, .url, #router-name, script, noscript, option, [hidden]";
    for (const node of page.querySelectorAll(names)) node.remove();
    const texts = [];
    const walker = document.createTreeWalker(page, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) texts.push(walker.currentNode.data);
    for (const node of page.querySelectorAll("[aria-label], [placeholder]:not(textarea)")) {
        texts.push(node.ariaLabel ?? "", node.placeholder ?? "");
    }
    return texts.join("\\n");
})()"""


async def test_page_views_in_chinese_have_no_english_word_and_no_fault_that_axe_finds(
    browser: str, demo: Running
):
    async with new_page(browser) as page:
        for query, drawn in DRAWN.items():
            await opened(page, demo, f"{query}{'&' if query else '?'}language=zh&theme=light")
            await page.wait(drawn)
            text = re.sub(r"https?://\S+|/v1/\S+|demo-\d", "", await page.evaluate(TEXTS))
            assert set(ENGLISH.findall(text)) - NAMES == set(), query

            await page.evaluate(f"{AXE}; true")
            assert await axe(page, "{}") == [], query
            await page.choose("#theme", "dark")
            contrast = "{runOnly: ['color-contrast']}"
            assert await axe(page, contrast) == [], query


async def axe(page: Page, options: str) -> list[Any]:
    """What axe finds wrong: its rules, and the elements with the reasons."""
    found: list[Any] = await page.evaluate(
        f"""axe.run({options}).then(({{violations}}) => violations.map(({{id, nodes}}) =>
            [id, nodes.map(({{html, any}}) => [html.slice(0, 200), any[0]?.message])]))"""
    )
    return found


async def test_page_moves_nothing_with_reduced_motion(browser: str, demo: Running):
    moving = """[...document.querySelectorAll("*")].filter((node) => {
        const {transitionDuration, transitionProperty, animationName} = getComputedStyle(node);
        const moves = transitionProperty !== "none"
            && transitionDuration.split(",").some((text) => parseFloat(text) > 0);
        return moves || animationName !== "none";
    }).length"""
    async with new_page(browser) as page:
        await opened(page, demo)
        assert await page.evaluate(moving) > 0
        await page.tools.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-reduced-motion", "value": "reduce"}],
        )
        await page.wait(f"{moving} === 0")


async def test_page_forced_colours_keep_what_colour_shows(browser: str, demo: Running):
    async with new_page(browser) as page:
        await page.tools.call(
            "Emulation.setEmulatedMedia", features=[{"name": "forced-colors", "value": "active"}]
        )
        await opened(page, demo)
        adjust = await page.evaluate(
            """[".chip", ".bar", ".statebar span", ".key"].map((selector) =>
                [selector, getComputedStyle(document.querySelector(selector),
                    [".chip", ".key"].includes(selector) ? "::before" : null).forcedColorAdjust])"""
        )
        assert adjust == [[selector, "none"] for selector, _ in adjust]
        # The pressed one of several buttons differs by more than its colour.
        outlines = await page.evaluate(
            """["true", "false"].map((pressed) => getComputedStyle(
                document.querySelector(`#ranges [aria-pressed=${pressed}]`)).outlineStyle)"""
        )
        assert outlines == ["solid", "none"]


# -- menus ------------------------------------------------------------------------------------


async def test_page_menus_open_by_key_and_columns_stay_chosen(browser: str, demo: Running):
    menu = "document.querySelector('#settings-menu').matches(':popover-open')"
    shown = "document.querySelector('#fleet thead .c-kv').checkVisibility()"
    async with new_page(browser) as page:
        await opened(page, demo)
        await page.evaluate("document.querySelector('#settings').focus()")
        await page.press("Enter", 13)
        await page.wait(menu)
        await page.press("Tab", 9)
        assert await page.evaluate("document.activeElement.id") == "language"
        # It is below its button, and within the window.
        assert await page.evaluate(
            """(() => {
                const menu = document.querySelector("#settings-menu").getBoundingClientRect();
                const button = document.querySelector("#settings").getBoundingClientRect();
                return menu.top >= button.bottom && menu.right <= innerWidth && menu.left >= 0;
            })()"""
        )
        await page.press("Escape", 27)
        await page.wait(f"!{menu}")

        await page.click("#columns")
        await page.wait("document.querySelector('#columns-menu').matches(':popover-open')")
        await page.click("#column-kv")
        await page.wait(f"!{shown}")
        assert "hide=kv" in await page.evaluate("location.search")
        await opened(page, demo)
        assert not await page.evaluate(shown)
        assert not await page.evaluate("document.querySelector('#column-kv').checked")
        assert page.problems() == []


# -- events -----------------------------------------------------------------------------------


async def test_page_equal_changes_of_many_servers_are_one_line(browser: str, demo: Running):
    async with new_page(browser) as page:
        await opened(page, demo)
        lines = await page.evaluate(
            """(async () => {
                const {Events} = await import("/static/js/events.js");
                document.querySelector("#events").replaceChildren();
                const events = new Events();
                const event = {kind: "state", old: "up", new: "down", reason: ""};
                events.hello([], 1);
                for (let id = 1; id <= 98; id += 1) {
                    events.add({...event, id, time: 1000 + id / 100, server: `gpu-${id}`});
                }
                const servers = ["gpu-98", "gpu-99", "gpu-100"];
                events.add({...event, kind: "states", id: 99, time: 1002, count: 3, servers});
                events.add({...event, id: 100, time: 1500, server: "gpu-1"});
                const failed = {kind: "retries_exhausted", server: "gpu-2", text: "",
                                text_code: "request_failed",
                                text_values: {request: "r", n: "3", server: "gpu-2", why: "503"}};
                const more = {...failed, text_code: "requests_failed", text_values: {n: "40"}};
                for (let id = 101; id <= 400; id += 1) {
                    events.add({...id % 6 ? failed : more, id, time: 1501 + id / 10});
                }
                const kept = events.events.length;
                const shown = [...document.querySelectorAll("#events li span")];
                const requests = shown.shift().innerText;
                return [...shown.map(span => span.innerText), shown[1].title.split(", ").length,
                        events.of("gpu-7", 5).items.length,
                        events.of("gpu-100", 5).items[0].innerText, requests, kept];
            })()"""
        )
        kept, requests, own = lines.pop(), lines.pop(), lines.pop()
        assert requests == ("2250 requests failed, the last one after 3 attempts, on gpu-2: 503")
        assert kept == 100 + 40
        assert lines == ["gpu-1: up → down", "100 servers: up → down", 100, 1]
        assert own.endswith("gpu-100: up → down")


async def test_page_failed_requests_of_a_day_are_one_line_of_a_few_events(
    browser: str, demo: Running
):
    async with new_page(browser) as page:
        await opened(page, demo)
        found = await page.evaluate(
            """(async () => {
                const {Events} = await import("/static/js/events.js");
                document.querySelector("#events").replaceChildren();
                const events = new Events();
                events.hello([], 1);
                const failed = (id, code, values) => ({
                    kind: "retries_exhausted", server: "gpu-2", text: "", id, time: 1000 + id,
                    text_code: code, text_values: values});
                for (let id = 1; id <= 1000; id += 2) {
                    events.add(failed(id, "request_failed",
                                      {request: "r", n: "3", server: "gpu-2", why: "503"}));
                    events.add(failed(id + 1, "requests_failed", {n: "40"}));
                }
                const line = document.querySelector("#events li span").innerText;
                events.words();
                const again = document.querySelector("#events li span").innerText;
                return [line, again, events.groups.length, events.groups[0].length];
            })()"""
        )
        line = "20500 requests failed, the last one after 3 attempts, on gpu-2: 503"
        assert found == [line, line, 1, 3]


async def test_page_panel_of_a_removed_server_says_so_until_it_is_back(browser: str, demo: Running):
    async with new_page(browser) as page:
        await opened(page, demo, "?server=demo-2")
        await page.wait(f"{PANEL}.open && {PLOTS} === 4")
        # What the page makes of a snapshot without the server.
        await page.evaluate(
            """(() => {
                const {feed} = globalThis.vllmRouter;
                const take = feed.onMessage;
                globalThis.back = () => { feed.onMessage = take; };
                feed.onMessage = (message) => take(message.type !== "snapshot" ? message : {
                    ...message, servers: message.servers.filter(({name}) => name !== "demo-2")});
            })()"""
        )
        await page.wait("document.querySelector('#details-chip').innerText === 'removed'")
        assert "last figures" in await page.text("#details-reason")
        await page.evaluate("globalThis.back()")
        await page.wait("document.querySelector('#details-chip').innerText === 'up'")
        assert await page.evaluate("document.querySelector('#details-reason').hidden")
        assert page.problems() == []


async def test_page_late_answer_about_a_server_is_not_taken_for_another(
    browser: str, demo: Running
):
    async with new_page(browser) as page:
        await opened(page, demo)
        await page.evaluate(
            """(() => {
                globalThis.real = fetch;
                globalThis.fetch = (path, ...rest) => String(path).includes("admin/servers")
                    ? new Promise((answer) => { globalThis.answer = answer; })
                    : globalThis.real(path, ...rest);
            })()"""
        )
        confirm = "document.querySelector('#confirm')"
        await page.evaluate(
            """import("/static/js/dialogs.js").then(({Confirm}) => {
                globalThis.said = [];
                globalThis.asking = new Confirm((text) => globalThis.said.push(text));
                globalThis.asking.ask({name: "demo-1", leases: 0}, "drain");
            })"""
        )
        await page.click("#confirm-yes")
        await page.wait("globalThis.answer")
        await page.click("#confirm-no")
        await page.wait(f"!{confirm}.open")
        await page.evaluate("globalThis.asking.ask({name: 'demo-2', leases: 0}, 'drain')")
        await page.evaluate("globalThis.answer(new Response('{}'))")
        await page.wait("globalThis.said.length === 1")
        assert "demo-1" in await page.evaluate("globalThis.said[0]")
        assert await page.evaluate(f"{confirm}.open")
        assert "demo-2" in await page.text("#confirm-title")


async def test_page_late_answers_of_requests_and_explain_do_not_replace_newer_ones(
    browser: str, demo: Running
):
    async with new_page(browser) as page:
        await opened(page, demo)
        await page.evaluate(
            """(() => {
                globalThis.real = fetch;
                globalThis.answers = {};
                globalThis.fetch = (path, ...rest) => /^(decisions|explain)/.test(String(path))
                    ? new Promise((answer) => {
                        (globalThis.answers[path] ??= []).push((value) =>
                            answer(new Response(JSON.stringify(value))));
                      })
                    : globalThis.real(path, ...rest);
            })()"""
        )
        row = (
            "({model: 'm', served_model: null, server, status: 200, code: null, outcome: 'ok',"
            " attempts: 1, retries: [], waited_seconds: 0, first_byte_seconds: 0, time: 1,"
            " duration_seconds: 0, path: '/', failed: false, request_id: server})"
        )
        await page.evaluate(f"globalThis.row = (server) => {row}")
        asked = "(globalThis.answers['decisions?limit=200'] ?? [])"
        await page.click("[data-view=decisions]")
        await page.wait(f"{asked}.length >= 2")
        await page.evaluate(f"{asked}[1]({{decisions: [globalThis.row('newer')]}})")
        shown = "document.querySelector('#decisions-table tbody').textContent"
        await page.wait(f"{shown}.includes('newer')")
        await page.evaluate(
            f"Promise.resolve({asked}[0]({{decisions: [globalThis.row('older')]}}))"
            ".then(() => new Promise((done) => setTimeout(done, 50)))"
        )
        assert "newer" in await page.evaluate(shown)

        await page.click("[data-view=explain]")
        answer = (
            "{model: %s, picked: null, would_wait: false, policy: 'p', candidates: [], out: []}"
        )
        for model in ("first", "second"):
            await page.evaluate(
                f"(() => {{ document.querySelector('#explain-model').value = '{model}';"
                " document.querySelector('#explain-form').requestSubmit(); })()"
            )
        await page.wait("globalThis.answers['explain?model=second']?.length === 1")
        for model in ("second", "first"):
            await page.evaluate(
                f"Promise.resolve(globalThis.answers['explain?model={model}'].at(-1)("
                + answer % f"'{model}'"
                + ")).then(() => new Promise((done) => setTimeout(done, 50)))"
            )
        assert "second" in await page.text("#explain-result")


async def test_page_slash_finds_the_field_of_the_view_that_is_shown(browser: str, demo: Running):
    async with new_page(browser) as page:
        await opened(page, demo)
        focused = "document.activeElement.id"
        for view, field in (("decisions", "decisions-search"), ("fleet", "search")):
            await page.click(f"[data-view={view}]")
            await page.press("/")
            assert await page.evaluate(focused) == field
        await page.click("[data-view=explain]")
        taken = await page.evaluate(
            "!dispatchEvent.call(document.body, new KeyboardEvent('keydown',"
            " {key: '/', bubbles: true, cancelable: true}))"
        )
        assert taken is False, "the browser's own search"
