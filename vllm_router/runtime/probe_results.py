"""Interpretation of probe results: unusable pages, model lists, and the router's own faults."""

from __future__ import annotations

import errno
import re

import httpx
import trio

from vllm_router.errors import OwnFault
from vllm_router.fleet.model_list import MAX_LIST_BYTES, STEP, ModelList, read_model_list
from vllm_router.fleet.reason import Reason, because
from vllm_router.http.client.page import read_whole
from vllm_router.http.client.pool import Doing

MAX_PAUSE = 16
"""An unusable page is requested less and less often, down to every sixteenth interval."""


class PageStatus:
    """Recent results of one page: when to log a problem, and how often to request the page."""

    def __init__(self) -> None:
        self.pause = 1
        """Intervals until the page is requested again."""
        self._problem = ""

    def refused(self, problem: str) -> bool:
        """Record an unusable page; returns True if the problem is new."""
        self.pause = min(2 * self.pause, MAX_PAUSE)
        known, self._problem = self._problem, problem
        return known != problem

    def accepted(self, but: str = "") -> bool:
        """Record a usable page, perhaps with a problem; returns True if the problem is new."""
        self.pause = 1
        known, self._problem = self._problem, but
        return known != but


async def read_models(response: httpx.Response) -> ModelList:
    """Parse a model list, yielding to other tasks between steps. Raises UnusablePage."""
    page = await read_whole(response, MAX_LIST_BYTES)
    found = ModelList()
    for step in read_model_list(page):
        found = step
        if len(page) > STEP:  # a short list is read in one step
            await trio.lowlevel.checkpoint()
    return found


_OUR_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def is_own_fault(error: BaseException | None) -> bool:
    """True if the router ran out of a resource, so that the error says nothing about the server."""
    while error is not None:
        if isinstance(error, OwnFault):
            return True
        if isinstance(error, OSError) and error.errno in _OUR_ERRORS:
            return True
        if isinstance(error, BaseExceptionGroup) and any(map(is_own_fault, error.exceptions)):
            return True
        error = error.__cause__ or error.__context__
    return False


_ERRNO = re.compile(r"^\[Errno -?\d+\] ")


def error_text(error: httpx.HTTPError) -> str:
    """A short error text for operators."""
    return _ERRNO.sub("", str(error)) or type(error).__name__


def error_reason(error: httpx.HTTPError) -> Reason:
    """The reason of a check that failed with this error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError):
            return because("connection_refused")
        cause = cause.__cause__
    return because("check_failed", detail=error_text(error))


def timeout_reason(doing: Doing | None, path: str, host: str, timeout: float) -> Reason:
    """The reason of a check of `path` that was not over after `timeout` seconds."""
    seconds = f"{timeout:g}"
    match doing:
        case None:
            return because("no_answer", path=path, seconds=seconds)
        case Doing.CONNECTION:
            return because("no_connection", seconds=seconds)
        case Doing.HANDSHAKE:
            return because("no_handshake", seconds=seconds)
        case Doing.RESOLVER:
            return because("no_name", host=host, seconds=seconds)
