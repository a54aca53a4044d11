"""The JSON Schema of servers.toml agrees with the parser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from vllm_router.cli.main import cli
from vllm_router.config.json_schema import json_schema
from vllm_router.config.parser import parse
from vllm_router.errors import ConfigError
from vllm_router.routing.policies import POLICY_NAMES

EXAMPLE = Path(__file__).parents[3] / "servers.example.toml"
VARIABLES = {"LEVEL": "debug", "HOST": "127.0.0.1", "PORT": "80", "POLICY": "random"}
SERVER = '[[servers.servers]]\nurl = "http://h:1"\n'


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json_schema(POLICY_NAMES)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_schema_accepts_example_with_every_key_uncommented(validator: Any):
    text = re.sub(r"^#(?=[a-z_]+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    assert not list(validator.iter_errors(tomllib.loads(text)))


def test_schema_of_example_is_the_generated_file():
    first, _, _ = EXAMPLE.read_text().partition("\n")
    file = EXAMPLE.parent / first.removeprefix("#:schema ")
    assert json.loads(file.read_text()) == json.loads(json.dumps(json_schema(POLICY_NAMES)))


TAPLO = Path(sys.executable).with_name("taplo")


@pytest.mark.skipif(not TAPLO.exists(), reason="needs taplo")
@pytest.mark.parametrize(
    ("old", "new", "code"),
    [("", "", 0), ("#max_retries = 3", "max_retries = -3", 1), ("#port =", "prot =", 1)],
)
def test_schema_is_used_by_editor_for_example(tmp_path: Path, old: str, new: str, code: int):
    """taplo is what VS Code and others check TOML with."""
    text = EXAMPLE.read_text()
    assert old in text
    (tmp_path / "docs").symlink_to(EXAMPLE.parent / "docs")
    (tmp_path / "servers.toml").write_text(text.replace(old, new))
    done = subprocess.run(
        [TAPLO, "lint", "servers.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "invalid schema" not in done.stderr


def test_schema_knows_every_default_of_config():
    keys = json_schema(POLICY_NAMES)["properties"]["config"]["properties"]
    assert keys["max_retries"] | {"description": ""} == {
        "type": "integer",
        "minimum": 0,
        "maximum": 2**63 - 1,
        "default": 3,
        "description": "",
    }
    assert {"enum": list(POLICY_NAMES)} in keys["policy"]["anyOf"]


def tables_of(schema: Any) -> Iterator[dict[str, Any]]:
    """All `properties` of a schema, at any depth."""
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            yield schema["properties"]
        schema = list(schema.values())
    for inner in schema if isinstance(schema, list) else ():
        yield from tables_of(inner)


def test_schema_defaults_are_valid_values():
    # Through JSON, as editors read it: an array is a tuple before.
    schema = json.loads(json.dumps(json_schema(POLICY_NAMES)))
    for properties in tables_of(schema):
        for key, described in properties.items():
            if "default" in described:
                jsonschema.validate(described["default"], described)
                assert described["default"] is not None, key


def test_schema_has_defaults_of_every_kind_of_table():
    discovery = json_schema(POLICY_NAMES)["properties"]["discovery"]["properties"]
    source, _ = discovery["http"]["anyOf"]
    assert source["properties"]["interval"]["default"] == 30.0
    assert discovery["keep_for"]["default"] == 300.0


@pytest.mark.parametrize(
    "text",
    [
        SERVER,
        SERVER + '[models]\na = "b"\n[models.c]\nserves = "b"\nhidden = true',
        SERVER + "[limits]\nqueue_size = 0\n[config]\ntotal_timeout = 5.5",
        SERVER + "[log]\naccess = false",
        SERVER + '[run]\nport = 0\nfront = "hypercorn"',
        SERVER + "[run]\nport = 65536",
        SERVER + '[run]\nhost = "a b"',
        SERVER + '[[auth.keys]]\nname = "a"\nkey = "sk-a"',
        SERVER + "verify = false",
        SERVER + '[log]\nlevel = "${LEVEL}"',
        SERVER + '[run]\nhost = "${HOST}"',
        SERVER + '[config]\npolicy = "${POLICY}"',
        SERVER + '[run]\nport = "${PORT}"',
        SERVER + '[log]\nlevel = "$LEVEL"',
        SERVER + "[slo]\nfirst_token = 2.5",
        SERVER + "[slo]\nfirst_token = 2",
        SERVER + "[shared]",
        SERVER + "[discovery.http]",
        SERVER + "[discovery.dns]\nport = 80",
        SERVER + "[config]\nmax_retrys = 3",
        SERVER + "[config]\nmax_retries = -1",
        SERVER + '[config]\npolicy = "best"',
        SERVER + "[config]\nmax_ejected_share = 1.5",
        SERVER + '[log]\nlevel = "loud"',
        SERVER + "[models]\na = 3",
        SERVER + '[[auth.keys]]\nname = "a b"\nkey = "sk-a"',
        SERVER + 'name = "a b"',
        "[[servers.servers]]\nweight = 1",
        "[[server]]",
    ],
)
def test_schema_and_parser_agree(validator: Any, text: str):
    try:
        parse(text.encode(), "f", environ=VARIABLES, policies=POLICY_NAMES)
        accepted = True
    except ConfigError:
        accepted = False
    assert validator.is_valid(tomllib.loads(text)) is accepted


def test_schema_command_prints_json():
    result = CliRunner().invoke(cli, ["schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(json.dumps(json_schema(POLICY_NAMES)))
