"""How the tests are spread over the processes of pytest-xdist (`-n`): one file to one process.

The tests of a file share what its module-scoped fixtures start. FIRST are the files that take
longest, longest first, so that none of them is the last to end. The files of a set in TOGETHER
share one process, because they share one browser.
"""

from __future__ import annotations

import functools
from pathlib import PurePosixPath
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

FIRST = (
    "docs/test_linters",
    "e2e/test_hostile_inputs",
    "e2e/test_shared_queue",
    "e2e/test_misbehaving",
    "e2e/test_workers",
    "e2e/test_restart",
    "e2e/test_page",
    "e2e/test_own_machine",
    "e2e/test_cli_run",
    "e2e/test_failures",
    "e2e/test_monitor_terminal",
    "e2e/test_auth",
    "e2e/test_limits",
    "e2e/test_reload",
    "e2e/test_tls",
    "e2e/test_smuggling",
    "e2e/test_supervision",
    "e2e/test_deploy",
    "e2e/test_proxies",
    "e2e/test_models",
    "e2e/test_clients",
    "e2e/test_bench_smoke",
    "e2e/test_sdks",
)
TOGETHER = (frozenset({"e2e/test_page", "e2e/test_page_looks"}),)


def file_of(nodeid: str) -> str:
    """`e2e/test_shared_queue` for a test of tests/e2e/test_shared_queue.py."""
    return _short_name(nodeid.partition("::")[0])


@functools.cache
def _short_name(file: str) -> str:
    path = PurePosixPath(file)
    return f"{path.parent.name}/{path.stem}"


class Files(LoadScopeScheduling):  # type: ignore[misc]
    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False  # it would start files with many tests first
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        name = file_of(nodeid)
        for files in TOGETHER:
            if name in files:
                return " and ".join(sorted(files))
        return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files | None:
    """The scheduler, unless `--dist` names another one."""
    return Files(config, log) if config.getvalue("dist") == "load" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        ranks = {name: rank for rank, name in enumerate(FIRST)}
        items.sort(key=lambda item: ranks.get(file_of(item.nodeid), len(ranks)))
