"""The page in a real browser, with real servers behind a real router."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from support.browser import new_page
from support.cli_process import router as demo_router
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until

EVIL = '<img src=x onerror="document.title=1">'
LIVE = "document.querySelector('#link').dataset.link === 'live'"


@pytest.fixture(scope="module")
def mocks() -> Iterator[list[MockProcess]]:
    arguments = ("--model", "m", "--model", EVIL, "--model", "third", "--token-delay", "0.05")
    with mock_processes(2, *arguments) as started:
        yield started


@pytest.fixture(scope="module")
def router(
    tmp_path_factory: pytest.TempPathFactory, mocks: list[MockProcess]
) -> Iterator[RouterProcess]:
    """A shared router; tests do not change it. Its source names the servers of the file again."""
    directory = tmp_path_factory.mktemp("router")
    groups = [{"targets": [name(mock) for mock in mocks]}]
    (directory / "targets.json").write_text(json.dumps(groups))
    config = servers_toml([mock.url for mock in mocks], 4)
    config += '[discovery]\nfile = { path = "targets.json", id = "inventory" }\n'
    with router_process(config, directory) as started:
        yield started


def row(server: str) -> str:
    """JavaScript for the row of a server, or undefined."""
    return (
        "[...document.querySelectorAll('#fleet tbody tr')]"
        f".find(row => row.querySelector('th').innerText.includes({json.dumps(server)}))"
    )


def name(mock: MockProcess) -> str:
    return mock.url.removeprefix("http://")


def signed_in(router: RouterProcess) -> str:
    """The link that `vllm-router open` prints."""
    return f"{router.url}/#sign-in={router.administrate('POST', '/admin/sign-in').json()['code']}"


@contextlib.contextmanager
def streaming(url: str) -> Iterator[str]:
    """An endless running request, and the server that has it."""
    body = chat(max_tokens=20_000, stream=True, ignore_eos=True)
    with (
        httpx.Client(base_url=url, trust_env=False, timeout=30) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        chunks = answer.iter_raw()  # its destructor would close the connection
        next(chunks)
        yield answer.headers["x-vllm-router-server"]


# -- it shows the current state ---------------------------------------------------------------


async def test_page_is_live_without_errors_or_foreign_requests(
    browser: str, router: RouterProcess, mocks: list[MockProcess]
):
    async with new_page(browser) as page:
        await page.open(router.url + "/")
        await page.wait(LIVE)
        await page.wait(f"{row(name(mocks[1]))}?.dataset.state === 'up'")
        await page.wait("document.querySelectorAll('#charts .plot canvas').length === 4")
        assert await page.evaluate("document.querySelectorAll('#fleet tbody tr').length") == 2
        assert (await page.text('[data-tile="available"] .value')).split() == ["2", "/", "2"]
        assert page.problems() == []
        asked = page.requested()
        assert asked
        assert all(url.startswith(router.url) for url in asked)


def test_page_content_policy_forbids_unneeded_sources(router: RouterProcess):
    page = router.get("/", headers={"accept": "text/html"})
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert re.findall(r"<style|<script(?![^>]* src=)| style=| on[a-z]+=|https?://", page.text) == []


async def test_page_load_change_appears_within_a_second(
    browser: str, router: RouterProcess, mocks: list[MockProcess]
):
    """Measured by the router's clock, so that slow drawing on a busy machine does not count."""
    took, drawn = [], []
    async with new_page(browser) as page:
        await page.open(router.url + "/")
        await page.wait(f"{row(name(mocks[0]))}?.dataset.state === 'up'")
        for _ in range(20):  # a pause of the whole machine may fall into a few of them
            await page.evaluate(_NOTE_LEASES)
            began = time.time()
            with streaming(router.url) as server:
                await page.wait(f"{row(server)}.querySelector('.c-leases').innerText === '1'")
                drawn.append(time.time() - began)
                took.append(await page.evaluate(_FIRST) - began)
                await page.wait(f"{row(server)}.innerText.includes('1 of ')")
                await page.wait(
                    f"getComputedStyle({row(server)}.querySelector('.running')).transform"
                    " === 'matrix(0.155, 0, 0, 1, 0, 0)'"
                )
            await page.wait(f"{row(server)}.querySelector('.c-leases').innerText === '0'")
            if took[-1] < 1:
                break
    print("in the snapshot after", took, "seen after", drawn)
    assert min(took) < 1


