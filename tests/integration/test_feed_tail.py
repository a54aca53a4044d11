"""The example client of the feed: the README shows the code that runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.cli_process import ROOT, environment, router
from support.router_process import own_machine

SCRIPT = ROOT / "scripts" / "feed_tail.py"


def test_feed_tail_example_follows_load_and_events(tmp_path: Path):
    with router(tmp_path / "stderr", "--demo", "2", "--console") as started:
        url = started.url.replace("http", "ws") + "/ws/load"
        tail = subprocess.Popen(
            [sys.executable, str(SCRIPT), url],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        try:
            assert tail.stdout is not None
            assert tail.stdout.readline() == "demo-1 0%, demo-2 0%\n"
            with own_machine(started.url) as client:
                client.post("/admin/servers/demo-2/drain")
            event = next(line for line in tail.stdout if line.startswith("*"))
            assert event.startswith("* demo-2: up → draining")
        finally:
            tail.kill()
            tail.communicate()


@pytest.mark.parametrize("name", ["docs/api.md", "docs/zh/api.md"])
def test_feed_tail_example_equals_documentation(name: str):
    code = SCRIPT.read_text().split("\n\n", 1)[1]
    assert code in (ROOT / name).read_text()
