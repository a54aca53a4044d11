"""The documentation builds as a site, with every link and anchor in it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SHOWN_LINES = 40


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="needs mkdocs-material")
def test_site_builds_without_warning(tmp_path: Path):
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, "\n".join(done.stderr.splitlines()[-SHOWN_LINES:])
    pages = {"index": "en", "reference/keys": "en", "zh/index": "zh", "zh/tutorial": "zh"}
    for page, language in pages.items():
        folder = page.removesuffix("index").rstrip("/")
        html = (site / folder / "index.html").read_text()
        assert f'<html lang="{language}"' in html, page
    commands = (site / "commands" / "index.html").read_text()
    assert "<code>--log-format text|json</code>" in commands, "a bar in a table has no backslash"