_FIRST = """new Promise((tell) => {
    const look = () => (first === undefined ? setTimeout(look, 5) : tell(first));
    look();
})"""
_NOTE_LEASES = """(() => {
    globalThis.first = undefined;
    const observer = new MutationObserver(() => {
        // The page notes which snapshot it shows once it is drawn.
        requestAnimationFrame(() => { globalThis.first ??= vllmRouter.work.shown; });
        observer.disconnect();
    });
    for (const cell of document.querySelectorAll("td.c-leases .value")) {
        observer.observe(cell, {characterData: true, subtree: true});
    }
})()"""


async def test_page_shows_sources(browser: str, router: RouterProcess):
    async with new_page(browser) as page:
        await page.open(router.url + "/")
        source = "document.querySelector('#sources-table tbody tr')"
        await page.wait(f"{source}?.dataset.health === 'good'")
        shown = await page.text("#sources-table tbody")
        for text in ("inventory", "targets.json", "file", "answers", "2 up"):
            assert text in shown
        assert await page.evaluate(f"{source}.checkVisibility()")
        await page.choose("#language", "zh")
        await page.wait(f"{source}.innerText.includes('2 个可用')")
        assert "服务器来源" in await page.text("main")
        assert page.problems() == []


async def test_page_model_name_is_text_and_never_markup(
    browser: str, router: RouterProcess, mocks: list[MockProcess]
):
    async with new_page(browser) as page:
        await page.open(router.url + "/")
        await page.wait(f"{row(name(mocks[0]))}?.querySelector('.more')")
        await page.evaluate(f"{row(name(mocks[0]))}.querySelector('.server-name').click()")
        await page.wait("document.querySelector('#details').open")
        assert EVIL in await page.text("#details-list")
        more = f"{row(name(mocks[0]))}.querySelector('.more').title"
        assert EVIL in await page.evaluate(more)
        assert await page.evaluate("document.images.length") == 0
        assert "vLLM Router" in await page.evaluate("document.title")
        assert page.problems() == []


async def test_page_filter_and_sort_work(
    browser: str, router: RouterProcess, mocks: list[MockProcess]
):
    shown = "[...document.querySelectorAll('#fleet tbody tr')].filter(row => !row.hidden)"
    names = f"{shown}.map(row => row.querySelector('.server-name').innerText)"
    async with new_page(browser) as page:
        await page.open(router.url + "/")
        await page.wait(f"{shown}.length === 2")
        assert sorted(await page.evaluate(names)) == sorted(map(name, mocks))
        await page.press("/")
        for key in str(mocks[1].port):
            await page.press(key)
        await page.wait(f"{shown}.length === 1")
        assert await page.evaluate(names) == [name(mocks[1])]
        await page.evaluate(
            "(search => { search.value = ''; search.dispatchEvent(new Event('input')); })"
            "(document.querySelector('#search'))"
        )
        await page.click("th.c-name button")
        await page.wait("document.querySelector('th.c-name').ariaSort === 'ascending'")
        assert await page.evaluate(names) == sorted(map(name, mocks))


