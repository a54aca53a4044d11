"""The log in a file, where `run` writes while its monitor has the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_router import logs


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """Logging as it was, afterwards."""
    root, own = logging.getLogger(), logging.getLogger("vllm_router")
    handlers, levels = root.handlers[:], (root.level, own.level)
    root.handlers.clear()  # configure() would close them
    yield logging.getLogger("vllm_router.test")
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def test_directory_is_made_and_what_was_there_stays(tmp_path: Path, logger: logging.Logger):
    file = tmp_path / "logs" / "router.log"
    file.parent.mkdir()
    file.write_text("before\n")
    logs.configure(file=file)
    logger.info("one\ntwo")
    lines = file.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[1].endswith("INFO    test: one\\ntwo")


def test_file_that_was_moved_away_is_begun_anew(tmp_path: Path, logger: logging.Logger):
    file = tmp_path / "new" / "router.log"
    logs.configure(file=file)
    logger.info("old")
    file.rename(tmp_path / "router.log.1")
    logger.info("new")
    assert "old" in (tmp_path / "router.log.1").read_text()
    assert "new" in file.read_text()


def test_file_that_cannot_be_written_is_an_error(tmp_path: Path, logger: logging.Logger):
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(OSError):
        logs.configure(file=tmp_path / "logs" / "router.log")
