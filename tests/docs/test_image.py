"""The image: rules of its Dockerfile, and versions that are in step with pyproject.toml."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
LOCKED = ROOT / "deploy" / "docker" / "requirements.txt"
LOCKED_BUILD = ROOT / "deploy" / "docker" / "build-requirements.txt"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
_PROJECT = PYPROJECT["project"]
IN_IMAGE = [*_PROJECT["dependencies"], *_PROJECT["optional-dependencies"]["shared"]]


def instructions() -> list[tuple[str, str]]:
    """Keyword and arguments of every instruction, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def having(keyword: str) -> list[str]:
    return [arguments for name, arguments in instructions() if name == keyword]


def test_dockerfile_bases_are_given_by_tag_and_digest():
    bases = having("FROM")
    assert len(bases) == 2
    for base in bases:
        assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim@sha256:[0-9a-f]{64}( AS build)?", base)
    assert len({base.split()[0] for base in bases}) == 1, "both stages need one Python"


def test_dockerfile_user_is_a_number_and_not_root():
    assert having("USER") == ["10001:10001"]


@pytest.mark.parametrize("keyword", ["ENTRYPOINT", "CMD", "HEALTHCHECK"])
def test_dockerfile_command_has_exec_form(keyword: str):
    (arguments,) = having(keyword)
    command = json.loads(arguments[arguments.index("[") :])
    assert command
    assert all(isinstance(word, str) for word in command)


def test_dockerfile_installs_are_hashed_and_not_cached():
    commands = [part for line in having("RUN") for part in line.split("&&") if "pip " in part]
    assert len(commands) == 4
    for command in commands:
        assert "--no-cache-dir" in command
        assert ("--require-hashes" in command) != ("--no-index" in command)


def test_dockerfile_copies_files_that_exist_and_are_sent():
    """A pattern of .dockerignore excludes all but the listed files."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sent = [line[1:].rstrip("/") for line in ignored if line.startswith("!")]
    assert not having("ADD")
    for arguments in having("COPY"):
        for source in arguments.split()[:-1]:
            assert (ROOT / source).exists()
            assert any(Path(source).match(pattern) for pattern in sent), source


def test_compose_images_have_a_version():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    images = [service["image"] for service in services.values() if "image" in service]
    assert images
    for image in images:
        assert re.search(r":v?\d+\.\d+\.\d+$", image), image


def test_dockerfile_passes_hadolint():
    beside = Path(sys.executable).parent / "hadolint"
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint has no wheel for this machine")
    done = subprocess.run(
        [program, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def locked(file: Path) -> dict[str, tuple[str, str]]:
    """Version and the comment of each locked package, by name."""
    found = re.findall(
        r"^([\w.-]+)==(\S+) \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)((?: +#.*\n?)+)",
        file.read_text(),
        re.MULTILINE,
    )
    return {canonicalize_name(name): (version, comment) for name, version, _, comment in found}


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        (LOCKED, IN_IMAGE),
        (LOCKED_BUILD, PYPROJECT["build-system"]["requires"]),
    ],
    ids=["runtime", "build"],
)
def test_locked_versions_are_in_step_with_pyproject(file: Path, wanted: list[str]):
    """After a change of pyproject.toml: scripts/lock."""
    text = file.read_text()
    packages = locked(file)
    assert len(packages) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE)), "all have hashes"
    assert "://" not in text, "an index or a file of this machine"
    required = {canonicalize_name(Requirement(line).name): Requirement(line) for line in wanted}
    direct = {
        name
        for name, (_, comment) in packages.items()
        if "pyproject.toml" in comment or "build-system.requires" in comment
    }
    assert direct == required.keys()
    for name, requirement in required.items():
        assert requirement.specifier.contains(packages[name][0], prereleases=True), name