async def test_page_history_keeps_gaps_and_thins_old_values(browser: str, router: RouterProcess):
    async with new_page(browser) as page:
        await page.open(router.url + "/")
        found = await page.evaluate(
            """import("/static/js/history.js").then(({History, FIGURES}) => {
                const fleet = (values) => Object.fromEntries(FIGURES.map((key) => [key, values]));
                const hello = (end, values) => ({
                    history: {interval: 1, end, fleet: fleet(values), servers: {}},
                    hour: {interval: 10, end: 0, fleet: fleet([]), servers: {}}});
                const snapshot = (time, running) => ({time, router: {open_streams: 0}, servers: [],
                    fleet: {running, waiting: 0, capacity: 4, load: 0, requests_per_s: 0,
                            errors_per_s: 0, chunks_per_s: 0, ttft: {p95: running}}});
                const history = new History();
                history.hello(hello(1003, [1, 2, 3]));
                history.snapshot(snapshot(1003.4, 9));
                history.snapshot(snapshot(1004, 4));
                const first = history.columns(300, ["running"]).columns;
                // The router was away, and what it knows begins with its start.
                history.hello(hello(1061, [7, 8]));
                const second = history.columns(300, ["running"]).columns;
                for (let n = 0; n < 400; n += 1) history.snapshot(snapshot(1062 + n, n));
                const {columns: [times, peaks]} = history.columns(3600, ["ttft_p95"]);
                return [first, second, times.length, peaks.slice(0, 3), peaks.at(-1)];
            })"""
        )
    assert found[0] == [[1001, 1002, 1003, 1004], [1, 2, 3, 4]]
    assert found[1] == [[1001, 1002, 1003, 1004, 1005, 1060, 1061], [1, 2, 3, 4, None, 7, 8]]
    length, oldest, newest = found[2:]
    assert length == 300 + 10
    assert oldest == [9, 19, 29]
    assert newest == 399


async def test_page_history_continues_when_the_clock_is_set_back(
    browser: str, router: RouterProcess
):
    async with new_page(browser) as page:
        await page.open(router.url + "/")
        times, values, own = await page.evaluate(
            """import("/static/js/history.js").then(({History}) => {
                const snapshot = (time, running) => ({time, router: {open_streams: 0},
                    servers: [{name: "a", running}], fleet: {running}});
                const history = new History();
                for (let n = 0; n < 3; n += 1) history.snapshot(snapshot(5000 + n, n));
                for (let n = 3; n < 6; n += 1) history.snapshot(snapshot(1000 + n, n));
                return [...history.columns(300, ["running"]).columns,
                        history.ofServer("a", ["running"])];
            })"""
        )
    assert times == [1000, 1001, 1002, 1003, 1004, 1005]
    assert values == [0, 1, 2, 3, 4, 5]
    assert own == [times, values]


async def test_page_history_of_one_server_has_gaps_and_rare_snapshots_have_none(
    browser: str, router: RouterProcess
):
    async with new_page(browser) as page:
        await page.open(router.url + "/")
        own, before, rare, coarse = await page.evaluate(
            """import("/static/js/history.js").then(({History}) => {
                const snapshot = (time, running) => ({time, router: {open_streams: 0},
                    servers: [{name: "a", running, load: running}], fleet: {running}});
                const none = {interval: 1, end: 0, fleet: {}, servers: {}};
                const history = new History();
                for (const time of [1000, 1001, 1060]) history.snapshot(snapshot(time, time));
                const rare = new History();
                rare.hello({config: {feed_interval: 5}, history: none, hour: none});
                for (let n = 0; n < 400; n += 1) rare.snapshot(snapshot(1000 + 5 * n, n));
                return [history.ofServer("a", ["running"]), history.ofServer("a", ["load"]),
                        rare.ofServer("a", ["running"])[1],
                        rare.columns(3600, ["running"]).columns[1]];
            })"""
        )
    assert own == [[1000, 1001, 1002, 1060], [1000, 1001, None, 1060]]
    assert before == own
    assert len(rare) == 300
    assert None not in rare
    assert None not in coarse


# -- operators act on it ----------------------------------------------------------------------


