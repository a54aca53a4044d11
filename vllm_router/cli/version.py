"""`vllm-router version`."""

from __future__ import annotations

import click

from vllm_router import __version__


@click.command()
def version() -> None:
    """Show the version."""
    click.echo(f"vLLM Router {__version__}")
