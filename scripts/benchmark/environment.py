"""Where the programs come from: everything is installed under .bench/ and reused."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


class Skipped(Exception):
    """A program that is not available here; the text says why, in a few words."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Environment:
    """The directory that holds programs, virtual environments, logs and results."""

    def __init__(self, directory: Path, *, install: bool = True) -> None:
        self.directory = directory
        self.install = install
        for name in ("bin", "venvs", "results", "run"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self.run = directory / "run" / str(os.getpid())
        """Configurations and output of what is started now."""
        for old in (directory / "run").iterdir():
            if not Path("/proc", old.name).exists():
                shutil.rmtree(old, ignore_errors=True)
        self.run.mkdir(exist_ok=True)

    # -- Go ------------------------------------------------------------------------------------

    def go_program(self, name: str) -> Path:
        """The program built from the Go sources in a directory beside this file. Raises Skipped."""
        sources = sorted((HERE / name).glob("*.go"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
        program = self.directory / "bin" / f"{name}-{digest}"
        if program.exists():
            return program
        go = self.debian_program("go", "golang-go", install=True)
        say(f"building {name}")
        made = program.with_suffix(f".{os.getpid()}")
        environ = os.environ | {
            "GOCACHE": str(self.directory / "go-cache"),
            "GO111MODULE": "off",
            "GOFLAGS": "",
        }
        _call([go, "build", "-o", made, *sources], "go build", env=environ)
        made.rename(program)  # two simultaneous builds do no harm
        return program

    # -- Debian --------------------------------------------------------------------------------

    def debian_program(self, command: str, package: str, install: bool | None = None) -> str:
        """A program of the system, installed if that is possible. Raises Skipped."""
        path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/go/bin"
        found = shutil.which(command, path=path)
        if found is None and (self.install if install is None else install):
            _apt_get_install(package)
            found = shutil.which(command, path=path)
        if found is None:
            raise Skipped(f"{command} is not here (Debian package {package})")
        return found

    # -- Python --------------------------------------------------------------------------------

    def venv(self, name: str, *requirements: str) -> Path:
        """The interpreter of a virtual environment with these packages. Raises Skipped."""
        directory = self.directory / "venvs" / name
        python = directory / "bin" / "python"
        stamp = directory / ".installed"
        wanted = "\n".join((sys.executable, *requirements))
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        if not self.install:
            raise Skipped(f"{' '.join(requirements)} is not installed")
        say(f"installing {' '.join(requirements)} into {directory}")
        _call([sys.executable, "-m", "venv", "--clear", directory], "venv")
        pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        _call([*pip, *requirements], f"pip install {' '.join(requirements)}")
        stamp.write_text(wanted)
        return python

    def router_python(self) -> Path:
        """An interpreter with our dependencies: $BENCH_PYTHON, or an environment made for it.

        The router itself is then run from a source tree, so a change needs no installation.
        """
        if given := os.environ.get("BENCH_PYTHON"):
            return Path(given)
        return self.venv("router", *_dependencies(ROOT / "pyproject.toml"))

    def tree(self, revision: str) -> Path:
        """A source tree: a directory, or a git revision that is unpacked. Raises Skipped."""
        if (Path(revision) / "vllm_router").is_dir():
            return Path(revision).resolve()
        asked = subprocess.run(
            ["git", "-C", ROOT, "rev-parse", "--verify", "-q", revision + "^{commit}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if asked.returncode:
            raise Skipped(f"{revision} is neither a source tree nor a revision")
        commit = asked.stdout.strip()
        directory = self.directory / "trees" / commit[:12]
        if not directory.exists():
            directory.parent.mkdir(exist_ok=True)
            archive = subprocess.run(
                ["git", "-C", ROOT, "archive", commit, "vllm_router"],
                capture_output=True,
                check=True,
            ).stdout
            made = directory.with_suffix(".new")
            made.mkdir(exist_ok=True)
            subprocess.run(["tar", "-x", "-C", made], input=archive, check=True)
            made.rename(directory)
        return directory


def _apt_get_install(package: str) -> None:
    """As root or through password-less sudo. Raises Skipped."""
    as_root = ["sudo", "-n"] if os.geteuid() else []
    if not all(shutil.which(program) for program in ("apt-get", *as_root[:1])):
        raise Skipped(f"{package} cannot be installed: neither root nor sudo, or no apt-get")
    say(f"installing {package} with apt-get")
    apt = [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]
    _call([*apt, "update"], "apt-get update")
    with _no_services():
        _call(
            [*apt, "install", "-y", "--no-install-recommends", package],
            f"apt-get install {package}",
        )


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    """Debian starts the services it installs, unless this file forbids it."""
    policy = Path("/usr/sbin/policy-rc.d")
    if os.geteuid() or policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


def _dependencies(project: Path) -> list[str]:
    import tomllib

    return sorted(tomllib.loads(project.read_text())["project"]["dependencies"])


def _call(command: Iterable[str | Path], what: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no word why"]
        raise Skipped(f"{what}: {lines[-1][:200]}")
