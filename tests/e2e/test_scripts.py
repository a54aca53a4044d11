"""The set-up scripts, with stand-ins for Python, pip and the router that record calls."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The programs that the scripts can find besides the stand-ins: no other Python, no apt-get.
COREUTILS = ("bash", "cat", "chmod", "cp", "cut", "dirname", "env", "flock", "grep", "id", "mkdir")
COREUTILS += ("sha256sum", "sh", "sleep")

# Answers the questions of scripts/setup, and stands for the interpreter of the environment.
PYTHON = r"""
case "$*" in
    --version) echo "Python VERSION" ;;
    *version_info*-venv*|*-venv*version_info*) echo python3.11-venv ;;
    *version_info*) exit NEW_ENOUGH ;;
    *enable-optimizations*) exit OPTIMIZED ;;
    *ensurepip*) exit ENSUREPIP ;;
    *dependency-groups*) echo "pytest>=8" ;;
    "-m venv --clear "*)
        mkdir -p "$4/bin"
        cp "$0" "$4/bin/python"
        cp "LOG.router" "$4/bin/vllm-router" ;;
    "-m pip config list") cat "LOG.pip-settings" 2>/dev/null ;;
    *" --only-binary uv uv") [ -e "LOG.uv" ] && cp "LOG.uv" "${0%/*}/uv" ;;
    "-m pip install "*) echo "pip $*" >>LOG ;;
    "-m pytest -q --collect-only"*) echo "collect ${5-}" >>LOG ;;
    "-m pytest"*) echo "python $*" ;;
