"""`run --workers 2` as real processes: one port, one monitor, and a dead process is replaced."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from trio_websocket import wrap_client_stream

from support.certificates import Authority
from support.cli_process import call, command
from support.load import Load, burst
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until
from support.tmux import terminal
from support.worker_processes import connections, family, pids

MOCK = ("--model", "m", "--ttft", "0.3", "--token-delay", "0.02", "--max-num-seqs", "64")
WORKERS = ("--workers", "2")
ENDLESS = 20_000
"""Tokens of a response that takes hours, as SLOWLY."""
SLOWLY = {"x-mock-delay-ms": "500"}
"""Between two tokens: a busy machine must be able to read them all."""


@pytest.fixture(scope="module")
def mocks() -> Iterator[list[MockProcess]]:
    with mock_processes(3, *MOCK) as started:
        yield started


@pytest.fixture(scope="module")
def quiet(
    mocks: list[MockProcess], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RouterProcess]:
    """A shared router; tests leave its processes alone."""
    config = servers_toml((mock.url for mock in mocks), failure_threshold=3)
    with router_process(config, tmp_path_factory.mktemp("quiet"), *WORKERS) as router:
        yield router


@asynccontextmanager
async def streams(router: RouterProcess, count: int, tokens: int, pace: float = 0.0):
    """`count` concurrent streams, all of them started; their results are in the list.

    With `pace` seconds between them a worker that the machine delays gets its share, too. ENDLESS
    ones are ended by their clients when the block is left.
    """
    results = []
    async with trio.open_nursery() as nursery:

        async def run(some: int) -> None:
            body = chat(max_tokens=tokens, stream=True)
            results.extend(
                await burst(router.url, body, some, SLOWLY if tokens == ENDLESS else None)
            )

        for _ in range(count if pace else 1):
            nursery.start_soon(run, 1 if pace else count)
            await trio.sleep(pace)
        await in_thread(lambda: router.metric("vllm_router_server_leases") == count, "the streams")
        yield results
        if tokens == ENDLESS:
            nursery.cancel_scope.cancel()


@contextmanager
def frozen(mocks: Sequence[MockProcess]) -> Iterator[None]:
    """Stopped processes, which go on at the latest when the block is left."""
    try:
        for mock in mocks:
            mock.freeze()
        yield
    finally:
        for mock in mocks:
            mock.thaw()


async def in_thread(condition, what: str) -> None:
    await trio.to_thread.run_sync(until, condition, what)


async def shares(router: RouterProcess, count: int) -> dict[str, int]:
    """The connections of each worker once both have reported so many together.

    A connection that asks for `/metrics` may be among them until its worker hands it over.
    """
    found: dict[str, int] = {}

    def are_all_reported() -> bool:
        found.update(connections(router))
        return sum(found.values()) == count

    await in_thread(are_all_reported, "the connections")
    return found


# -- one router -------------------------------------------------------------------------------


async def test_workers_burst_spreads_over_servers_and_is_counted_once(quiet: RouterProcess):
    before = quiet.metric("vllm_router_requests_total")
    async with streams(quiet, 60, ENDLESS) as results, feed(quiet) as websocket:
        by_worker = await shares(quiet, 60)
        assert min(by_worker.values()) >= 25, by_worker
        stats = await trio.to_thread.run_sync(lambda: quiet.get("/load-stats").json())
        assert stats["summary"]["in_flight"] == 60
        # Workers report their exchanges in turn; the leases above are in shared memory.
        await in_thread(lambda: quiet.get("/health").json()["in_flight"] == 60, "all in /health")
        with trio.fail_after(60):
            seen = await snapshot(websocket)
            while not seen["fleet"]["leases"] == seen["router"]["open_streams"] == 60:
                seen = await snapshot(websocket)
        servers = await trio.to_thread.run_sync(quiet.servers)
        by_server = [server["in_flight"] for server in servers.values()]
        assert sum(by_server) == 60
        assert max(by_server) - min(by_server) <= 3, by_server
        assert results == []
    await in_thread(lambda: quiet.metric("vllm_router_requests_total") == before + 60, "the count")
    await in_thread(lambda: quiet.metric("vllm_router_server_leases") == 0, "no leases")
    chunks = lambda: quiet.metric("vllm_router_response_chunks_total")  # noqa: E731
    counted = chunks()
    whole = chat(stream=True, max_tokens=3)
    answer = await trio.to_thread.run_sync(quiet.post, "/v1/chat/completions", whole)
    assert answer.status_code == 200
    # On a busy machine, one read of the router has the server's chunks together.
    await in_thread(lambda: chunks() > counted, "the chunks of a whole stream")


@asynccontextmanager
async def feed(router: RouterProcess):
    """A client of the feed."""
    stream = await trio.open_tcp_stream("127.0.0.1", router.port)
    async with stream, trio.open_nursery() as nursery:
        yield await wrap_client_stream(
            nursery, stream, f"127.0.0.1:{router.port}", "/ws/load", max_message_size=2**24
        )
        nursery.cancel_scope.cancel()


async def snapshot(websocket) -> dict[str, Any]:
    """The next message."""
    while True:
        message = json.loads(await websocket.get_message())
        if message["type"] == "snapshot":
            return message


def test_workers_client_reading_models_returns_to_lane(quiet: RouterProcess):
    with quiet.client() as client:
        for _ in range(3):
            assert client.get("/v1/models").json()["data"][0]["id"] == "m"
            answer = client.post("/v1/chat/completions", json=chat())
            assert answer.status_code == 200
            assert answer.headers.get("connection") != "close"


async def test_workers_failures_seen_by_both_eject_for_both(
    quiet: RouterProcess, mocks: list[MockProcess]
):
    bad = mocks[0]
    bad.set(mode="500")
    try:
        body = chat(max_tokens=1)
        # Failures of one body count once until another server has answered it, so a burst counts
        # once.
        with trio.fail_after(60):
            while await trio.to_thread.run_sync(quiet.state, bad.url) != "ejected":
                results = await burst(quiet.url, body, 18)
                assert [result for result in results if not result.ok] == []
        added = 12
        while added > 2:  # the probation requests due meanwhile; a worker hears of the ejection
            seen = bad.stats()["total"]
            results = await burst(quiet.url, body, 12)
            assert [result for result in results if not result.ok] == []
            added = bad.stats()["total"] - seen
    finally:
        bad.reset()
    with trio.fail_after(60):
        while await trio.to_thread.run_sync(quiet.state, bad.url) != "up":
            await burst(quiet.url, body, 6)  # one of them may be the probation request


def test_workers_newly_loaded_model_is_served_and_unknown_is_404(
    quiet: RouterProcess, mocks: list[MockProcess]
):
    with quiet.client() as client:
        for number in range(3):
            name = f"adapter-{number}"
            loaded = httpx.post(
                f"{mocks[number].url}/v1/load_lora_adapter",
                json={"lora_name": name, "lora_path": "/adapters/x"},
                trust_env=False,
            )
            assert loaded.status_code == 200, loaded.text
            answer = client.post("/v1/chat/completions", json=chat(model=name, max_tokens=1))
            assert answer.status_code == 200, answer.text
        answer = client.post("/v1/chat/completions", json=chat(model="missing"))
        assert answer.json()["error"]["code"] == "model_not_found"


def test_workers_prompt_is_known_to_the_other_processes(quiet: RouterProcess):
    """The leader serves no such request: it has heard of the prompt from the worker."""
    body = chat(text="A long question. " * 500, max_tokens=1)
    answer = quiet.post("/v1/chat/completions", body)
    server = answer.headers["x-vllm-router-server"]

    def cached() -> dict[str, float]:
        rows = quiet.post("/explain", body).json()["candidates"]
        return {row["server"]: row["parts"]["cached_tokens"] for row in rows}

    until(lambda: cached()[server] > 1000, "the leader knows the prompt")
    assert [name for name, tokens in cached().items() if tokens] == [server]


def test_workers_log_names_the_process(quiet: RouterProcess):
    quiet.wait_for_text(" [leader] supervisor: server ")


async def test_workers_limits_hold_across_all(tmp_path: Path):
    few, slow = "sk-few-0123456789abcdef", "sk-slow-0123456789abcdef"
    free = "sk-free-0123456789abcdef"
    keys = [
        f'{{ name = "free", key = "{free}" }}',
        f'{{ name = "few", key = "{few}", max_concurrent_requests = 3 }}',
        f'{{ name = "slow", key = "{slow}", requests_per_minute = 6 }}',
    ]
    tables = f"[auth]\nkeys = [{', '.join(keys)}]\n[limits]\nmax_in_flight = 4\n"
    mock = ("--model", "m", "--ttft", "0.1", "--token-delay", "0.01", "--max-num-seqs", "64")
    with (
        mock_processes(1, *mock) as (server,),
        router_process(servers_toml([server.url]) + tables, tmp_path, *WORKERS) as router,
    ):
        leases = lambda: router.metric("vllm_router_server_leases")  # noqa: E731
        refusals: list[int] = []

        async def one(headers: dict[str, str]) -> None:
            refusals.extend([r.status for r in await burst(router.url, endless, 1, headers)])

        endless = chat(max_tokens=ENDLESS)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one, {"authorization": f"Bearer {few}"})
            await in_thread(lambda: len(refusals) + leases() == 10, "every request")
            # Two workers that admit a request at the same moment may exceed a limit by one.
            assert leases() in (3, 4)
            assert set(refusals) == {429}
            nursery.cancel_scope.cancel()
        await in_thread(lambda: leases() == 0, "no leases")
        body = chat(max_tokens=1)
        results = await burst(router.url, body, 20, {"authorization": f"Bearer {slow}"})
        statuses = Counter(result.status for result in results)
        # Each 10 s admit one more.
        assert statuses[200] in (6, 7, 8)
        assert statuses.total() == statuses[200] + statuses[429]
        freely = {"authorization": f"Bearer {free}"}
        # HTTP/2 belongs to the leader; the servers that it waits for are freed by workers.
        async with httpx.AsyncClient(http1=False, http2=True, trust_env=False) as client:
            answers: list[httpx.Response] = []

            async def ask() -> None:
                url = f"{router.url}/v1/chat/completions"
                answers.append(await client.post(url, json=body, headers=freely))

            async with trio.open_nursery() as waiting:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(burst, router.url, endless, 4, freely)
                    await in_thread(lambda: leases() == 4, "the cap")
                    waiting.start_soon(ask)
                    queue = lambda: router.metric("vllm_router_queue_length")  # noqa: E731
                    await in_thread(lambda: queue() == 1, "the queue")
                    nursery.cancel_scope.cancel()
        assert answers[0].status_code == 200, answers[0].text
        assert answers[0].http_version == "HTTP/2"


# -- reload, drain, end -----------------------------------------------------------------------


async def test_workers_reload_and_drain_reach_both(tmp_path: Path, mocks: list[MockProcess]):
    urls = [mock.url for mock in mocks]
    with router_process(servers_toml(urls), tmp_path, *WORKERS) as router:
        router.config.write_text(servers_toml(urls[1:]))
        router.signal(signal.SIGHUP)
        await in_thread(lambda: urls[0] not in router.servers(), "the reload")
        with frozen(mocks[1:]):
            async with streams(router, 12, 20, pace=0.02) as results:
                by_worker = await shares(router, 12)
                assert min(by_worker.values()) >= 1, by_worker
                router.signal(signal.SIGTERM)
                await in_thread(lambda: "draining: waiting for" in router.text, "the drain")
                for mock in mocks[1:]:
                    mock.thaw()
                code = await trio.to_thread.run_sync(router.process.wait, 60)
        assert code == 0
        assert [result for result in results if not result.ok] == []
        assert len({result.server for result in results}) == 2
        assert pids(router) == {}


def test_workers_second_signal_ends_all_at_once(tmp_path: Path, mocks: list[MockProcess]):
    with router_process(servers_toml([mocks[0].url]), tmp_path, *WORKERS) as router:
        started = pids(router)
        body = json.dumps(chat(max_tokens=2000, stream=True))
        command = ["curl", "-sN", f"{router.url}/v1/chat/completions", "--json", body]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline().startswith(b"data:")
            router.signal(signal.SIGTERM)
            until(lambda: "draining: waiting for 1 requests in flight" in router.text, "the drain")
            with pytest.raises(ConnectionRefusedError):  # a waiting client would wait for ever
                socket.create_connection(("127.0.0.1", router.port), 5).close()
            router.signal(signal.SIGTERM)
            assert router.process.wait(60) == 0
        assert not any(map(alive, started.values()))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_failed_start_is_one_line(tmp_path: Path, quiet: RouterProcess):
    fixed = ("run", "--console", "--server", "http://127.0.0.1:1", "--host", "127.0.0.1")
    taken = call(*fixed, "--port", str(quiet.port), *WORKERS, cwd=tmp_path)
    assert taken.returncode == 2
    line = f"vllm-router: port {quiet.port} on 127.0.0.1 is already in use; "
    assert taken.stderr.startswith(line)
    assert taken.stderr.count("\n") == 1
    both = call(*fixed, *WORKERS, "--front", "hypercorn", cwd=tmp_path)
    assert both.returncode == 2
    assert "--workers needs --front lane" in both.stderr


# -- dead processes ---------------------------------------------------------------------------


async def test_workers_dead_process_is_replaced_at_its_own_cost_only(
    tmp_path: Path, mocks: list[MockProcess]
):
    urls = [mock.url for mock in mocks]
    with router_process(servers_toml(urls), tmp_path, *WORKERS) as router:
        before = family(router)
        async with streams(router, 20, ENDLESS, pace=0.02) as results:
            by_worker = await shares(router, 20)
            assert min(by_worker.values()) > 0
            os.kill(before["worker 1"], signal.SIGKILL)
            # The leases of a dead worker end all at once, its streams one after the other.
            await in_thread(
                lambda: (
                    0 < len(results) < 20
                    and router.metric("vllm_router_server_leases") == 20 - len(results)
                ),
                "the lost streams",
            )
            assert not any(result.ok for result in results)
        await in_thread(lambda: router.metric("vllm_router_workers") == 2, "the successor")
        assert router.metric("vllm_router_worker_restarts_total") == 1
        await in_thread(lambda: router.metric("vllm_router_server_leases") == 0, "no leases")
        router.wait_for_text("worker 1 was killed by SIGKILL")
        after = family(router)
        assert after["worker 1"] != before["worker 1"]
        assert after["worker 2"] == before["worker 2"]

        # The leader: inference clients do not notice.
        assert (
            router.administrate("POST", f"/admin/servers/{_name(urls[0])}/drain").status_code == 200
        )
        async with Load(router.url, chat(max_tokens=2), 8) as load:
            await load.wait_for(10)
            os.kill(after["leader"], signal.SIGKILL)
            await in_thread(
                lambda: family(router).get("leader", 0) not in (0, after["leader"]), "it"
            )
            await load.wait_for(30)
            await in_thread(lambda: router.get("/readyz").status_code == 200, "readiness")
            await load.wait_for(10)
        assert load.bad() == []
        assert router.state(urls[0]) == "draining"
        assert router.metric("vllm_router_requests_total") > 0

        # The parent: without it no process would be replaced.
        processes = family(router)
        router.process.kill()
        await in_thread(lambda: not any(map(alive, processes.values())), "the end of all")


def _name(url: str) -> str:
    return url.removeprefix("http://")


# -- TLS --------------------------------------------------------------------------------------


async def test_workers_tls_ends_in_worker_for_every_protocol(
    tmp_path: Path, mocks: list[MockProcess]
):
    authority = Authority(tmp_path, "ca")
    certificate, key = authority.sign("router")
    context = ssl.create_default_context(cafile=str(authority.file))
    config = servers_toml([mock.url for mock in mocks])
    config += f'[tls]\ncertificate = "{certificate}"\nkey = "{key}"\n'
    file = tmp_path / "servers.toml"
    file.write_text(config)
    router = RouterProcess(file, *WORKERS)
    try:
        until(lambda: "on https://" in router.text, "the port")
        url = router.text.partition(" on ")[2].partition(",")[0]
        for http2 in (False, True):
            async with httpx.AsyncClient(
                base_url=url, verify=context, http2=http2, trust_env=False, timeout=60
            ) as client:
                with trio.fail_after(60):
                    while (await client.get("/readyz")).status_code != 200:
                        await trio.sleep(0.05)
                answer = await client.post("/v1/chat/completions", json=chat())
                assert answer.status_code == 200, answer.text
                assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
                assert (await client.get("/load-stats")).status_code == 200
        await trio.to_thread.run_sync(_stream_over_http2_outlives_sigterm, router, url, authority)
        assert await trio.to_thread.run_sync(router.process.wait, 60) == 0
        assert "Traceback" not in router.text, router.text
    finally:
        router.close()


def _stream_over_http2_outlives_sigterm(router: RouterProcess, url: str, authority: Authority):
    """A worker relays it and the leader serves it: both let it finish."""
    body = json.dumps(chat(max_tokens=125, stream=True))
    ask = ["curl", "-sN", "--http2", "--cacert", str(authority.file), "--json", body]
    with subprocess.Popen(
        [*ask, f"{url}/v1/chat/completions"], stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline().startswith("data:")
        router.signal(signal.SIGTERM)
        assert client.stdout.read().endswith("data: [DONE]\n\n")


# -- on a terminal ----------------------------------------------------------------------------


def test_workers_monitor_shows_all_and_log_is_in_file(tmp_path: Path):
    start = ("run", "--demo", "2", "--host", "127.0.0.1", "--port", "0", *WORKERS)
    with terminal(command(*start), tmp_path) as screen:
        screen.wait("live", "2/2 up")
        screen.type("C-c")
        assert screen.ended() == 0
    log = (tmp_path / ".state/vllm-router/vllm-router.log").read_text()
    assert "[leader] supervisor: server demo-1: unknown -> up" in log
    assert "[worker 2] run_worker: stopped" in log
