"""Every block of code in the docs is run, or says in its title that it is not.

A title is `Not run by the tests: REASON` or `Run by FILE`. Without one, a block of commands is run
here, by `scripts/follow-readme` (the blocks of README.md) or, if it has curl lines, by
test_readme.py; files in TOML, YAML and JSON are parsed, and Python is run or compared.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import tomli
import yaml
from click.testing import CliRunner

from support.cli_process import ROOT, router
from support.mock_process import mock_processes
from vllm_router.cli.main import cli
from vllm_router.config.parser import parse

PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = {"bash", "console"}
LANGUAGES = {*COMMANDS, "python", "toml", "yaml", "json", "js", "nginx", "ini", "text"}
BLOCK = re.compile(r'^```(\w*)(?: title="([^"\n]*)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)

NOT_RUN = re.compile(r"Not run by the tests(: .+)?")
RUN_BY = re.compile(r"Run by (\S+)")

PYTHON = {
    "import json\n\nimport trio\nfrom trio_w": "tests/docs/test_blocks.py",
    "import json\nimport sys": "tests/integration/test_feed_tail.py",
    "import trio\n\nfrom vllm_router": "tests/integration/test_embed.py",
    "from collections.abc import Sequence": "tests/docs/test_packaging.py",
    "import openai": "tests/docs/test_blocks.py",
}
"""The tests that run a block of Python, by its beginning."""

OTHER_TOML = ("# keys.toml", "[project.entry-points")
"""The beginnings of blocks that are not of servers.toml."""

FILES = {"auth", "tls", "shared"}
"""Tables that name files, or need an extra."""


class Block(NamedTuple):
    page: str
    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its commands without comments; the ones of a console block begin with `$`."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [found for line in lines if (found := re.sub(r"(^|\s+)# .*", "", line).strip())]


def blocks(page: Path) -> list[Block]:
    return [Block(page.name, *found) for found in BLOCK.findall(page.read_text())]


BLOCKS = [block for page in PAGES for block in blocks(page)]
README = {line for block in blocks(ROOT / "README.md") for line in block.commands}


def runnable(block: Block) -> bool:
    """True for a block of commands that this file runs."""
    return (
        block.language in COMMANDS
        and not block.title
        and not all(line in README or line.startswith("curl ") for line in block.commands)
    )


def test_blocks_have_language_and_valid_title():
    for block in BLOCKS:
        assert block.language in LANGUAGES, block
        if block.title and not NOT_RUN.fullmatch(block.title):
            found = RUN_BY.fullmatch(block.title)
            assert found is not None, block
            assert (ROOT / found[1]).is_file(), block


def test_blocks_without_command_language_have_no_commands():
    for block in BLOCKS:
        if block.language == "text":
            assert not re.match(r"(\$ |\./|scripts/|vllm|pip |curl |python)", block.text), block


def test_blocks_of_toml_are_valid():
    for block in BLOCKS:
        if block.language == "toml":
            tables = tomli.loads(block.text)
            # The latter name files that a test would have to make.
            if not block.text.startswith(OTHER_TOML) and not FILES & tables.keys():
                _parse_configuration(block.text)


def _parse_configuration(text: str) -> None:
    """Parse a piece of servers.toml. Raises ConfigError."""
    if "[servers]" not in text and "[discovery]" not in text:
        text += '\n[[servers.servers]]\nurl = "http://gpu:1"\n'
    # What is not in a pod needs more keys.
    text = text.replace("kubernetes = { ", 'kubernetes = { api = "http://k", namespace = "ml", ')
    environ = dict.fromkeys(re.findall(r'_env\s*= "(\w+)"', text), "secret-" + "k" * 20)
    parse(text.encode(), "servers.toml", environ)


def test_blocks_of_yaml_and_json_are_valid():
    for block in BLOCKS:
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "json":
            json.loads(block.text)


def test_blocks_of_python_are_run_by_a_test():
    for block in BLOCKS:
        if block.language == "python" and not block.title:
            compile(block.text, block.page, "exec")
            found = [test for start, test in PYTHON.items() if block.text.startswith(start)]
            assert found, block
            assert (ROOT / found[0]).is_file()


def test_blocks_name_existing_options_and_scripts():
    """Commands that are not run, too: their options exist, and so do scripts."""
    root = click.Context(cli, info_name="vllm-router", **cli.context_settings)
    for block in BLOCKS:
        for line in block.commands if block.language in COMMANDS else ():
            for words in _commands_of(line) if "python3 -c" not in line else ():
                program = words[0].removeprefix(".venv/bin/")
                if program.startswith(("scripts/", "./scripts/")):
                    assert (ROOT / program).is_file(), line
                if program == "vllm-router" and not words[1].startswith("-"):
                    command = cli.get_command(root, words[1])
                    assert command is not None, line
                    words = [word.replace("access.log", "README.md") for word in words]
                    command.make_context(words[1], words[2:], parent=root)


def _commands_of(line: str) -> Iterator[list[str]]:
    """The words of each command of a line of the shell, without variables and redirections."""
    for part in re.split(r"&&|;|\|", re.sub(r"\d?>&?\S*\s*\S*|&$", "", line.split(" > ")[0])):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            del words[0]
        if words:
            yield words


# -- commands that are run ------------------------------------------------------------------------

TARGETS = """
[{"targets": ["gpu-1:8000"], "labels": {"__max_concurrent_requests": "64", "__weight": "1"}},
 {"targets": ["gpu-2:8000"], "labels": {"__state": "drain"}}]
