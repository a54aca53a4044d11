"""Settings and fixtures for all tests."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import certifi
import httpx
import pytest

from support.browser import chromium
from support.distribution import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_xdist_make_scheduler,
)
from support.fuzzing import start_hypothesis
from support.time_limit import pytest_runtest_call, pytest_timeout_set_timer  # noqa: F401

# Hundreds of processes import the package; without bytecode, each would compile it again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Every HTTP client reads the system's CA certificates, which takes 30 ms of CPU, and the tests make
# thousands of clients. Tests of TLS name the authority that they trust.
certifi.where = lambda: str(Path(__file__).parent / "data" / "localhost.pem")

# A request that takes longer than httpx's 5 s has only met a busy machine.
httpx._config.DEFAULT_TIMEOUT_CONFIG.__init__(60.0)  # type: ignore[misc]

# The routers of the tests have their Unix sockets here, and the commands look for them here.
os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="vllm-router-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_RUNTIME_DIR"], ignore_errors=True)

# The demo's own traffic would disturb the tests of the demo; its own tests turn it on.
os.environ["VLLM_ROUTER_DEMO_LOAD"] = "0"

# A shell makes background processes ignore SIGINT, and children inherit that: processes that tests
# start and interrupt would never end.
signal.signal(signal.SIGINT, signal.default_int_handler)


TESTS = Path(__file__).parent


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test with the name of its folder, so that `-m` can choose."""
    folder = item.path.relative_to(TESTS).parts[0]
    item.add_marker(folder)


def pytest_collection_finish() -> None:
    """Freeze thousands of collected tests, so that garbage collections skip them."""
    start_hypothesis()
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["hub", "trio"])
def socket_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with each implementation of `AsyncSocket`."""
    monkeypatch.setenv("VLLM_ROUTER_SOCKETS", request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one browser for all tests of pages."""
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address
