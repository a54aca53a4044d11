"""One mutant on trial: a forked process in which the changed code replaces the code in place."""

from __future__ import annotations

import ast
import gc
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType

import pytest

from mutation.coverage_map import run_test, silence
from mutation.sites import Mutant, dependents, name_of_constant

KILLED, SURVIVED, UNCLEAR = 1, 0, 3


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
    tests: Sequence[pytest.Item],
    limit: float,
) -> tuple[str, str]:
    """Run the tests against the mutant: "killed", "survived" or "unclear", and the killing test."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(reader)
        status = UNCLEAR
        try:
            status = _child(mutant, originals, module_name, tests, writer)
        finally:
            os._exit(status)
    os.close(writer)
    deadline = time.monotonic() + limit
    ended = status = 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            time.sleep(0.02)
    if not ended:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as pipe:
        killer = pipe.read().decode()
    if not ended:
        return "killed", "took too long"
    code = os.waitstatus_to_exitcode(status)
    if code == SURVIVED:
        return "survived", ""
    return ("unclear", "cannot be applied") if code == UNCLEAR else ("killed", killer or str(code))


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
    tests: Sequence[pytest.Item],
    writer: int,
) -> int:
    silence()
    if not apply(mutant, originals, module_name):
        return UNCLEAR
    for place, test in enumerate(tests):
        following = tests[place + 1] if place + 1 < len(tests) else None
        if not run_test(test, following):
            os.write(writer, test.nodeid.encode())
            return KILLED
    return SURVIVED
