"""The pages that explain the source name only what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (
    *("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
    *("docs/glossary.md", "docs/performance.md"),
)
PARTS = sorted(path.name for path in (ROOT / "vllm_router").iterdir() if path.is_dir())
PATH = re.compile(rf"`((?:tests|scripts|docs|deploy|{'|'.join(PARTS)})/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES)
def test_page_links_and_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    missing = [
        target
        for target in LINK.findall(text)
        if "://" not in target and not (ROOT / page).parent.joinpath(target).exists()
    ]
    for path in PATH.findall(text):
        base = ROOT / "vllm_router" if path.split("/")[0] in PARTS else ROOT
        if not (base / path).exists():
            missing.append(path)
    assert missing == []


def test_architecture_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert [part for part in PARTS if not part.startswith("__") and f"`{part}/`" not in text] == []