esac
"""
ROUTER = r"""
echo "$$ $*" >>LOG
echo "$@"
[ "$1" != hang ] || exec sleep 60
"""


def executable(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}")
    path.chmod(0o755)


class Clone:
    """A fresh clone on a machine whose Python makes environments without installing anything."""

    def __init__(self, scratch: Path) -> None:
        self.root = scratch / "a clone"
        self.log = scratch / "log"
        self.log.touch()
        self.path = scratch / "bin"
        self.path.mkdir()
        for tool in COREUTILS:
            (self.path / tool).symlink_to(str(shutil.which(tool)))
        self.environ = {"PATH": str(self.path)}
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        (self.root / "vllm_router").mkdir()
        shutil.copy(ROOT / "pyproject.toml", self.root)
        shutil.copy(ROOT / "vllm_router" / "__init__.py", self.root / "vllm_router")
        self.interpreter("python3", "3.11.2")
        executable(scratch / "log.router", ROUTER.replace("LOG", str(self.log)))

    def interpreter(
        self,
        name: str,
        version: str,
        *,
        new_enough: bool = True,
        ensurepip: bool = True,
        optimized: bool = True,
    ) -> None:
        body = PYTHON.replace("VERSION", version).replace("LOG", str(self.log))
        body = body.replace("NEW_ENOUGH", str(int(not new_enough)))
        body = body.replace("OPTIMIZED", str(int(not optimized)))
        executable(self.path / name, body.replace("ENSUREPIP", str(int(not ensurepip))))

    def tool(self, name: str, body: str = "exit 0") -> None:
        """Put a command into the environment."""
        executable(self.root / ".venv" / "bin" / name, body)

    def call(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.root / "scripts" / script, *arguments],
            cwd="/",
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def installs(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("pip")]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ([], "run --demo"),
        (["--config", "my fleet.toml"], "run --config my fleet.toml"),
        (["monitor", "http://127.0.0.1:8888"], "monitor http://127.0.0.1:8888"),
        (["run", "--demo", "5"], "run --demo 5"),
    ],
)
def test_script_run_passes_arguments_on(clone: Clone, given: list[str], called: str):
    result = clone.call("run", *given)
    assert (result.returncode, result.stdout) == (0, f"{called}\n"), result.stderr


def test_script_setup_second_start_is_silent_and_installs_nothing(clone: Clone):
    clone.call("run")
    again = clone.call("run")
    assert again.stderr == ""
    assert len(clone.installs) == 1


def test_script_setup_changed_dependencies_are_installed(clone: Clone):
    clone.call("setup")
    with (clone.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    clone.call("setup")
    assert len(clone.installs) == 2


def test_script_setup_failed_installation_is_tried_again(clone: Clone):
    clone.call("setup")
    stamp = clone.root / ".venv" / ".installed"
    python = clone.root / ".venv" / "bin" / "python"
    working = python.read_text()
    stamp.unlink()
    executable(python, 'case "$*" in *pip*) exit 1 ;; esac')
    assert clone.call("run").returncode == 1
    assert not stamp.exists()
    python.write_text(working)
    assert clone.call("run").returncode == 0


@pytest.mark.parametrize(
    ("uv_exits", "settings", "used"),
    [
        (0, "", ["uv"]),
        (0, ":env:.cert='/ca.pem'\nglobal.extra-index-url='file:///more'\n", ["uv"]),
        (0, "global.index-url='https://index.test/simple'\n", ["pip"]),
        (0, ":env:.no-index='1'\n", ["pip"]),
        (1, "", ["uv", "pip"]),
        (None, "", ["pip"]),
    ],
)
def test_script_setup_development_packages_come_with_uv_or_else_with_pip(
    clone: Clone, uv_exits: int | None, settings: str, used: list[str]
):
    clone.log.with_name("log.pip-settings").write_text(settings)
    if uv_exits is not None:
        body = f'echo "uv $*" >>{clone.log}\nexit {uv_exits}'
        executable(clone.log.with_name("log.uv"), body)
    result = clone.call("setup", "--dev")
    assert result.returncode == 0, result.stderr
    lines = clone.log.read_text().splitlines()
    assert [line.partition(" ")[0] for line in lines] == used
    assert all(line.endswith(f"-e {clone.root} pytest>=8") for line in lines)
    assert ("uv could not install" in result.stderr) == (len(used) == 2)


def test_script_setup_environment_keeps_development_tools(clone: Clone):
    clone.call("setup", "--dev")
    assert clone.call("run").returncode == 0
    (clone.root / "vllm_router" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    clone.call("run")
    assert [line.endswith("pytest>=8") for line in clone.installs] == [True, True]


def test_script_run_signals_reach_the_router(clone: Clone):
    clone.call("setup")
    process = subprocess.Popen(
        [clone.root / "scripts" / "run", "hang"],
        env=clone.environ,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "hang\n"
        assert f"{process.pid} hang" in clone.log.read_text().splitlines()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_script_setup_old_python_is_one_line(clone: Clone):
    clone.interpreter("python3", "3.9.2", new_enough=False)
    result = clone.call("run")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "needs Python 3.11 or newer, found Python 3.9.2" in result.stderr


def test_script_setup_newer_python_beside_old_one_is_found(clone: Clone):
    clone.interpreter("python3", "3.9.2", new_enough=False)
    clone.interpreter("python3.12", "3.12.1")
    result = clone.call("setup")
    assert result.returncode == 0
    assert "Python 3.12.1" in result.stderr


@pytest.mark.parametrize(
    ("slow", "chosen"),
    [
        (["python3"], "Python 3.12.1"),
        (["python3.12"], "Python 3.11.2"),
        (["python3", "python3.12"], "Python 3.11.2"),
    ],
)
def test_script_setup_optimized_python_is_preferred(clone: Clone, slow: list[str], chosen: str):
    clone.interpreter("python3", "3.11.2", optimized="python3" not in slow)
    clone.interpreter("python3.12", "3.12.1", optimized="python3.12" not in slow)
    assert chosen in clone.call("setup").stderr


def test_script_setup_asked_for_python_prints_its_path_and_makes_nothing(clone: Clone):
    clone.interpreter("python3", "3.11.2", optimized=False)
    clone.interpreter("python3.12", "3.12.1")
    result = clone.call("setup", "--python")
    assert result.stdout == f"{clone.path}/python3.12\n"
    assert not (clone.root / ".venv").exists()


def test_script_setup_given_python_is_used_as_it_is(clone: Clone):
    clone.interpreter("python3.13", "3.13.0", optimized=False)
    clone.environ["PYTHON"] = "python3.13"
    assert "Python 3.13.0" in clone.call("setup").stderr


def test_script_setup_missing_ensurepip_says_what_to_install(clone: Clone):
    clone.interpreter("python3", "3.11.2", ensurepip=False)
    result = clone.call("run")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith("run: sudo apt-get install python3.11-venv")


SYSTEM_TOOLS = (
    *("chromium", "tmux", "ps", "curl", "promtool", "openssl", "go", "prometheus"),
    *("nginx", "haproxy", "caddy", "redis-server", "redis-sentinel"),
)


def test_script_test_without_arguments_runs_all_in_parallel(clone: Clone):
    clone.call("setup", "--dev")
    for tool in SYSTEM_TOOLS:
        clone.tool(tool)
    clone.tool("nproc", "echo 2")
    result = clone.call("test")
    assert (result.returncode, result.stdout) == (0, "python -m pytest -n 3\n")


def test_script_test_parallel_run_compiles_tests_without_bytecode(clone: Clone):
    clone.call("setup", "--dev")
    for tool in SYSTEM_TOOLS:
        clone.tool(tool)
    clone.tool("nproc", "echo 2")
    clone.call("test", "tests/docs/test_layers.py")
    assert "collect" not in clone.log.read_text()
    clone.call("test")
    collected = sorted(line for line in clone.log.read_text().splitlines() if "collect" in line)
    assert collected == ["collect --ignore", "collect tests/unit"]
    bytecode = clone.root / "tests" / "unit" / "http" / "__pycache__"
    bytecode.mkdir(parents=True)
    (bytecode / "test_client.cpython-311-pytest-9.2.0.pyc").touch()
    clone.call("test")
    assert clone.log.read_text().count("collect") == 2


@pytest.mark.parametrize(("folder", "processes"), [("unit", 2), ("property", 3)])
def test_script_test_folder_runs_alone_and_in_parallel(clone: Clone, folder: str, processes: int):
    clone.call("setup", "--dev")
    for tool in SYSTEM_TOOLS:
        clone.tool(tool)
    clone.tool("nproc", "echo 2")
    (clone.root / "tests" / folder).mkdir(parents=True)
    called = f"python -m pytest -n {processes} tests/{folder}\n"
    assert clone.call("test", folder).stdout == called


def test_script_test_missing_system_tool_is_named_and_fails(clone: Clone):
    clone.call("setup", "--dev")
    for tool in SYSTEM_TOOLS:
        if tool != "tmux":
            clone.tool(tool)
    result = clone.call("test", "tests/docs/test_layers.py")
    assert "run: sudo apt-get install tmux\n" in result.stderr
    assert "failed before pytest: system packages\n" in result.stderr
    assert result.stdout == "python -m pytest tests/docs/test_layers.py\n"
    assert result.returncode == 1


def test_script_test_failed_installation_runs_no_test(clone: Clone):
    clone.call("setup", "--dev")
    for tool in SYSTEM_TOOLS:
        clone.tool(tool)
    (clone.root / ".venv" / ".installed").unlink()
    python = clone.root / ".venv" / "bin" / "python"
    executable(python, 'case "$*" in *"pip install"*) exit 1 ;; *pytest*) echo "$@" ;; esac')
    result = clone.call("test", "unit")
    assert (result.returncode, result.stdout) == (1, "")


def test_script_test_arguments_go_to_pytest_alone(clone: Clone):
    clone.call("setup", "--dev")
    for tool in SYSTEM_TOOLS:
        clone.tool(tool)
    result = clone.call("test", "tests/docs/test_layers.py", "-x")
    assert result.stdout == "python -m pytest tests/docs/test_layers.py -x\n"
    assert result.stderr == ""
