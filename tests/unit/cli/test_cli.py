"""Commands without a router: usage, configuration files, output and exit codes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import vllm_router
from vllm_router.cli.common import say_error
from vllm_router.cli.main import COMMANDS, Commands, cli
from vllm_router.cli.router_client import RouterClient, Status
from vllm_router.cli.run import _servers, log_file
from vllm_router.cli.tables import Cell, Column, plain_lines, print_table
from vllm_router.errors import RouterError

EXAMPLE = Path(__file__).parents[3] / "servers.example.toml"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a servers.toml."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="vllm-router")


def assert_one_line(result: Result, *words: str) -> None:
    """Exit code 2, nothing on stdout and one line on stderr that contains the words."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], ["rnu", "run"]),
        (["run", "--prot", "1"], ["--prot", "--port", "vllm-router run --help"]),
        (["run", "--port", "eight"], ["--port", "eight"]),
        (["run", "--port", "65536"], ["--port", "65536"]),
        (["run", "--front", "nginx"], ["--front", "nginx", "lane"]),
        (["run", "--log-level", "loud"], ["--log-level", "loud"]),
        (["run", "--demo", "0"], ["--demo"]),
        (["run", "--demo", "many"], ["--demo", 'a number of servers from 1 to 100, got "many"']),
        (["run", "--demo", "--demo-load", "nan"], ["--demo-load", "a finite number, got 'nan'"]),
        (["monitor", "--interval", "nan"], ["--interval", "a finite number, got 'nan'"]),
        (["run", "servers.toml"], ["servers.toml"]),
        (["run", "--demo", "--server", "http://a"], ["--server", "--demo", "exclude"]),
        (["run", "--config", "f", "--server", "http://a"], ["--config", "--server", "exclude"]),
        (["drain"], ["SERVER"]),
        (["mock", "--speed", "fast"], ["--speed", "fast"]),
        (["run", "a\nvllm-router: all is well"], [r"unexpected"]),
    ],
)
def test_cli_bad_usage_is_one_line_naming_it(arguments: list[str], words: list[str]):
    assert_one_line(call(*arguments), *words)


@pytest.mark.usefixtures("scratch")
def test_cli_without_servers_says_what_to_do():
    assert_one_line(call("run"), "servers.toml", "--config", "--server", "--demo")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["gpu-1:8000"], ['got "gpu-1:8000", did you mean "http://gpu-1:8000"?']),
        (["user:hunter2@gpu-1:8000"], ["http://host:8000"]),
        (["http://a", "http://b", "http://A:80/v1/"], ["http://a", "twice"]),
        (["http://user:hunter2@a"], ["without user name"]),
        (["http://a=0"], ["from 1 to 999999", "'0'"]),
        (["http://a=many"], ["from 1 to 999999", "'many'"]),
    ],
)
def test_cli_bad_server_option_is_one_line(given: list[str], words: list[str]):
    result = call("run", *(word for url in given for word in ("--server", url)))
    assert_one_line(result, "--server", *words)
    assert "hunter2" not in result.stderr


def test_run_server_option_has_capacity_after_equals_sign():
    found = _servers(["http://a:1=64", "http://b:1"])
    assert [(each.url, each.max_concurrent_requests) for each in found] == [
        ("http://a:1", 64),
        ("http://b:1", None),
    ]


@pytest.mark.usefixtures("scratch")
def test_run_environment_gives_options_and_command_line_wins(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_ROUTER_CONFIG", "of-environment.toml")
    monkeypatch.setenv("VLLM_ROUTER_PORT", "tcp://10.0.0.1:80")  # set by Kubernetes
    assert_one_line(call("run"), "of-environment.toml", "No such file")
    assert_one_line(call("run", "--config", "given.toml"), "given.toml", "No such file")
    assert_one_line(call("run", "--server", "gpu"), "--server: expected a URL")
    monkeypatch.setenv("VLLM_ROUTER_WORKERS", "many")
    assert_one_line(call("run"), "--workers", "many")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_STATE_HOME": "/state", "HOME": "/"}, "/state/vllm-router/vllm-router.log"),
        ({"XDG_STATE_HOME": "relative", "HOME": "{home}"}, "{home}/.local/state/vllm-router/"),
        ({}, f"{tempfile.gettempdir()}/vllm-router-{os.getuid()}/vllm-router.log"),
    ],
)
def test_run_log_of_monitor_is_in_state_directory(
    tmp_path: Path, environ: dict[str, str], expected: str
):
    given = {name: value.format(home=tmp_path) for name, value in environ.items()}
    assert str(log_file(given)).startswith(expected.format(home=tmp_path))


