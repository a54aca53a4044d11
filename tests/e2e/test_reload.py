"""servers.toml is rewritten in every possible way while requests run."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import trio

from support.load import Load, burst
from support.mock_process import mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until

MOCK = ("--model", "m", "--ttft", "0.02", "--token-delay", "0.01")


async def settled(router: RouterProcess, count: int) -> None:
    """Waits until `count` servers are in the fleet and up."""

    def there() -> bool:
        states = [server["state"] for server in router.servers().values()]
        return states == ["up"] * count

    await trio.to_thread.run_sync(until, there, f"{count} servers")


def replace(path: Path, text: str) -> None:
    """Like editors and configuration tools: a new file replaces the old one by rename."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


async def test_reload_any_rewrite_of_file_fails_no_request(tmp_path):
    with (
        mock_processes(3, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks[:2]), tmp_path) as router,
    ):
        file = router.config
        urls = [mock.url for mock in mocks]
        async with Load(router.url, chat(max_tokens=10), 20) as load:
            await load.wait_for(40)

            file.write_text(servers_toml(urls))  # in place: one more
            await settled(router, 3)
            await load.wait_for(40)

            replace(file, servers_toml(urls[1:]))  # atomically: one less
            await settled(router, 2)
            await load.wait_for(40)
            assert urls[0] not in router.servers()

            file.write_text("[servers\nservers = 3")  # invalid
            await trio.to_thread.run_sync(
                until,
                lambda: router.get("/health").json()["reload"]["error"] is not None,
                "the refusal",
            )
            await load.wait_for(40)
            assert len(router.servers()) == 2
            assert router.metric("vllm_router_config_last_reload_successful") == 0

            # valid again, with one new setting
            file.write_text(servers_toml(urls[1:], request_timeout=99))
            await trio.to_thread.run_sync(
                until,
                lambda: router.metric("vllm_router_config_last_reload_successful") == 1,
                "the mended file",
            )
            await trio.to_thread.run_sync(
                until,
                lambda: any("request_timeout 600 → 99" in line for line in router.log),
                "the log line, which a thread writes",
            )

            # a Kubernetes ConfigMap: the file is a link into a directory that is a link
            for number, text in enumerate((servers_toml(urls[:2]), servers_toml(urls))):
                (tmp_path / f"v{number}").mkdir()
                (tmp_path / f"v{number}" / "servers.toml").write_text(text)
            (tmp_path / "..data").symlink_to("v0")
            file.unlink()
            file.symlink_to("..data/servers.toml")
            await settled(router, 2)
            await load.wait_for(40)
            (tmp_path / "..new").symlink_to("v1")
            os.replace(tmp_path / "..new", tmp_path / "..data")
            await settled(router, 3)
            await load.wait_for(40)

            router.signal(signal.SIGHUP)
            await load.wait_for(40)
        assert load.bad() == []
        refusals = [line for line in router.log if "refused" in line and "servers.toml" in line]
        assert len(refusals) == 1


async def test_reload_removed_server_finishes_streams(tmp_path):
    with (
        mock_processes(2, "--model", "m", "--token-delay", "0.03") as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        results = []

        async def streams() -> None:
            results.extend(await burst(router.url, chat(stream=True, max_tokens=60), 20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(streams)
            while sum(mock.stats()["total"] for mock in mocks) < 20:
                await trio.sleep(0.01)
            router.config.write_text(servers_toml([mocks[1].url]))
            await trio.to_thread.run_sync(
                until, lambda: mocks[0].url not in router.servers(), "the removal"
            )
            mocks[0].reset()
            more = await burst(router.url, chat(max_tokens=2), 20)
            assert {result.server for result in more} == {mocks[1].url.removeprefix("http://")}
            assert mocks[0].log("/v1/chat/completions") == []
        assert Counter(result.ended for result in results) == {"done": 20}
        until(
            lambda: any("removed, no requests in flight" in line for line in router.log),
            "its leave",
        )


async def test_reload_kept_server_keeps_state(tmp_path):
    with (
        mock_processes(2, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        mocks[0].kill()
        until(lambda: router.state(mocks[0].url) == "down", "its fall")
        router.config.write_text(servers_toml((m.url for m in mocks), max_retries=1))
        until(lambda: any("max_retries 3 → 1" in line for line in router.log), "the reload")
        assert router.state(mocks[0].url) == "down"
        assert router.post("/v1/chat/completions", chat()).headers["x-vllm-router-attempts"] == "1"
