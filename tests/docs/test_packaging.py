"""The built distributions, their metadata, and forbidden text in the source."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import vllm_router
from support.docs import code_block

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_router"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def files_below(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both distributions, the wheel built from the sdist, with the build tools installed here."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT],
        capture_output=True,
        timeout=120,
        check=True,
    )
    return out


def test_wheel_contains_every_file_of_package(dist: Path):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == {str(path.relative_to(ROOT)) for path in files_below(PACKAGE)}
    assert "vllm_router/py.typed" in shipped
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"


@pytest.mark.skipif(not WORKFLOW.exists(), reason="the sdist has no workflows")
def test_workflow_matrix_equals_classifiers():
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    language = "Programming Language :: Python :: 3."
    declared = [one for one in PROJECT["classifiers"] if one.startswith(language)]
    tested = [f"{language}{one.removeprefix('3.')}" for one in job["strategy"]["matrix"]["python"]]
    assert declared == tested


def test_sdist_contains_what_builds_and_tests_package(dist: Path):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    sources = [*files_below(PACKAGE), *files_below(ROOT / "scripts"), *files_below(ROOT / "tests")]
    sources += files_below(ROOT / "deploy")
    wanted = {str(path.relative_to(ROOT)) for path in sources}
    wanted |= {"pyproject.toml", "LICENSE", "README.md", "README.zh.md", "servers.example.toml"}
    wanted |= {"Dockerfile", "compose.yaml"}
    assert wanted <= shipped


def test_example_policy_is_accepted_once_installed(tmp_path: Path):
    example = ROOT / "tests" / "data" / "example-policy"
    code = code_block(ROOT / "docs" / "embedding.md", "A policy of your own")
    source = (example / "first_free.py").read_text()
    assert all(line in source for line in code.splitlines())
    subprocess.run(
        [sys.executable, "-m", "build", "-w", "--no-isolation", "-o", tmp_path, example],
        capture_output=True,
        timeout=120,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "servers.toml").write_text(
        '[[servers.servers]]\nurl = "http://h:1"\n[config]\npolicy = "first_free"\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "vllm_router", "check-config"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "servers.toml: OK, 1 server, policy first_free\n", done.stderr


def test_version_installed_equals_source():
    assert importlib.metadata.version(PROJECT["name"]) == vllm_router.__version__


def test_command_is_installed():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="vllm-router")
    assert command.value == "vllm_router.cli.main:main"


def third_party_imports() -> set[str]:
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(str(node.module).partition(".")[0])
    return names - sys.stdlib_module_names - {"vllm_router"}


def test_imports_are_declared_dependencies():
    # Imports of an extra happen only where its feature is enabled.
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["otel"], *extras["shared"]]
    declared = {re.split(r"[<>=~!\[; ]", line)[0].lower() for line in wanted}
    distributions = importlib.metadata.packages_distributions()
    for name in third_party_imports():
        owners = {owner.lower().replace("_", "-") for owner in distributions[name]}
        assert owners & declared, f"{name} is imported but not declared"


# Split, so that this file does not match its own patterns.
FORBIDDEN = {
    "the address of a package index": "|".join(
        [r"--(?:extra-)?index" + "-url", r"pypi" + r"\.org/simple", "files" + r"\.pythonhosted"]
    ),
    "a path of a private machine": r"(?<![\w.])/(?:root|work|tmp/lab|home/\w+)" + r"/",
    "unfinished work": r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b",
}
LOCK_FILES = {"uv.lock", "poetry.lock", "Pipfile.lock", "pdm.lock", "package-lock.json"}


def sources() -> Iterator[Path]:
    """The files under version control, with their paths; works in an unpacked sdist as well."""
    for path in sorted(ROOT.iterdir()):
        # In a second work tree .git is a file with the path of the first.
        if path.is_file() and path.name not in ("servers.toml", ".git"):
            yield path
    for name in ("vllm_router", "docs", "tests", "scripts", ".ci"):
        yield from files_below(ROOT / name)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_source_does_not_contain_forbidden_text(what: str):
    pattern = re.compile(FORBIDDEN[what])
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_repository_has_no_lock_file():
    assert [path.name for path in sources() if path.name in LOCK_FILES] == []