def test_commands_accept_url_as_argument_option_and_variable(monkeypatch: pytest.MonkeyPatch):
    first, second, third = (f"http://127.0.0.1:{port}" for port in (1, 2, 3))
    monkeypatch.setenv("VLLM_ROUTER_URL", third)
    for words in (["status"], ["monitor"], ["open"], ["explain"], ["drain", "a"], ["undrain", "a"]):
        assert_one_line(call(*words, first), first)
        assert_one_line(call(*words, "--url", second), second)
        assert_one_line(call(*words), third)
        assert_one_line(call(*words, first, "--url", second), "two routers are given", second)


def test_run_bad_file_lists_every_problem(scratch: Path):
    (scratch / "servers.toml").write_text(
        '[servers]\nservers = [{ url = "gpu" }]\n[config]\nmax_retries = -1\n'
    )
    result = call("run")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        (
            "servers.toml:2:20: servers.servers[0].url: "
            'expected a URL like "http://host:8000", got "gpu"'
        ),
        '    2 | servers = [{ url = "gpu" }]',
        "      |                    ^^^^^",
        "servers.toml:4:15: config.max_retries: expected int ≥ 0, got -1",
        "    4 | max_retries = -1",
        "      |               ^^",
    ]


@pytest.mark.usefixtures("scratch")
def test_run_unreadable_file_is_one_line():
    assert_one_line(call("run", "--config", "missing.toml"), "missing.toml", "No such file")


@pytest.mark.usefixtures("scratch")
def test_run_file_without_servers_is_one_line():
    Path("servers.toml").write_text("[config]\n")
    assert_one_line(call("run"), "servers.toml", "at least one server")


def test_check_config_good_file_is_confirmed():
    result = call("check-config", "--config", str(EXAMPLE))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"{EXAMPLE}: OK, 3 servers, policy adaptive"]


def test_check_config_bad_file_lists_every_problem_with_key_path(scratch: Path):
    (scratch / "servers.toml").write_text(
        """
        [servers]
        servers = [{ url = "http://a" }, { url = "http://b", max_concurrent_requests = "three" }]
        [config]
        helth_check_interval = 1
        """
    )
    result = call("check-config")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 6
    assert (
        "servers.toml:3:88: servers.servers[1].max_concurrent_requests: "
        'expected int ≥ 1, got "three"'
    ) in lines
    assert "health_check_interval" in result.stderr


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("command", ["check-config", "discover"])
def test_check_without_file_gives_no_verdict(command: str, monkeypatch: pytest.MonkeyPatch):
    assert_one_line(call(command), "no servers.toml here", "--config FILE")
    assert_one_line(call(command, "--config", "missing.toml"), "missing.toml", "No such file")
    monkeypatch.setenv("VLLM_ROUTER_CONFIG", "of-environment.toml")
    assert_one_line(call(command), "of-environment.toml", "No such file")


def test_every_option_has_environment_variable_of_its_name():
    root = click.Context(cli, info_name="vllm-router", **cli.context_settings)
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        prefix = click.Context(command, parent=root, info_name=name).auto_envvar_prefix
        for option in command.params:
            # `--url` is found by the command itself, which compares it with the argument.
            if isinstance(option, click.Option) and not option.hidden and option.opts != ["--url"]:
                long = max(option.opts, key=len).lstrip("-").replace("-", "_").upper()
                found = option.envvar or f"{prefix}_{str(option.name).upper()}"
                names = {f"VLLM_ROUTER_{long}", f"{prefix}_{long}", "VLLM_ROUTER_MOCK_FIRST_PORT"}
                assert found in names, (name, option.opts)


