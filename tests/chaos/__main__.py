"""`./scripts/chaos`: run scenarios one after the other, print the scorecard, write JSON."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import trio

import vllm_router
from chaos import (  # noqa: F401 (they register)
    bulk,
    faults,
    guarded,
    hostile,
    in_front,
    overload,
    pressure,
    resilience,
    restarts,
    rivals,
    shared,
    shared_fleet,
    sources,
    upstreams,
)
from chaos.harness import SCENARIOS, judge, table

RESULT = Path(__file__).parents[2] / ".bench" / "chaos.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID")
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--long", action="store_true", help="the full counts, an hour and more")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    options = parser.parse_args()
    rows = sorted(SCENARIOS.values(), key=lambda row: ("FLBDS".index(row.id[0]), int(row.id[1:])))
    wanted = {id_.upper() for id_ in options.ids}
    if unknown := wanted - SCENARIOS.keys():
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    rows = [row for row in rows if not wanted or row.id in wanted]
    if options.list:
        for row in rows:
            print(f"{row.id:<4} {row.text}" + (f" [{row.why_not}]" if row.why_not else ""))
        return 0
    verdicts = []
    for row in rows:
        verdict = trio.run(lambda row=row: judge(row, quick=options.quick, long=options.long))
        verdicts.append(verdict)
        print(table([verdict]).split("\n", 1)[1], flush=True)
        RESULT.parent.mkdir(exist_ok=True)
        versions = {"router": vllm_router.__version__, "python": platform.python_version()}
        versions |= rivals.versions()
        known = json.loads(RESULT.read_text())["scenarios"] if RESULT.exists() else {}
        known[row.id] = verdict.json() | {"quick": options.quick, "long": options.long}
        RESULT.write_text(json.dumps({"versions": versions, "scenarios": known}, indent=1))
    counts = {
        word: sum(v.verdict == word for v in verdicts) for word in ("pass", "FAIL", "not run")
    }
    print(", ".join(f"{count} {word}" for word, count in counts.items()), f"→ {RESULT.name}")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
