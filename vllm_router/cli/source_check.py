"""Ask each source of `[discovery]` once, for `discover` and `check-config --probe`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from vllm_router.config.discovered import merge, read_targets, server_options
from vllm_router.config.discovery import (
    DiscoveryConfig,
    Found,
    SourceConfig,
    Targets,
    TargetState,
)
from vllm_router.config.schema import Config, ServerConfig
from vllm_router.discovery.kinds import kind_and_place, make_source
from vllm_router.discovery.priorities import up_to, used_priority
from vllm_router.discovery.source import Again

if TYPE_CHECKING:
    from vllm_router.cli.tables import Cell

PATIENCE = 15.0
"""Seconds for the first answer of a source."""


@dataclass(slots=True)
class SourceReport:
    """What a source says now; implements `Sink`."""

    config: SourceConfig
    discovery: DiscoveryConfig
    targets: Targets | None = None
    problem: str | None = None
    left_out: list[str] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)

    def found(self, targets: Collection[Found], problems: Sequence[str] = ()) -> None:
        said, bad = read_targets(targets, self.config, self.discovery)
        self.targets = up_to(said, used_priority(said, lambda url: None), TargetState.WAIT)
        self.left_out = [*problems, *bad]
        self.done.set()

    def confirmed(self) -> None:
        self.done.set()

    def failed(self, problem: str) -> None:
        self.problem = problem
        self.done.set()


async def ask_sources(config: Config) -> list[SourceReport]:
    """Ask all sources at the same time, and wait for the first answer of each."""
    discovery = config.discovery
    if discovery is None:
        return []
    reports = [SourceReport(source, discovery) for source in discovery.sources]
    async with trio.open_nursery() as nursery:
        for report in reports:
            nursery.start_soon(_ask, report)
    return reports


async def _ask(report: SourceReport) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_source(report.config).run, report, Again())
        with trio.move_on_after(PATIENCE):
            await report.done.wait()
            # A source that has read some of its files reports their targets and then the failure.
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel(reason="answered")
    if report.targets is None and report.problem is None:
        report.problem = f"no answer in {PATIENCE:g} s"


def merged(config: Config, reports: Sequence[SourceReport]) -> tuple[Config, list[str]]:
    """The configuration with the servers that were found, and all problems, one per line."""
    found = {one.config.name: one.targets for one in reports if one.targets is not None}
    result = merge(config, found)
    problems = []
    for one in reports:
        name = one.config.name
        if one.problem is not None:
            problems.append(f"source {name}: {one.problem}")
        problems += [f"source {name}: left out {line}" for line in one.left_out]
        problems += [f"source {name}: left out {line}" for line in result.problems.get(name, ())]
    return result.config, problems


def print_sources(reports: Sequence[SourceReport]) -> None:
    """A line for each source."""
    from vllm_router.cli.tables import Cell, Column, print_table

    rows: list[list[Cell | str]] = []
    for one in reports:
        kind, place = kind_and_place(one.config)
        answer = Cell("fails", "bold red") if one.problem is not None else Cell("answers", "green")
        count = "" if one.targets is None else str(len(one.targets))
        rows.append([one.config.name, kind, answer, count, place])
    titles = ("SOURCE", "KIND", "STATE", "TARGETS", "PLACE")
    print_table([Column(title, right=title == "TARGETS") for title in titles], rows)


def print_targets(reports: Sequence[SourceReport], config: Config) -> None:
    """A line for each target. `config` has the servers made of them."""
    from vllm_router.cli.tables import Column, print_table

    servers = {server.url: server for server in config.servers}
    rows: list[list[Cell | str]] = []
    for one in reports:
        for target in one.targets or ():
            server = servers.get(target.url)
            state, name, options = target.state.value, target.name or "", ""
            if server is not None:
                name = server.name
                if server.source is None:
                    state = "in [servers]"
                else:
                    options = _options(server)
            rows.append([one.config.name, target.url, name, state, options])
    titles = ("SOURCE", "URL", "NAME", "STATE", "KEYS")
    print_table([Column(title) for title in titles], rows)


def _options(server: ServerConfig) -> str:
    shown = [f"{key}={_text(value)}" for key, value in server_options(server) if value is not None]
    return " ".join(shown)


def _text(value: object) -> str:
    match value:
        case tuple():
            return ",".join(map(str, value))
        case float():
            return f"{value:g}"
    return str(value)


def as_json(reports: Sequence[SourceReport], config: Config) -> list[dict[str, object]]:
    """The same for programs."""
    servers = {server.url: server for server in config.servers}
    result: list[dict[str, object]] = []
    for one in reports:
        kind, place = kind_and_place(one.config)
        targets = []
        for target in one.targets or ():
            server = servers.get(target.url)
            named = server.name if server is not None else target.name
            targets.append({"url": target.url, "name": named, "state": target.state.value})
        result.append(
            {
                "source": one.config.name,
                "kind": kind,
                "place": place,
                "problem": one.problem,
                "left_out": one.left_out,
                "targets": targets,
            }
        )
    return result
