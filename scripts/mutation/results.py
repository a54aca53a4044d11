"""The verdicts of earlier runs, so that a run goes on where the last one was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path

from mutation.sites import Mutant
from mutation.trial import Verdict


class Results:
    """A file of JSON lines, one for each mutant that was tried.

    A verdict holds as long as the text of the module is the same, and the text of the test file
    that killed the mutant; of a survivor, the texts of all files of the tests that were tried.
    """

    def __init__(self, kept: Path, root: Path) -> None:
        self._kept = kept
        self._root = root
        self._found: dict[str, Verdict] = {}
        self._digests: dict[str, str] = {}
        for line in kept.read_text().splitlines() if kept.exists() else ():
            entry = json.loads(line)
            key = entry.pop("key")
            self._found[key] = Verdict(**entry)

    def find(self, mutant: Mutant, files: Collection[str]) -> Verdict | None:
        found = self._found.get(self._key(mutant, files))
        if found is not None and any(files):
            return found
        killed = self._found.get(self._key(mutant, ()))
        if killed is None or killed.result != "killed":
            return None
        return killed if self._key(mutant, [_file(killed.killer)]) in self._found else None

    def keep(self, mutant: Mutant, files: Collection[str], verdict: Verdict) -> None:
        if verdict.result != "killed" and not files:
            return  # no test was tried
        keys = [self._key(mutant, files)]
        if verdict.result == "killed":
            keys = [self._key(mutant, ()), self._key(mutant, [_file(verdict.killer)])]
        self._kept.parent.mkdir(exist_ok=True)
        with self._kept.open("a") as out:
            for key in keys:
                self._found[key] = verdict
                out.write(json.dumps({"key": key, **asdict(verdict)}) + "\n")

    def _key(self, mutant: Mutant, files: Iterable[str]) -> str:
        texts = [self._digest(file) for file in sorted(set(files)) if file]
        change = (str(mutant.path.relative_to(self._root)), mutant.line, mutant.function)
        whole = (*change, mutant.name, mutant.before, mutant.after, self._digest(change[0]), texts)
        return hashlib.sha256(repr(whole).encode()).hexdigest()[:32]

    def _digest(self, file: str) -> str:
        if file not in self._digests:
            text = (self._root / file).read_bytes()
            self._digests[file] = hashlib.sha256(text).hexdigest()
        return self._digests[file]


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
