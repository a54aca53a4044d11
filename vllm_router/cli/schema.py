"""`vllm-router schema`."""

from __future__ import annotations

import json

import click


@click.command()
def schema() -> None:
    """Print a JSON Schema of servers.toml, for editors.

    \b
    vllm-router schema > servers.schema.json
    and as the first line of servers.toml:
    #:schema ./servers.schema.json
    """
    from vllm_router.config.json_schema import json_schema
    from vllm_router.routing.policies import POLICY_NAMES

    click.echo(json.dumps(json_schema(POLICY_NAMES), indent=2, ensure_ascii=False))
