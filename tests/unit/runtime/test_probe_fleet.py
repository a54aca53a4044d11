"""`check-config --probe`: responses of servers are bounded and escaped before they are shown."""

from __future__ import annotations

import gzip

import pytest
import trio

from support.fleet_makers import make_config
from support.scripted_server import ScriptedServer, Talk, ok
from vllm_router.cli.server_check import ServerReport, probe_fleet


async def probed(pages: dict[bytes, bytes]) -> ServerReport:
    """The report on a server with these responses, and an empty page for other paths."""

    async def script(talk: Talk) -> None:
        while True:
            path = (await talk.request()).line.split()[1]
            await talk.send(pages.get(path, ok(b"")))

    async with trio.open_nursery() as nursery:
        server = ScriptedServer(nursery, script)
        port = await nursery.start(server.listen)
        config = make_config([{"url": f"http://127.0.0.1:{port}"}], health_check_timeout=30)
        [report] = await probe_fleet(config)
        nursery.cancel_scope.cancel()
    return report


async def test_probe_fleet_odd_names_are_dropped_and_reported():
    page = b'{"data": [{"id": "m", "max_model_len": 7}, {"id": "\\ud800"}, {"id": "a\\u001b[2J"}]}'
    report = await probed({b"/v1/models": ok(page), b"/version": ok(b'{"version": "1\\n2"}')})
    assert report.models == {"m": 7}
    assert report.version == ""
    [problem] = report.problems
    assert "characters that cannot be printed" in problem
    assert problem.isprintable()


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (ok(gzip.compress(bytes(50_000_000)), b"content-encoding: gzip"), "it is longer than"),
        (ok(b"[" * 100_000), "cannot be used"),
        (ok(b"<html>"), "it is not JSON"),
    ],
    ids=["bomb", "nested", "html"],
)
async def test_probe_fleet_unusable_list_is_a_problem(page, words):
    report = await probed({b"/v1/models": page, b"/metrics": page})
    assert report.models is None
    assert any(words in problem for problem in report.problems)
