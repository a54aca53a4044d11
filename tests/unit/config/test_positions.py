"""Positions of keys and values in a TOML document, and the lines shown with an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.config.parser import parse
from vllm_router.config.positions import Positions
from vllm_router.config.server_url import joined
from vllm_router.errors import ConfigError
from vllm_router.routing.policies import POLICY_NAMES

EXAMPLE = Path(__file__).parents[3] / "servers.example.toml"

HARD = '''\
# a comment with [brackets] and = signs
title = "a # no comment \\" still" # a comment
"quoted.key" . 'literal' = 3
multi = """
[not.a.table]
key = "not a key" \\""""""
raw = \'\'\'
'' # \'\'\'\'\'
day = 1979-05-27 07:32:00Z
[ a . b ]
list = [ 1, 2.5, [ "x", { y = 1, z.w = [true] } ],   # ends
  "last",
]
[[ a.many ]]
k = 1
[a.many.inner]
k = 2
[[a.many]]
k = 3
inline = {
  x = 1, # one
  y = { z = "]}" },
}
'''


def leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, v in value.items() for leaf in leaves(joined(path, key), v)]
    if isinstance(value, list):
        return [leaf for n, v in enumerate(value) for leaf in leaves(f"{path}[{n}]", v)]
    return [(path, value)]


def check_every_leaf(text: str) -> int:
    """Every value that tomli reads is where the scanner says it is."""
    lines = text.split("\n")
    positions = Positions(text.encode())
    found = leaves("", tomli.loads(text))
    for path, value in found:
        place = positions.find(path)
        assert place is not None, path
        rest = "\n".join([lines[place.line - 1][place.column - 1 :], *lines[place.line :]])
        assert begins_with(rest, value), (path, rest[:40], value)
    return len(found)


def begins_with(text: str, value: Any) -> bool:
    """True if some beginning of the text is the TOML of the value."""
    for end in range(1, len(text) + 1):
        try:
            if tomli.loads(f"k = {text[:end]}")["k"] == value:
                return True
        except tomli.TOMLDecodeError:
            continue
    return False


def test_positions_of_every_value_of_hard_document_are_found():
    assert check_every_leaf(HARD) == 16


def test_positions_of_every_value_of_example_are_found():
    text = re.sub(r"^#(?=[a-z_]+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    assert check_every_leaf(text) > 60


TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=0xD7FF), max_size=6).map(
    lambda text: '"' + "".join(f"\\u{ord(char):04x}" for char in text) + '"'
)
BARE = st.sampled_from(["1", "true", "2.5", "'#'", "1979-05-27 07:32:00", '"""a\nb"""'])
VALUES = st.recursive(
    TEXTS | BARE,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{' , '.join(items)}]")
        | inner.map(lambda item: f"{{a = {item}, 'b c'.d = 1}}")
    ),
    max_leaves=6,
)


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_positions_of_generated_values_are_found(values: list[str]):
    rows = [f"[t{n}]\n  k = {value} # c" for n, value in enumerate(values)]
    check_every_leaf("\n".join(rows))


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text.encode(), "f", environ={}, policies=POLICY_NAMES)
    return caught.value


SERVER = '[[servers.servers]]\nurl = "http://h:1"\n'


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (SERVER + "[config]\nmax_retries = -1", "f:4:15: config.max_retries: "),
        (SERVER + "[config]\nmax_retrys = 1", "f:4:1: config.max_retrys: "),
        (SERVER + SERVER, "f:4:7: servers.servers[1].url: "),
        (SERVER + "[[servers.servers]]\nweight = 1", "f:3:1: servers.servers[1].url: "),
        ('servers = { servers = [{ url = "http://h", weight = 0 }] }', "f:1:53: "),
        (SERVER + '[config]\ncors_origins = ["*",\n "x y"]', "f:5:2: config.cors_origins[1]: "),
        (SERVER + "[tls]\n", "f:3:1: tls"),
        ("config.max_retries = -1\n" + SERVER, "f:1:22: config.max_retries: "),
        ("\ufeff" + SERVER + "[config]\nport = 1", "f:4:1: config.port: "),
        (SERVER + '[models]\n"a.b" = 1', "f:4:9: "),
        ("[config]", "f: servers.servers: "),
    ],
)
def test_problem_has_line_and_column(text: str, where: str):
    assert refused(text).problems[0].startswith(where)


def test_problem_shows_line_with_mark():
    error = refused(SERVER + "[config]\nmax_retries = -12  # more")
    assert list(error.excerpts.values()) == ["    4 | max_retries = -12\n      |               ^^^"]


def test_problem_with_wide_characters_before_it_is_marked():
    error = refused('servers = { servers = [{ url = "http://h", name = "名名", weight = 0 }] }')
    line, marks = error.excerpts[error.problems[-1]].splitlines()
    assert line.index("= 0") + 2 + len("名名") == marks.index("^")


@pytest.mark.parametrize(
    "text",
    [
        'api_key = "hunter2 x"',
        'api_key = "hunter2"\nweight = 0',
        'apikey = "hunter2"',
        "apikey = 'hunter2'",
        'apikey = """\nhunter2"""',
        'url = "http://user:hunter2@h"',
        'url = "http://h?token=hunter2"',
        'api_key_env = "hunter2 x"',
        "weight = 0 # hunter2",
        'unknown = ["hunter2"]',
        'unknown = { a = "hunter2" }',
    ],
)
@pytest.mark.parametrize("form", ["table", "inline"])
def test_problem_never_shows_secret(text: str, form: str):
    if form == "inline":
        start = "" if "url" in text else 'url = "http://h", '
        inner = text if '"""' in text else text.replace("\n", ", ")
        text = f"servers.servers = [\n{{ {start}{inner}\n}}]"
    else:
        text = ("[[servers.servers]]\n" if "url" in text else SERVER) + text
    error = refused(text)
    assert error.excerpts
    assert "hunter2" not in "".join(error.problems) + "".join(error.excerpts.values())


def test_long_line_is_cut_around_mark():
    names = ", ".join(f'"m{n}"' for n in range(100))
    error = refused(f'servers.servers = [{{ url = "http://h", models = [{names}], weight = 0 }}]')
    line, marks = next(iter(error.excerpts.values())).splitlines()
    assert len(line) < 120
    assert line[marks.index("^")] == "0"
