"""docs/reference/commands.md: the help of every command."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from vllm_router.cli.main import cli

HEAD = """\
# Every command and option

What `--help` says, written by `scripts/gen-docs`. [Commands](../commands.md) is the guide.
"""

COLUMNS = 100


def commands_page() -> str:
    """The whole page."""
    return HEAD + "".join(_sections())


def _sections() -> Iterator[str]:
    root = click.Context(cli, info_name="vllm-router")
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        settings = {**cli.context_settings, **command.context_settings}
        settings.update(terminal_width=COLUMNS, max_content_width=COLUMNS)
        context = click.Context(command, parent=root, info_name=name, **settings)
        # The number of processor cores is a default of one option.
        text = re.sub(r"(--jobs .*?default: )\d+", r"\1cores", context.get_help(), flags=re.DOTALL)
        yield f"\n## {name}\n\n```text\n{text.rstrip()}\n```\n"
