"""`vllm-router discover`: what each source of `[discovery]` says now."""

from __future__ import annotations

import json

import click

from vllm_router.cli.common import Failure, existing_config, load_config, run_client
from vllm_router.cli.options import config_file
from vllm_router.observability.formatting import visible


@click.command()
@config_file
@click.option(
    "--json",
    "as_json",
    envvar="VLLM_ROUTER_DISCOVER_JSON",
    is_flag=True,
    help="What the sources say, as JSON.",
)
def discover(*, file: str | None, as_json: bool) -> None:
    """Ask every source of servers once, and print what it says.

    Needs no running router. Exit code 1 if a source cannot be read, or names a bad target; 2 if the
    configuration is bad or has no source.

    \b
    vllm-router discover
    vllm-router discover --config servers.toml --json
    """
    from vllm_router.cli import source_check
    from vllm_router.config.source import ConfigSource
    from vllm_router.routing.policies import POLICY_NAMES

    file = existing_config(file)
    config = load_config(ConfigSource(file, policies=POLICY_NAMES), 2)
    if config.discovery is None:
        raise Failure(f"{file} has no [discovery] table")
    reports = run_client(source_check.ask_sources, config)
    found, problems = source_check.merged(config, reports)
    if as_json:
        click.echo(json.dumps(source_check.as_json(reports, found), indent=2))
    else:
        source_check.print_sources(reports)
        click.echo()
        source_check.print_targets(reports, found)
    for line in problems:
        click.echo(visible(line), err=True)
    if problems:
        raise click.exceptions.Exit(1)