@pytest.mark.parametrize(("variable", "red"), [("", True), ("NO_COLOR", False)])
def test_error_on_terminal_has_red_beginning_unless_colour_is_off(
    variable: str, red: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    if variable:
        monkeypatch.setenv(variable, "1")
    say_error("servers.toml:2:7: expected a number")
    written = capsys.readouterr().err
    assert ("\x1b[31m" in written) is red
    assert click.unstyle(written) == "servers.toml:2:7: expected a number\n"


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(arguments: list[str]):
    result = call(*arguments)
    assert result.exit_code == 0
    commands = {line.split()[0] for line in result.stdout.partition("Commands:\n")[2].splitlines()}
    assert commands == {
        "run", "check-config", "status", "drain", "undrain", "monitor", "explain", "mock", "open",
        "completion", "discover", "schema", "simulate", "version",
    }  # fmt: skip


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version_is_printed(arguments: list[str]):
    assert call(*arguments).stdout == f"vLLM Router {vllm_router.__version__}\n"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "version"])
def test_help_of_command_has_examples(name: str):
    lines = call(name, "--help").stdout.splitlines()
    assert any(re.search(rf"\bvllm-router {name}\b", line) for line in lines[1:])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vllm-router dr", "drain"),
        ("vllm-router run --fro", "--front"),
        ("vllm-router run --front la", "lane"),
        ("vllm-router completion z", "zsh"),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_finds_commands_options_and_values(shell: str, words: str, expected: str):
    last = words.split()[-1]
    position = last if shell == "fish" else str(len(words.split()) - 1)
    environ = {
        "_VLLM_ROUTER_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": position,
    }
    result = CliRunner().invoke(cli, [], prog_name="vllm-router", env=environ)
    assert expected in re.split(r"[\s,]", result.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_accepted_by_shell(shell: str):
    script = call("completion", shell).stdout
    assert f"_VLLM_ROUTER_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, timeout=60, check=True)


def test_completion_in_bash_completes_word(tmp_path: Path):
    (tmp_path / "vllm-router").symlink_to(Path(sys.executable).with_name("vllm-router"))
    script = call("completion", "bash").stdout + (
        "COMP_WORDS=(vllm-router und); COMP_CWORD=1\n"
        "_vllm_router_completion vllm-router und vllm-router\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["undrain"]


HEAVY = {"trio", "httpx", "quart", "hypercorn", "rich", "msgspec"}


@pytest.mark.parametrize("arguments", [["run", "--help"], ["version"]])
def test_help_and_version_load_no_heavy_module(arguments: list[str]):
    code = (
        "import sys, vllm_router.cli.main as c\n"
        f"try: c.cli({arguments})\n"
        f"except SystemExit: print(sorted({HEAVY} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("10.0.0.1:8888", "http://10.0.0.1:8888"),
        ("https://router.example/llm/", "https://router.example/llm"),
    ],
)
def test_router_url_may_be_short(given: str, used: str):
    assert RouterClient(given).url == used


def test_status_skips_invalid_servers():
    (server,) = Status(health={}, load={"servers": [{"name": "a", "load": "?"}, "b"]}).servers
    assert (server.name, server.load, server.models) == ("a", None, ())


def test_plain_table_aligns_columns():
    columns = [Column("NAME"), Column("LOAD", right=True), Column("STATE")]
    rows = [[Cell("a"), Cell("0.5"), Cell("up")], [Cell("long-name"), Cell("12.25"), Cell("-")]]
    assert plain_lines(columns, rows) == [
        "NAME        LOAD  STATE",
        "a            0.5  up",
        "long-name  12.25  -",
    ]


def test_table_is_drawn_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    long = "http://a-very-long-name.example:8000"
    print_table(
        [Column("SERVER"), Column("LOAD", right=True)], [[Cell("gpu-1", "red"), "0.5"], [long, ""]]
    )
    drawn = click.unstyle(capsys.readouterr().out)
    assert "SERVER" in drawn
    # A long value is folded: a cut one could not be copied.
    assert "".join(drawn.split()).count("http://a-very-long-name") == 1
    assert all(len(line) <= 30 for line in drawn.splitlines())


def test_table_escapes_control_characters(capsys: pytest.CaptureFixture[str]):
    print_table([Column("NAME")], [["\x1b[2Jmodel\nup"], [""]])
    assert capsys.readouterr().out.splitlines() == ["NAME", r"\x1b[2Jmodel\nup", "-"]


@pytest.mark.parametrize("command", ["status", "monitor"])
@pytest.mark.parametrize("key", ["ké", "k\nx", "\udcff"])
def test_cli_key_that_no_header_can_have_is_one_line_without_it(command: str, key: str):
    result = call(command, "http://127.0.0.1:1", "--key", key)
    assert_one_line(result, "--key: expected a key of visible ASCII characters")
    assert key not in result.stderr


@pytest.mark.parametrize("host", ["xn--", "a..b", "a" * 64])
@pytest.mark.parametrize("command", ["status", "monitor"])
def test_cli_url_with_impossible_host_is_one_line(command: str, host: str):
    assert_one_line(call(command, f"http://{host}"), f"http://{host}")


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_run_impossible_host_is_one_line(host: str):
    given = ("--server", "http://127.0.0.1:1", "--console", "--port", "0")
    assert_one_line(call("run", *given, "--host", host), f"cannot listen on {host}")


def test_explain_body_nested_too_deeply_is_one_line(scratch: Path):
    (scratch / "body.json").write_text("[" * 100_000 + "]" * 100_000)
    assert_one_line(call("explain", "--body", "body.json"), "--body", "nested too deeply")


# -- Ctrl-C -----------------------------------------------------------------------------------

INTERRUPTED = """
import importlib.abc, signal, sys

module = sys.argv[1]
sys.argv[:2] = ["vllm-router"]

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
from vllm_router.cli.main import main
main()
"""


@pytest.mark.parametrize("module", ["click", "vllm_router.cli.status", "httpx"])
def test_cli_interrupted_while_it_imports_ends_quietly(module: str):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, "status", "http://127.0.0.1:1"],
        env={**os.environ, "PYTHONPATH": str(Path(vllm_router.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_cli_imported_by_a_program_leaves_its_interrupts_alone():
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL


# -- standard streams -------------------------------------------------------------------------


def run_in_shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line in which `ROUTER` stands for the program."""
    program = f"{sys.executable} -m vllm_router"
    return subprocess.run(
        ["bash", "-c", command.replace("ROUTER", program)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(vllm_router.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", ["schema", "check-config --probe"])
def test_cli_full_disk_behind_stdout_is_one_line(scratch: Path, command: str):
    (scratch / "servers.toml").write_text('servers.servers = [{ url = "http://127.0.0.1:1" }]')
    done = run_in_shell(f"ROUTER {command} > /dev/full", scratch)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == "vllm-router: cannot write the output: No space left on device"


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_cli_closed_standard_stream_changes_no_exit_code(scratch: Path, closed: str):
    (scratch / "servers.toml").write_text('servers.servers = [{ url = "http://127.0.0.1:1" }]')
    done = run_in_shell(f"ROUTER check-config --probe {closed}", scratch)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    done = run_in_shell(f"ROUTER monitor http://127.0.0.1:1 {closed}", scratch)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_cli_unwritable_stderr_keeps_exit_code(scratch: Path):
    assert run_in_shell("ROUTER check-config --config none 2> /dev/full", scratch).returncode == 2


# -- errors of any command ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RouterError("out of \x1b[2Jluck"), 2, r"vllm-router: out of \x1b[2Jluck"),
        (
            click.UsageError("two\nlines"),
            2,
            "vllm-router status: two lines (see vllm-router status --help)",
        ),
        (click.ClickException("no"), 1, "vllm-router: no"),
        (click.Abort(), 130, ""),
    ],
)
def test_command_error_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, line: str
):
    @click.command("broken")
    def broken() -> None:
        raise error

    monkeypatch.setattr(Commands, "get_command", lambda self, ctx, name: broken)
    found = CliRunner().invoke(cli, ["status"], prog_name="vllm-router")
    assert (found.exit_code, found.stderr.strip()) == (code, line)
    with pytest.raises(type(error)):
        cli.main(["status"], prog_name="vllm-router", standalone_mode=False)
