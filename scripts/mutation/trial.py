"""One mutant on trial: a forked process in which the changed code replaces the code in place."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import mmap
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

import pytest

from mutation.coverage_map import run_test, silence
from mutation.sites import Mutant, dependents, name_of_constant

KILLED, SURVIVED, UNCLEAR = 1, 0, 3

IDLE_POLLS = 20
"""A process that sleeps and uses no CPU at so many polls in a row, one a second, waits for ever."""

_RUNNING = struct.Struct("qd")
"""The place of the test that a process runs, and when it began."""


@dataclass(frozen=True)
class Verdict:
    """`result` is "killed", "survived" or "unclear".

    killer: the killing test; "" if the module could not even be imported.
    how: "failed", "endless loop" (the test's CPU time was over) or "waits for ever".
    seconds: how long the killing test ran, on the wall.
    """

    result: str
    killer: str = ""
    how: str = ""
    seconds: float = 0.0


class Originals:
    """The functions of the modules, by file and qualified name, found once in the parent."""

    def __init__(self, paths: Sequence[Path]) -> None:
        names = {str(path) for path in paths}
        self._functions: dict[tuple[str, str], list[FunctionType]] = {}
        gc.unfreeze()  # frozen objects are not listed
        for found in gc.get_objects():
            if isinstance(found, FunctionType) and found.__code__.co_filename in names:
                key = (found.__code__.co_filename, found.__code__.co_qualname)
                self._functions.setdefault(key, []).append(found)
        gc.freeze()  # a collection in a forked process would copy all memory

    def of(self, mutant: Mutant) -> list[FunctionType]:
        return self._functions.get((str(mutant.path), mutant.function), [])


def apply(mutant: Mutant, originals: Originals, module_name: str) -> bool:
    """Change this process. False if that is impossible."""
    if not mutant.function:
        return _replace_constant(mutant, module_name)
    whole = compile(mutant.tree, str(mutant.path), "exec", dont_inherit=True)
    code = next((c for c in _codes(whole) if c.co_qualname == mutant.function), None)
    functions = originals.of(mutant)
    if code is None or not functions:
        return False
    for function in functions:
        if code.co_freevars != function.__code__.co_freevars:
            return False
        function.__code__ = code
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _replace_constant(mutant: Mutant, module_name: str) -> bool:
    """Assign a changed constant and those made from it, in each module that has imported them."""
    module = importlib.import_module(module_name)
    before = dict(vars(module))
    # Annotations of a copied namespace stay out of the module's own.
    namespace = {**before, "__annotations__": {}}
    changed = dependents(mutant.tree, mutant.name)
    piece = ast.Module(body=changed, type_ignores=[])
    try:
        exec(compile(piece, str(mutant.path), "exec", dont_inherit=True), namespace)
    except Exception:  # noqa: BLE001  an import that fails is as good as a failed test
        os._exit(KILLED)
    for name in map(name_of_constant, changed):
        for other in list(sys.modules.values()):
            # Tests keep the value that they expect.
            if getattr(other, "__name__", "").startswith("vllm_router") and (
                vars(other).get(name) is before[name]
            ):
                setattr(other, name, namespace[name])
    return True


def try_mutant(
    mutant: Mutant,
    originals: Originals,
    module_name: str,
    tests: Sequence[tuple[pytest.Item, float]],
) -> Verdict:
    """Run the tests, each with its limit in seconds of CPU, until one notices the mutant.

    Limits of CPU time, because a mutant must not count as killed where only the machine is busy.
    """
    running = mmap.mmap(-1, _RUNNING.size)
    running[:] = _RUNNING.pack(-1, time.monotonic())
    pid = os.fork()
    if pid == 0:
        os.setsid()
        status = UNCLEAR
        try:
            status = _child(mutant, originals, module_name, tests, running)
        finally:
            os._exit(status)
    code = _wait(pid)
    place, began = _RUNNING.unpack(running[:])
    running.close()
    if code in (SURVIVED, UNCLEAR):
        return Verdict("survived" if code == SURVIVED else "unclear")
    how = {None: "waits for ever", -signal.SIGPROF: "endless loop", KILLED: "failed"}
    killer = tests[place][0].nodeid if place >= 0 else ""
    seconds = time.monotonic() - began
    return Verdict("killed", killer, how.get(code, f"ended with {code}"), seconds)


def _wait(pid: int) -> int | None:
    """The exit code of the process; None if it waited for ever and was killed."""
    descriptor = os.pidfd_open(pid)
    idle = 0
    before = -1
    try:
        while idle < IDLE_POLLS and not select.select([descriptor], [], [], 1.0)[0]:
            asleep, used = _cpu(pid)
            idle = idle + 1 if asleep and used == before else 0
            before = used
    finally:
        os.close(descriptor)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # an ended process keeps its status; its children end
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if idle >= IDLE_POLLS else code


def _cpu(pid: int) -> tuple[bool, int]:
    """Whether a process sleeps, and the clock ticks of CPU that it has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0] == "S", int(fields[11]) + int(fields[12])


def passes(test: pytest.Item) -> bool:
    """Whether the test passes without a mutant, in a forked process."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            silence()
            status = int(not run_test(test, None))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _child(
    mutant: Mutant,
    originals: Originals,
    module_name: str,
    tests: Sequence[tuple[pytest.Item, float]],
    running: mmap.mmap,
) -> int:
    silence()
    if not apply(mutant, originals, module_name):
        return UNCLEAR
    for place, (test, limit) in enumerate(tests):
        running[:] = _RUNNING.pack(place, time.monotonic())
        signal.setitimer(signal.ITIMER_PROF, limit)  # ends the process
        following = tests[place + 1][0] if place + 1 < len(tests) else None
        if not run_test(test, following):
            return KILLED
    return SURVIVED