"""


class Fleet(NamedTuple):
    url: str
    folder: Path
    """A working directory with a servers.toml of two servers, and one with targets in files."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A router with three servers like the demo's, and the files that the pages speak of."""
    folder: Path = tmp_path_factory.mktemp("blocks")
    llama = mock_processes(1, "--model", "llama-8b")
    keyed = mock_processes(1, "--model", "mistral-7b", "--api-key", "secret")
    with (
        mock_processes(3, "--model", "demo", "--token-delay", "0") as mocks,
        llama as (a,),
        keyed as (b,),
    ):
        (folder / "demo.toml").write_text(
            "".join(
                f'[[servers.servers]]\nurl = "{mock.url}"\nname = "demo-{number}"\n'
                f"max_concurrent_requests = {capacity}\n"
                for number, (mock, capacity) in enumerate(zip(mocks, (16, 8, 4), strict=True), 1)
            )
        )
        (folder / "servers.toml").write_text(
            f'[servers]\nservers = [{{ url = "{a.url}" }}, '
            f'{{ url = "{b.url}", name = "keyed", api_key = "secret" }}]\n'
        )
        (folder / "found").mkdir()
        (folder / "found" / "targets").mkdir()
        (folder / "found" / "targets" / "rack.json").write_text(TARGETS)
        (folder / "found" / "servers.toml").write_text(
            '[servers]\n[discovery]\nfile = { path = "targets/*.json" }\n'
        )
        with router(folder / "stderr", "--config", "demo.toml", cwd=folder) as running:
            yield Fleet(running.url, folder)


def shape(output: str) -> list[str]:
    """The lines of an output without figures, equal spaces, and without repeated lines."""
    lines = [re.sub(r"\d+(\.\d+)*", "0", " ".join(line.split())) for line in output.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def run_line(line: str, fleet: Fleet, folder: Path) -> str:
    words = shlex.split(line, comments=True)
    if words[0].removeprefix(".venv/bin/") != "vllm-router":
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "KEY": "sk-x"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout
    environ = {"VLLM_ROUTER_URL": fleet.url, "COLUMNS": "200"}
    result = CliRunner().invoke(cli, words[1:], prog_name="vllm-router", env=environ)
    assert result.exit_code == 0, (line, result.output)
    return str(result.output)


@pytest.mark.parametrize(
    "page", list(dict.fromkeys(block.page for block in BLOCKS if runnable(block)))
)
def test_blocks_of_commands_work_as_shown(
    page: str, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fleet.folder / ("found" if page == "discovery.md" else "")
    monkeypatch.chdir(folder)
    for block in BLOCKS:
        if block.page != page or not runnable(block):
            continue
        shown = re.split(r"^\$ .*\n", block.text, flags=re.MULTILINE)[1:]
        for number, line in enumerate(block.commands):
            output = run_line(line.replace("MODEL", "demo"), fleet, folder)
            if block.language == "console":
                assert shape(output) == shape(shown[number]), (line, output)
    CliRunner().invoke(cli, ["undrain", "demo-1"], env={"VLLM_ROUTER_URL": fleet.url})
    CliRunner().invoke(cli, ["undrain", "demo-3"], env={"VLLM_ROUTER_URL": fleet.url})


def test_blocks_openai_example_gets_whole_answer(fleet: Fleet) -> None:
    pytest.importorskip("openai")
    (block,) = [block for block in BLOCKS if block.text.startswith("import openai")]
    names: dict[str, object] = {}
    code = block.text.replace("http://router:8888", fleet.url).replace('model="m"', 'model="demo"')
    exec(compile(code, block.page, "exec"), names)
    generate = names["generate"]
    assert callable(generate)
    assert len(generate([{"role": "user", "content": "Hello!"}])) > 10


def test_blocks_feed_example_prints_servers(fleet: Fleet, tmp_path: Path) -> None:
    (block,) = [b for b in BLOCKS if b.page == "feed.md" and b.language == "python"]
    program = tmp_path / "example.py"
    program.write_text(block.text.replace("ws://127.0.0.1:8888", fleet.url.replace("http", "ws")))
    with subprocess.Popen(
        [sys.executable, "-u", program], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().split()[:2] == ["demo-1", "up"]
        finally:
            process.kill()