async def test_page_drain_button_asks_drains_and_takes_back(
    browser: str, router: RouterProcess, mocks: list[MockProcess]
):
    server = name(mocks[0])
    button = f"{row(server)}.querySelector('.action')"
    async with new_page(browser) as page:
        await page.open(router.url + "/")
        await page.evaluate(f"location.assign({signed_in(router)!r})")
        await page.wait(f"{row(server)}?.querySelector('.action').innerText === 'Drain'")
        with streaming(router.url):
            # Return on the focused button, and then on the dialog, whose default is no.
            await page.evaluate(f"{button}.focus()")
            await page.press("Enter", 13)
            await page.wait("document.querySelector('#confirm').open")
            assert server in await page.text("#confirm-title")
            await page.press("Enter", 13)
            await page.wait("!document.querySelector('#confirm').open")
            assert router.state(mocks[0].url) == "up"

            await page.evaluate(f"{button}.click()")
            await page.click("#confirm-yes")
            await page.wait(f"{row(server)}.dataset.state === 'draining'")
            assert router.state(mocks[0].url) == "draining"
            await page.wait("!document.querySelector('#confirm').open")
            assert "draining" in await page.text("#announce")
        await page.wait(f"{button}.innerText === 'Undrain'")
        await page.evaluate(f"{button}.click()")
        await page.click("#confirm-yes")
        await page.wait(f"{row(server)}.dataset.state === 'up'")
        await page.wait(f"document.querySelector('#events').innerText.includes({server!r})")
        assert router.state(mocks[0].url) == "up"
        assert page.problems() == []


async def test_page_buttons_appear_only_with_rights(
    browser: str, router: RouterProcess, mocks: list[MockProcess]
):
    seen = "[...document.querySelectorAll('.action')].some(button => button.checkVisibility())"
    async with new_page(browser) as page:
        await page.open(router.url + "/")
        await page.wait(f"{row(name(mocks[0]))}?.dataset.state === 'up'")
        assert not await page.evaluate(seen)
        # It explains how to sign in.
        await page.click("#key")
        assert await page.text("#key-command") == f"vllm-router open {router.url}"
        # The same tab, signed in; the code is removed from the address.
        link = signed_in(router)
        await page.evaluate(f"location.assign({link!r})")
        await page.wait(f"{LIVE} && {seen}")
        assert await page.evaluate("location.href") == f"{router.url}/"
        assert await page.evaluate("document.querySelector('#key').hidden")
        # Another site's name is another origin: its pages have no rights.
        await page.open(f"http://router.test:{router.port}/")
        await page.wait(f"{row(name(mocks[0]))}?.dataset.state === 'up'")
        assert not await page.evaluate(seen)
        # A link works once.
        await page.open("about:blank")
        await page.evaluate(f"location.assign({link!r})")
        await page.wait("document.querySelector('#key-dialog')?.open")
        assert "vllm-router open" in await page.text("#key-error")


async def test_page_history_range_is_chosen_and_kept(browser: str, router: RouterProcess):
    pressed = "document.querySelector('#ranges [aria-pressed=true]').innerText"
    async with new_page(browser) as page:
        await page.open(router.url + "/")
        await page.wait(f"{LIVE} && {pressed} === '5 min'")
        await page.click("#ranges button:last-child")
        await page.wait(f"{pressed} === '60 min'")
        await page.wait(
            "document.querySelector('[data-chart=work] .plot').ariaLabel?.includes('60 minutes')"
        )
        await page.open(router.url + "/?again")
        await page.wait(f"{pressed} === '60 min'")
        assert page.problems() == []


# -- it survives ------------------------------------------------------------------------------


