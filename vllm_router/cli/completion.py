"""`vllm-router completion`: scripts for the completion of shells."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")

VARIABLE = "_VLLM_ROUTER_COMPLETE"
"""By this variable the script asks the program for completions."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, *, shell: str) -> None:
    """Print a script that completes commands and options in a shell.

    \b
    bash, in ~/.bashrc:   eval "$(vllm-router completion bash)"
    zsh, in ~/.zshrc:     eval "$(vllm-router completion zsh)"
    fish, once:           vllm-router completion fish \\
                            > ~/.config/fish/completions/vllm-router.fish
    """
    from click.shell_completion import get_completion_class

    root = context.find_root()
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    # `source` would run bash to check its version; the script itself needs no shell to be made.
    made = kind(root.command, {}, "vllm-router", VARIABLE)
    click.echo(made.source_template % made.source_vars())
