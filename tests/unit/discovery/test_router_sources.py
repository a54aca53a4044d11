"""Sources in the whole router: readiness, pages, metrics and reload of the file."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from support.web_harness import Lab

TOML = """
[discovery]
file = { path = "targets.json", interval = 0.01 }
[config]
enable_active_health_check = false
metrics_interval = 3600
config_reload_interval = 0.01
"""


def write_targets(directory: Path, *addresses: str) -> None:
    fresh = directory / "fresh"
    fresh.write_text(json.dumps([{"targets": addresses}]))
    fresh.rename(directory / "targets.json")


@asynccontextmanager
async def router(directory: Path, text: str = TOML) -> AsyncIterator[Lab]:
    (directory / "servers.toml").write_text(text)
    lab = Lab(file=directory / "servers.toml", up=False)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lab.router.run)
            yield lab
            nursery.cancel_scope.cancel()


async def until_servers(lab: Lab, *names: str) -> None:
    while sorted(lab.router.fleet.servers) != sorted(names):
        await trio.sleep(0.01)


async def test_router_is_ready_when_source_has_answered(tmp_path: Path) -> None:
    async with router(tmp_path) as lab:
        ready = await lab.get("/readyz")
        assert ready.status == 503
        assert ready.json == {
            "ready": False,
            "reason": "sources not read yet",
            "sources": ["file"],
        }
        write_targets(tmp_path, "127.0.0.1:9")
        await until_servers(lab, "127.0.0.1:9")
        assert (await lab.get("/readyz")).status == 200


async def test_router_stays_ready_when_servers_join(tmp_path: Path) -> None:
    write_targets(tmp_path, "127.0.0.1:9")
    async with router(tmp_path) as lab:
        await until_servers(lab, "127.0.0.1:9")
        assert (await lab.get("/readyz")).status == 200
        for server in lab.router.fleet.servers.values():
            server.active_health.up = None
        assert (await lab.get("/readyz")).status == 200


async def test_router_shows_sources_in_health_feed_and_metrics(tmp_path: Path) -> None:
    write_targets(tmp_path, "127.0.0.1:9", "bad host")
    async with router(tmp_path) as lab:
        await until_servers(lab, "127.0.0.1:9")
        health = (await lab.get("/health")).json
        (source,) = health["sources"]
        assert source["name"] == source["kind"] == "file"
        assert source["place"] == str(tmp_path / "targets.json")
        assert source["targets"] == {"up": 1}
        assert source["problem"] is None
        assert source["skipped"][0].startswith('"bad host": address: expected a URL')
        assert health["servers"][0]["source"] == "file"
        page = (await lab.get("/metrics")).body.decode()
        assert 'vllm_router_discovery_up{source="file"} 1' in page
        assert 'vllm_router_discovery_targets{source="file",state="up"} 1' in page
        assert 'vllm_router_discovery_skipped_targets{source="file"} 1' in page
        (tmp_path / "targets.json").write_text("broken")
        while (await lab.get("/health")).json["sources"][0]["problem"] is None:
            await trio.sleep(0.01)
        page = (await lab.get("/metrics")).body.decode()
        assert 'vllm_router_discovery_up{source="file"} 0' in page
        assert sorted(lab.router.fleet.servers) == ["127.0.0.1:9"]
        mailbox = await lab.router.feed.subscribe(admin=False)
        hello = await mailbox.get()
        assert hello is not None
        events = json.loads(hello)["events"]
        assert [event["kind"] for event in events].count("source") == 2
        snapshot = await mailbox.get()
        assert snapshot is not None
        (shown,) = json.loads(snapshot)["router"]["sources"]
        assert "expected JSON" in shown["problem"]


async def test_router_without_discovery_has_no_source_metrics() -> None:
    lab = Lab(1)
    assert "vllm_router_discovery" not in (await lab.get("/metrics")).body.decode()
    assert (await lab.get("/health")).json["sources"] == []


async def test_router_reload_of_the_file_keeps_found_servers(tmp_path: Path) -> None:
    write_targets(tmp_path, "127.0.0.1:9")
    async with router(tmp_path) as lab:
        await until_servers(lab, "127.0.0.1:9")
        found = lab.router.fleet.servers["127.0.0.1:9"]
        text = '[servers]\nservers = [{ url = "http://127.0.0.1:10", name = "own" }]\n' + TOML
        (tmp_path / "servers.toml").write_text(text)
        await until_servers(lab, "127.0.0.1:9", "own")
        assert lab.router.fleet.servers["127.0.0.1:9"] is found
        (tmp_path / "servers.toml").write_text(text.partition("[discovery]")[0])
        await until_servers(lab, "own")
