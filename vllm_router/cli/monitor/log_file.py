"""The last lines of the router's log."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_router.observability.formatting import visible

READ = 256 * 1024
"""Bytes at the end of the file that are read at most."""


def last_lines(file: Path, number: int) -> list[str]:
    """The last lines of a file, with control characters escaped; empty if it cannot be read."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - READ))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [visible(line) for line in lines[-number:]]
