"""Reload, stop, and replace: the router and its servers (F16 to F18, F20, F21)."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import Counter

import httpx
import trio

from chaos.harness import MOCK, Card, fleet, off_loop, scenario, waited
from chaos.stalled import stalled_reader
from e2e.test_restart import WAYS, connect_anew, routers
from support.load import Load, Result, ask, burst
from support.mock_process import mock_processes, restarted
from support.router_process import chat, servers_toml

PATH = "/v1/chat/completions"


@scenario("F16", "reload that removes a server with streams, and takes it back", p0=True)
async def remove(card: Card) -> None:
    with fleet(card, mock=("--model", "m", "--token-delay", "0.05")) as (mocks, router):
        urls = [mock.url for mock in mocks]
        results = []

        async def streams() -> None:
            results.extend(await burst(router.url, chat(stream=True, max_tokens=80), 20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(streams)
            await trio.sleep(1)
            router.config.write_text(servers_toml(urls[1:]))
            await trio.sleep(0.5)
            mark = len(mocks[0].log(PATH))
            served = await burst(router.url, chat(max_tokens=1), 20)
            card.equal("new requests to it", len(mocks[0].log(PATH)) - mark, 0)
            card.most("failed after the reload", sum(not r.ok for r in served), 0)
        card.equal("streams complete", sum(result.ok for result in results), 20)
        name = urls[1].removeprefix("http://")
        count = lambda: router.metric("vllm_router_attempts_total", server=name)  # noqa: E731
        before = count()
        port = urls[0].rsplit(":", 1)[1]
        twice = [urls[0], f"HTTP://127.0.0.1:{port}/"]
        router.config.write_text(servers_toml([*twice, *urls[1:]]))
        await trio.sleep(1.0)
        number = len(router.servers())
        refused = router.metric("vllm_router_config_reloads_refused_total")
        card.equal("duplicates: 1 server, or refused", number == 3 or refused == 1, True)
        router.config.write_text(servers_toml(urls))
        took = await waited(lambda: router.servers().get(urls[0], {}).get("state") == "up", "it")
        card.note("back after", f"{took:.2f} s")
        card.equal("counters kept", count() >= before > 0, True)


@scenario("F17", "broken configuration files under load", p0=True)
async def broken_files(card: Card) -> None:
    with fleet(card) as (mocks, router):
        file = router.config
        good = file.read_bytes()
        text = good.decode()
        broken: dict[str, bytes] = {
            "truncated": good[: len(good) // 2],
            "wrong type": text.replace("= 3 }", '= "three" }', 1).encode(),
            "zero": text.replace("= 3 }", "= 0 }", 1).encode(),
            "bad URL": text.replace("http://", "ftp://", 1).encode(),
            "no host": text.replace(mocks[0].url, "http://", 1).encode(),
            "port": text.replace(mocks[0].url, "http://127.0.0.1:99999", 1).encode(),
            "no URL": text.replace("url =", "name =", 1).encode(),
            "10 MB": b"#" + b"x" * 10_000_000 + b"\n[",
            "NUL": good + b"\0",
            "not UTF-8": good + b'x = "\xff"\n',
            "UTF-16": text.encode("utf-16"),
            "unknown key": good + b"no_such_thing = 1\n",
            "negative": good + b"request_timeout = -1\n",
            "infinite": good + b"request_timeout = inf\n",
            "same key twice": good + b"metrics_interval = 1\n",
            "unknown table": good + b"[nothing]\n",
            "servers a string": b'servers = "a"\n',
            "JSON": b"{}",
            "empty": b"",
            "no server": b"[servers]\nservers = []\n",
            "two byte order marks": b"\xef\xbb\xbf" * 2 + good,
            "control character": good + b"\x01",
            "same server twice": text.replace(mocks[1].url, mocks[0].url, 1).encode(),
        }
        refused = lambda: router.metric("vllm_router_config_reloads_refused_total")  # noqa: E731
        unnoticed, noisy, events = [], [], 0
        async with Load(router.url, chat(max_tokens=4), 10, pause=0.02) as load:

            async def event(name: str) -> None:
                nonlocal events
                events += 1
                before, lines = seen
                try:
                    await waited(lambda: refused() > before, name, 10)
                except TimeoutError:
                    unnoticed.append(name)
                await trio.sleep(0.3)
                logged = [line for line in router.log[lines:] if "ERROR" in line or "WARN" in line]
                if len(logged) != 1 or refused() != before + 1:
                    noisy.append(f"{name}: {len(logged)} lines, +{refused() - before:.0f}")

            for number, (name, data) in enumerate(broken.items()):
                seen = await off_loop(refused), len(router.log)
                if number % 2:
                    file.write_bytes(data)
                else:
                    swap = file.with_suffix(".new")
                    swap.write_bytes(data)
                    swap.replace(file)
                await event(name)
            seen = await off_loop(refused), len(router.log)
            file.unlink()
            file.mkdir()
            await event("directory")
            seen = await off_loop(refused), len(router.log)
            file.rmdir()
            await event("gone")
            for name, target in (("link to itself", file), ("link to nothing", "nothing")):
                seen = await off_loop(refused), len(router.log)
                link = file.with_suffix(".link")
                link.symlink_to(target)
                link.replace(file)
                await event(name)
            file.unlink()
            seen = await off_loop(refused), len(router.log)
            with file.open("wb", buffering=0) as half:  # as an editor that stalls in the middle
                half.write(good[: len(good) // 3])
                await event("half written")
                half.write(good[len(good) // 3 :])
            good_now = "vllm_router_config_last_reload_successful"
            await waited(lambda: router.metric(good_now) == 1, "the other half", 3)
            if os.geteuid():
                seen = await off_loop(refused), len(router.log)
                file.write_bytes(good)
                file.chmod(0)
                await event("unreadable")
                file.unlink()
            applied = router.metric("vllm_router_config_reloads_applied_total")
            file.write_bytes(good + b"max_retries = 1\n")
            again = lambda: router.metric("vllm_router_config_reloads_applied_total") > applied  # noqa: E731
            card.most("next good file", await waited(again, "the good file"), 2.0, " s")
        card.most("failed", len(load.bad()), 0)
        card.equal(f"unnoticed of {events}", unnoticed, [])
        card.equal("not exactly one line and one count", noisy, [])
        card.equal("servers kept", len(router.servers()), 3)


@scenario("F18", "SIGTERM with 20 live streams, 10 over HTTP/2, and 5 stalled readers", p0=True)
async def drain(card: Card) -> None:
    with fleet(
        card,
        mock=("--model", "m", "--token-delay", "0.03"),
        drain_timeout=10,
        write_stall_timeout=5,
        leftovers=False,
    ) as (mocks, router):
        results = []
        stalled = [stalled_reader(router.port, 4000) for _ in range(5)]
        url, codes = router.url, []

        async def stream(client: httpx.AsyncClient) -> None:
            results.append(await ask(client, chat(stream=True, max_tokens=100)))

        options = {"base_url": url, "timeout": 60, "trust_env": False}
        async with (
            httpx.AsyncClient(**options) as http1,
            httpx.AsyncClient(**options, http1=False, http2=True) as http2,
        ):
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(stream, (http1, http2)[number % 2])
                while sum(mock.stats()["running"] for mock in mocks) < 22:
                    await trio.sleep(0.02)
                await trio.sleep(0.5)
                with socket.create_connection(("127.0.0.1", router.port)) as sock:
                    router.signal(signal.SIGTERM)
                    began = time.monotonic()
                    await trio.sleep(0.1)
                    sock.settimeout(3)
                    try:
                        sock.sendall(b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
                        codes.append(sock.recv(4096)[9:12].decode())
                    except OSError as error:
                        codes.append(type(error).__name__)
                code = await off_loop(router.process.wait, 20)
                took = time.monotonic() - began
        card.equal("streams complete", sum(result.ok for result in results), 20)
        card.equal("readyz meanwhile", codes, ["503"])
        card.most("exit", took, 11, " s")
        card.equal("exit code", code, 0)
        for sock in stalled:
            sock.close()
    slow = ("--model", "m", "--token-delay", "0.1")
    with fleet(card, leftovers=False, mock=slow, drain_grace=5) as (_, router):
        reader = stalled_reader(router.port, 1000)
        await trio.sleep(1)
        router.signal(signal.SIGTERM)
        await trio.sleep(0.3)
        card.equal("readyz with drain_grace", router.get("/readyz").status_code, 503)
        router.signal(signal.SIGTERM)
        began = time.monotonic()
        await off_loop(router.process.wait, 30)
        card.most("exit after the second SIGTERM", time.monotonic() - began, 1.0, " s")
        reader.close()


@scenario(
    "F20", "every server restarted in turn under load, whatever it does with SIGTERM", p0=True
)
async def rolling(card: Card) -> None:
    for fate in ("abort", "error", "silence"):
        arguments = (*MOCK, "--sigterm", fate)
        with fleet(card, mock=arguments) as (mocks, router):
            plain = Load(router.url, chat(max_tokens=15), 20)
            streams = Load(router.url, chat(max_tokens=60, stream=True), 10)
            async with plain, streams:
                await plain.wait_for(40)
                for number, mock in enumerate(mocks):
                    mock.terminate()
                    await off_loop(mock.process.wait)
                    mock.close()
                    mocks[number] = mock = await off_loop(restarted, mock, *arguments)
                    back = lambda url=mock.url: router.state(url) == "up"  # noqa: E731
                    await waited(back, "its return", 20)
                    await plain.wait_for(40)
        card.most(f"{fate}: failed of {len(plain.results)}", len(plain.bad()), 0)
        endings = Counter(result.ended for result in streams.results)
        card.note(f"{fate}: streams", dict(endings))
        unbegun = sum(result.status != 200 for result in streams.results)
        card.most(f"{fate}: streams failed without a byte", unbegun, 0)
        # "done" has the server's own [DONE]: with finish_reason "abort", or behind its error event.
        silent = endings.total() - endings["done"] - endings["error event"]
        card.most(f"{fate}: streams that ended without a word", silent, 0)


@scenario("F21", "the router replaced under load, both ways: no client is refused", p0=True)
async def replaced(card: Card) -> None:
    for way in WAYS:
        for workers in ("1", "2"):
            await _replaced(card, way, workers)


async def _replaced(card: Card, way: str, workers: str) -> None:
    what = f"{way}, {workers} worker{'s' * (workers != '1')}"
    fresh: Counter[str] = Counter()
    stopped = trio.Event()
    streams: list[Result] = []
    codes = []
    with mock_processes(2, *MOCK) as mocks:
        config = servers_toml((m.url for m in mocks), capacity=50, drain_timeout=20)
        with routers(way, card.directory, config, "--workers", workers) as line:
            url = f"http://127.0.0.1:{line.port}"

            async def stream() -> None:
                streams.extend(await burst(url, chat(stream=True, max_tokens=150), 5))

            kept = Load(url, chat(max_tokens=3), 10)
            async with kept, trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(connect_anew, line.port, fresh, stopped)
                await kept.wait_for(20)
                for _ in range(card.size(1, 4)):
                    nursery.start_soon(stream)
                    await trio.sleep(0.3)
                    codes.append(await off_loop(line.replace))
                    await kept.wait_for(20)
                stopped.set()
    card.note(f"{what}: connections", fresh.total())
    card.equal(f"{what}: refused, reset or not 200", fresh.keys() - {"200"}, set())
    card.most(f"{what}: failed on kept ones, of {len(kept.results)}", len(kept.bad()), 0)
    cut = sum(not result.ok for result in streams)
    card.most(f"{what}: streams cut, of {len(streams)}", cut, 0)
    card.equal(f"{what}: exit codes", set(codes), {0})
