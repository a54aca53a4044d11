"""The command group. Each command's module is imported only when the command is used.

Exit codes: 0 success; 1 negative result (invalid configuration, failed probe); 2 the command could
not run; 130 interrupted. Each expected error is one line on stderr.
"""

# ruff: noqa: E402 (signals must neither kill nor raise while the rest is imported)

from __future__ import annotations

import sys

from vllm_router.runtime.early_signals import (
    end_quietly_on_interrupt,
    hold,
    raise_on_interrupt,
)

end_quietly_on_interrupt()
if sys.argv[1:2] == ["run"]:
    hold()

import errno
import importlib
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from vllm_router import __version__
from vllm_router.cli.common import discard_output, open_closed_streams, say_error
from vllm_router.errors import RouterError
from vllm_router.observability.formatting import visible

raise_on_interrupt()  # for a program that only imports this module

COMMANDS = {
    "check-config": "vllm_router.cli.check:check_config",
    "discover": "vllm_router.cli.discover:discover",
    "drain": "vllm_router.cli.drain:drain",
    "run": "vllm_router.cli.run:run",
    "status": "vllm_router.cli.status:status",
    "undrain": "vllm_router.cli.drain:undrain",
    "version": "vllm_router.cli.version:version",
    "monitor": "vllm_router.cli.monitor.command:monitor",
    "open": "vllm_router.cli.open:open_page",
    "explain": "vllm_router.cli.explain:explain",
    "completion": "vllm_router.cli.completion:completion",
    "schema": "vllm_router.cli.schema:schema",
    "mock": "vllm_router.lab.mock.cli:mock_command",
    "simulate": "vllm_router.lab.simulate.cli:simulate_command",
}
"""Module and attribute of each command, in the order of `--help`."""


_UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of writing to stdout: a reader that has gone, as `head`, and a full or broken disk."""


class Commands(click.Group):
    """Imports commands on demand and prints errors as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = COMMANDS.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from difflib import get_close_matches

            similar = get_close_matches(name, COMMANDS)
            hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
            raise click.UsageError(f"No such command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            sys.stdout.flush()  # an error at the end of the process would be a traceback
        except click.ClickException as error:
            if not standalone_mode:
                raise
            say_error(_one_line(error))
            code = error.exit_code
        except RouterError as error:
            if not standalone_mode:
                raise
            say_error(f"vllm-router: {visible(str(error))}")
            code = 2
        except click.Abort:
            if not standalone_mode:
                raise
            code = 130
        except OSError as error:
            if not standalone_mode or error.errno not in _UNWRITABLE:
                raise
            discard_output()
            code = 1
            if error.errno != errno.EPIPE:
                say_error(f"vllm-router: cannot write the output: {error.strerror}")
                code = 2
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: click.ClickException) -> str:
    text = visible(" ".join(error.format_message().split()))
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return f"vllm-router: {text}"
    return f"{context.command_path}: {text} (see {context.command_path} --help)"


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        # VLLM_ROUTER_STATUS_JSON for `status --json`, where an option names no other variable.
        "auto_envvar_prefix": "VLLM_ROUTER",
    },
)
@click.version_option(__version__, prog_name="vLLM Router", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """One OpenAI-compatible entry point for a fleet of vLLM servers.

    Every option can be given by an environment variable: VLLM_ROUTER_PORT for `run --port`, and
    VLLM_ROUTER_COMMAND_OPTION for the other commands, as in VLLM_ROUTER_STATUS_JSON=1.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> NoReturn:
    """The entry point of `vllm-router`."""
    end_quietly_on_interrupt()
    open_closed_streams()
    cli(prog_name="vllm-router")
    raise AssertionError("click exits")
