"""Pieces of the documentation, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path


def code_block(page: Path, heading: str, language: str = "python") -> str:
    """The first block of code in a language below a heading."""
    section = page.read_text().partition(f"\n## {heading}\n")[2]
    found = re.search(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert found is not None, (page, heading, language)
    return found[1]
