"""Scenarios: how they run, and how a verdict is made."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import trio

from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until

MOCK = ("--model", "m", "--ttft", "0.02", "--token-delay", "0.01")
MOST_SECONDS = 240.0
SHORT = {"health_check_timeout": 1.0, "connect_timeout": 1.0}
"""Settings with which a server that hangs is out of rotation within seconds."""


class NotRun(Exception):
    """Raised by a scenario that cannot run here, with the reason."""


@dataclass
class Check:
    """One number beside its gate."""

    what: str
    measured: str
    gate: str
    ok: bool


@dataclass
class Card:
    """The tools of a running scenario, and its measurements."""

    directory: Path
    quick: bool = False
    long: bool = False
    checks: list[Check] = field(default_factory=list)

    def most(self, what: str, value: float, limit: float, unit: str = "") -> None:
        """A gate that `value` must not exceed."""
        ok = value <= limit
        self.checks.append(Check(what, f"{value:.4g}{unit}", f"≤ {limit:.4g}{unit}", ok))

    def least(self, what: str, value: float, limit: float, unit: str = "") -> None:
        """A gate that `value` must reach."""
        ok = value >= limit
        self.checks.append(Check(what, f"{value:.4g}{unit}", f"≥ {limit:.4g}{unit}", ok))

    def equal(self, what: str, value: object, expected: object) -> None:
        self.checks.append(Check(what, str(value), str(expected), value == expected))

    def note(self, what: str, value: object) -> None:
        """A number without a gate, such as a rival's figure or the size of the run."""
        self.checks.append(Check(what, str(value), "-", True))

    def size(self, quick: int, usual: int, full: int | None = None) -> int:
        """The number of requests: for --quick, by default, and for --long."""
        return quick if self.quick else full if self.long and full else usual


@dataclass(frozen=True)
class Scenario:
    id: str
    text: str
    run: Callable[[Card], Awaitable[None]] | None
    p0: bool
    why_not: str = ""


@dataclass
class Verdict:
    """`verdict` is "pass", "FAIL" or "not run"; `why` explains the last two."""

    id: str
    text: str
    p0: bool
    verdict: str
    seconds: float = 0.0
    why: str = ""
    checks: list[Check] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return asdict(self)


SCENARIOS: dict[str, Scenario] = {}


def scenario(id_: str, text: str, *, p0: bool = False) -> Callable[[Any], Any]:
    """Registers an async function of a Card."""

    def register(run: Any) -> Any:
        assert id_ not in SCENARIOS, id_
        SCENARIOS[id_] = Scenario(id_, text, run, p0)
        return run

    return register


def not_run(id_: str, text: str, why: str, *, p0: bool = False) -> None:
    """A row of the scorecard without code, with the reason."""
    SCENARIOS[id_] = Scenario(id_, text, None, p0, why)


async def judge(
    row: Scenario, *, quick: bool = False, long: bool = False, seconds: float = MOST_SECONDS
) -> Verdict:
    """Run one scenario to its verdict; any exception is a failure of that scenario."""
    result = Verdict(row.id, row.text, row.p0, "not run", why=row.why_not)
    if row.run is None:
        return result
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        card = Card(Path(directory), quick, long)
        try:
            with trio.fail_after(seconds * (5 if long else 1)):
                await row.run(card)
            result.verdict = "pass" if card.checks else "FAIL"
            result.why = "" if card.checks else "measured nothing"
        except NotRun as reason:
            result.why = str(reason)
        except Exception as error:  # noqa: BLE001 (the next scenario runs, this one has failed)
            result.verdict, result.why = "FAIL", _described(error)
        if not all(check.ok for check in card.checks):
            result.verdict = "FAIL"
    result.checks = card.checks
    result.seconds = time.monotonic() - began
    return result


def _described(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    trace, where = error.__traceback__, ""
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.parent.name == "chaos":
            where = f" ({file.name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[-300:]}{where}"


def table(verdicts: Iterable[Verdict]) -> str:
    """The scorecard: a line per scenario, below it a line per number."""
    lines = [f"{'id':<4} {'verdict':<8} {'s':>5}  scenario: measured (gate)"]
    for row in verdicts:
        p0 = "P0 " if row.p0 else ""
        lines.append(f"{row.id:<4} {row.verdict:<8} {row.seconds:5.1f}  {p0}{row.text}")
        if row.why:
            lines.append(f"{'':21}{row.why}")
        for check in row.checks:
            gate = "" if check.gate == "-" else f"  ({check.gate})"
            mark = "" if check.ok else "  <-- FAIL"
            lines.append(f"{'':21}{check.what}: {check.measured}{gate}{mark}")
    return "\n".join(lines)


# -- processes --------------------------------------------------------------------------------


@contextlib.contextmanager
def fleet(
    card: Card,
    count: int = 3,
    mock: Iterable[str] = MOCK,
    *,
    capacity: int = 3,
    more: Iterable[str] = (),
    leftovers: bool = True,
    arguments: Iterable[str] = (),
    router_class: type[RouterProcess] = RouterProcess,
    tables: str = "",
    **settings: Any,
) -> Iterator[tuple[list[MockProcess], RouterProcess]]:
    """Servers behind a router; afterwards its descriptors and tasks must be back (±3).

    `tables` are further tables of the configuration, `settings` are added to SHORT.
    """
    with mock_processes(count, *mock) as mocks:
        urls = [*(m.url for m in mocks), *more]
        config = servers_toml(urls, capacity, **{**SHORT, **settings}) + tables
        with router_process(config, card.directory, *arguments, kind=router_class) as router:
            router.post("/v1/chat/completions", chat(max_tokens=1))
            time.sleep(0.5)  # until every probe and scrape has its connection
            looks = {
                "descriptors": router.descriptors,
                "tasks": lambda: router.metric("vllm_router_tasks"),
            }
            before = {what: look() for what, look in looks.items()}
            yield mocks, router
            if leftovers and router.process.poll() is None:
                for what, look in looks.items():
                    with contextlib.suppress(TimeoutError):
                        until(lambda what=what, look=look: look() <= before[what] + 3, what, 10)
                    card.most(f"{what} left", look() - before[what], 3)


async def waited(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> float:
    """`until`, without delaying the load."""
    return await trio.to_thread.run_sync(until, condition, what, seconds)


async def off_loop(function: Callable[..., Any], *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(function, *arguments)


def percentile(values: Iterable[float], share: float = 0.99) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * share) - 1] if ordered else math.nan


def rss_mb(router: RouterProcess) -> float:
    pages = int(Path(f"/proc/{router.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_seconds(router: RouterProcess) -> float:
    fields = Path(f"/proc/{router.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def running(mocks: Iterable[MockProcess]) -> int:
    return sum(mock.stats()["running"] for mock in mocks)