async def test_page_shows_killed_server_refused_file_and_restart(browser: str, tmp_path: Path):
    with mock_processes(2, "--model", "m") as (good, doomed):
        config = servers_toml([good.url, doomed.url])
        with router_process(config, tmp_path) as router:
            async with new_page(browser) as page:
                await page.open(router.url + "/")
                doomed_row = row(name(doomed))
                await page.wait(f"{doomed_row}?.dataset.state === 'up'")
                calm = await page.evaluate(f"getComputedStyle({doomed_row}).backgroundColor")

                await trio.to_thread.run_sync(doomed.kill)
                await page.wait(f"{doomed_row}.dataset.state === 'down'")
                reason = await page.evaluate(f"{doomed_row}.querySelector('.reason').innerText")
                assert re.search("unreachable|/health|refused", reason), reason
                red = await page.evaluate(f"getComputedStyle({doomed_row}).backgroundColor")
                assert red != calm
                parts = [int(part) for part in red[red.index("(") + 1 : -1].split(",")[:3]]
                assert parts[0] > max(parts[1:])
                await page.wait("document.querySelector('#events li').innerText.includes('→ down')")
                await page.wait("document.querySelector('#announce').innerText.includes('down')")
                assert (await page.text('[data-tile="available"] .value')).startswith("1 ")

                router.config.write_text(config.replace("= 3", "= 0"))
                fault = "document.querySelector('.banner[data-mood=bad] pre')"
                await page.wait(f"{fault}.innerText.includes('≥ 1')")
                router.config.write_text(config)
                await page.wait(f"!{fault}")
                assert "1 of 2 servers are down" in await page.text("#banners")
                assert page.problems() == []

                await trio.to_thread.run_sync(router.stop)
                await page.wait("document.querySelector('#link').dataset.link === 'lost'")
                assert "last data" in await page.text("#link-text")
                assert await page.evaluate("'stale' in document.documentElement.dataset")

                again = RouterProcess(router.config, "--port", str(router.port))
                try:
                    await trio.to_thread.run_sync(again.wait_ready)
                    await page.wait(LIVE)
                    await page.wait("!('stale' in document.documentElement.dataset)")
                    await page.wait(f"{row(name(good))}.dataset.state === 'up'")
                    assert (
                        await page.evaluate("document.querySelectorAll('#fleet tbody tr').length")
                        == 2
                    )
                    until(lambda: again.get("/load-stats").status_code == 200, "the new router")
                finally:
                    again.close()


async def test_page_silent_connection_is_stale(browser: str, tmp_path: Path):
    with (
        mock_processes(1, "--model", "m") as (mock,),
        router_process(servers_toml([mock.url]), tmp_path) as router,
    ):
        async with new_page(browser) as page:
            await page.open(router.url + "/")
            await page.wait(LIVE)
            mock_row = f"{row(name(mock))}.dataset.state"
            await page.wait(f"{mock_row} === 'up'")
            try:
                router.signal(signal.SIGSTOP)  # the connection stays open
                await page.wait("document.querySelector('#link').dataset.link === 'stale'")
            finally:
                router.signal(signal.SIGCONT)
            await page.wait(LIVE)
            assert page.problems() == []


async def test_page_hundred_servers_keep_their_rows(
    browser: str, tmp_path: Path, record_property: Any
):
    """Asserts that the rows stay the same; the CPU time of a snapshot is only printed."""
    with demo_router(tmp_path / "stderr", "--demo", "100", "--console") as router:
        async with new_page(browser, height=500) as page:
            await page.open(router.url + "/")
            await page.wait("document.querySelectorAll('#fleet tbody tr').length === 100")
            await page.wait(f"{LIVE} && vllmRouter.work.draws > 2")
            await page.evaluate(
                "globalThis.rows = [...document.querySelectorAll('#fleet tbody tr')]"
            )
            work = "[vllmRouter.work.draws, vllmRouter.work.rows]"
            before, (draws, written) = await page.metrics(), await page.evaluate(work)
            await page.wait(f"vllmRouter.work.draws >= {draws} + 6")
            after, (more, rewritten) = await page.metrics(), await page.evaluate(work)
            for part in ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration"):
                each = (after[part] - before[part]) / (more - draws) * 1000
                record_property(part, each)
                print(f"{part}: {each:.1f} ms of CPU a snapshot")
            assert await page.evaluate("rows.every(row => row.isConnected)")
            # Rows out of sight are written in turn.
            assert rewritten - written < 90 * (more - draws)
            # They have no cells then, and the same height.
            await page.wait("rows.at(-1).childElementCount === 0")
            bare = await page.evaluate("rows.at(-1).offsetHeight")
            await page.wait(
                "(rows.at(-1).scrollIntoView(), rows.at(-1).querySelector('.server-name'))"
            )
            assert abs(await page.evaluate("rows.at(-1).offsetHeight") - bare) <= 1
            assert page.problems() == []


