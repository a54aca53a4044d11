"""`vllm-router check-config`: validate a configuration file and probe its servers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from vllm_router.cli.common import existing_config, load_config, run_client
from vllm_router.cli.options import config_file
from vllm_router.observability.formatting import visible

if TYPE_CHECKING:
    from vllm_router.cli.server_check import ServerReport
    from vllm_router.cli.tables import Cell


@click.command("check-config")
@config_file
@click.option(
    "--probe",
    is_flag=True,
    help="Also query every source and every server, as the router does.",
)
def check_config(*, file: str | None, probe: bool) -> None:
    """Say what is wrong with a configuration file.

    Every problem has a line with its position and the path of its key, and shows the place. Exit
    code 1 if there is one, or if a server or a source fails its probe; 2 if there is no file to
    read.

    \b
    vllm-router check-config
    vllm-router check-config --config /etc/vllm-router/servers.toml --probe
    """
    from vllm_router.config.source import ConfigSource
    from vllm_router.routing.policies import POLICY_NAMES

    file = existing_config(file)
    config = load_config(
        ConfigSource(file, policies=POLICY_NAMES),
        1 if os.path.isfile(file) and os.access(file, os.R_OK) else 2,
    )
    count = len(config.servers)
    sources = len(config.discovery.sources) if config.discovery is not None else 0
    named = f", {sources} source{'s' if sources != 1 else ''}" if sources else ""
    click.echo(
        f"{file}: OK, {count} server{'s' if count != 1 else ''}{named}, "
        f"policy {config.settings.policy}"
    )
    if not probe:
        return
    from vllm_router.cli.server_check import missing_models, probe_fleet, uneven_lengths

    problems: list[str] = []
    if sources:
        from vllm_router.cli import source_check

        answers = run_client(source_check.ask_sources, config)
        config, problems = source_check.merged(config, answers)
        source_check.print_sources(answers)
        click.echo()
    reports = run_client(probe_fleet, config)
    _print_reports(reports)
    hints = [f"hint: {report.name} {report.hint}" for report in reports if report.hint]
    for line in [*uneven_lengths(reports), *hints]:
        click.echo(visible(line), err=True)
    problems += [f"{report.name}: {problem}" for report in reports for problem in report.problems]
    problems += missing_models(config, reports)
    for line in problems:
        click.echo(visible(line), err=True)
    if problems:
        raise click.exceptions.Exit(1)


def _print_reports(reports: Sequence[ServerReport]) -> None:
    from vllm_router.cli.tables import Cell, Column, print_table

    titles = ("SERVER", "HEALTH", "MODELS", "MAX LEN", "METRICS", "VLLM", "KEY")
    rows: list[list[Cell | str]] = []
    for report in reports:
        models = report.models or {}
        seconds = report.health_seconds
        took = "" if seconds is None else f" {seconds * 1000:.0f} ms"
        lengths = dict.fromkeys(length for length in models.values() if length is not None)
        rows.append(
            [
                report.name,
                Cell(report.health + took, "green" if report.health == "ok" else "bold red"),
                ", ".join(models),
                ", ".join(map(str, lengths)),
                " ".join(report.metrics),
                report.version,
                Cell(report.key, "red" if report.key in ("refused", "missing") else ""),
            ]
        )
    print_table([Column(title, right=title == "MAX LEN") for title in titles], rows)