async def test_page_of_router_with_keys_asks_for_key(
    browser: str, tmp_path: Path, mocks: list[MockProcess]
):
    auth = '[auth]\nadmin_key = "sk-A/+?b"\nstatus_key = "sk-S"\nprotect_status = true\n'
    asked = "document.querySelector('#key-dialog').open"
    key_input = "document.querySelector('#key-input')"
    config = servers_toml([mock.url for mock in mocks]) + auth

    async def give(page: Any, key: str, *, by_enter: bool = False) -> None:
        await page.evaluate(f"{key_input}.value = {json.dumps(key)}")
        if by_enter:
            await page.press("Enter", 13)
        else:
            await page.click("#key-yes")

    file = tmp_path / "servers.toml"
    file.write_text(config)
    router = RouterProcess(file)
    try:
        until(lambda: bool(router.url), "the port")
        until(lambda: router.get("/readyz").status_code == 200, "readiness")
        async with new_page(browser) as page:
            await page.open(router.url + "/")
            await page.wait(asked)
            assert await page.evaluate(f"document.activeElement === {key_input}")
            await page.click("#key-no")
            link = "document.querySelector('#link-text').textContent"
            await page.wait(f"!{asked} && {link} === 'This router needs a key'")
            await page.click("#key")
            await give(page, "sk-wrong")
            await page.wait(f"{link} !== 'Connecting…'")
            await page.click("#key")
            await give(page, "sk-S", by_enter=True)
            await page.wait(LIVE)
            assert not await page.evaluate(asked)
            await page.click("#key")
            await give(page, "sk-A/+?b")
            await page.wait(f"{LIVE} && document.querySelector('#key').hidden")
            drain = f"{row(name(mocks[0]))}.querySelector('.action')"
            await page.wait(drain)
            await page.evaluate(f"{drain}.click()")
            await page.click("#confirm-yes")
            await page.wait(f"{row(name(mocks[0]))}.dataset.state === 'draining'")
            # The key is kept in this tab only.
            assert await page.evaluate("Object.values(localStorage).join()") == ""
            assert await page.evaluate("document.cookie") == ""
            await page.open(router.url + "/?again")
            await page.wait(LIVE)
    finally:
        router.close()
    assert "sk-" not in router.text


async def _rewrite_host(client: trio.SocketStream, port: int, wanted: bytes, seen: bytes) -> None:
    """One connection of a proxy that changes `Host`, like a `proxy_pass` without settings."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as server, client:

        async def answers() -> None:
            async for data in server:
                await client.send_all(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answers)
            async for data in client:
                await server.send_all(data.replace(b"Host: " + wanted, b"Host: " + seen))
            nursery.cancel_scope.cancel()


async def test_page_behind_host_changing_proxy_says_what_to_configure(
    browser: str, router: RouterProcess
):
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = f"127.0.0.1:{listener.socket.getsockname()[1]}"

        async def handle(stream: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await _rewrite_host(stream, router.port, address.encode(), b"backend.internal")

        nursery.start_soon(trio.serve_listeners, handle, [listener])
        async with new_page(browser) as page:
            await page.open(f"http://{address}/")
            await page.wait("document.querySelector('#banners pre')")
            said = await page.evaluate("document.querySelector('#banners').innerText")
            assert f'cors_origins = ["http://{address}"]' in said
            assert "(here backend.internal)" in said
            assert "X-Forwarded-Host" in said
        nursery.cancel_scope.cancel()
