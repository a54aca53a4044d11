"""Reading TOML strictly: bytes to a document, a table by the types its keys must have.

A type is `Annotated` with one msgspec `Meta`: its constraints check, its description says to
people what was expected, and `extra` may hold a function `read` that checks further and returns
the value to keep (raising ValueError with the whole text of the problem), `one_of`: the key of the
reader's `names` under which the accepted texts are listed, or `secret`: the value is never shown.

Problems are collected, so that one look at a file names them all. Each is one line,
`source: key.path: expected ..., got ...`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin

import msgspec
import tomli

from vllm_router.config.server_url import SHOWN_CHARS, escaped, quoted
from vllm_router.errors import ConfigError

MAX_FILE_BYTES = 1024 * 1024
"""A file of 200 servers has some 20 kB; parsing blocks the event loop, at worst 2 s per MB."""

MAX_PROBLEMS = 100
"""So many problems of one file are listed; of the rest only the number is given."""


def shown_value(value: object, *, secret: bool = False) -> str:
    """What was found, for people. Arrays and tables are named, not shown: they may hold secrets."""
    if secret:
        kind = "string" if isinstance(value, str) else type(value).__name__
        return f"a value that is not shown ({kind})"
    match value:
        case str():
            return quoted(value)
        case bool():
            return str(value).lower()
        case int() if value.bit_length() > 128:
            return f"an integer of {value.bit_length()} bits"
        case int() | float():
            return str(value)
        case dict():
            return "a table"
        case list():
            return "an array" if value else "an empty array"
    return f"a {type(value).__name__}"


def load_document(data: bytes, source: str) -> dict[str, Any]:
    """The bytes as TOML; raises ConfigError with one problem."""

    def refuse(problem: str) -> ConfigError:
        return ConfigError([f"{source}: {problem}"])

    if len(data) > MAX_FILE_BYTES:
        raise refuse(f"expected a file of at most {MAX_FILE_BYTES} bytes, got more")
    if not data.strip():
        raise refuse("expected a configuration, got an empty file")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise refuse("expected UTF-8 without a byte order mark, got a file that starts with one")
    if (nul := data.find(b"\0")) >= 0:
        raise refuse(f"expected text, got a NUL byte in line {data.count(10, 0, nul) + 1}")
    try:
        return tomli.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(10, 0, error.start) + 1
        raise refuse(f"expected UTF-8, got byte 0x{data[error.start]:02x} in line {line}") from None
    except tomli.TOMLDecodeError as error:
        raise refuse(
            f"line {error.lineno}, column {error.colno}: expected TOML, got a syntax error: "
            + "".join(map(escaped, error.msg))
        ) from None
    except (RecursionError, ValueError):
        # ValueError: Python converts no decimal integer of more than 4300 digits.
        raise refuse("expected TOML, got tables nested too deeply or a number too long") from None


class Reader:
    """Reads tables by their table of keys and collects what is wrong with them."""

    def __init__(
        self,
        source: str,
        tables: Mapping[str, Mapping[str, Any]],
        names: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """`tables` are all the known ones by path, to tell where a misplaced key belongs.

        `names` are the accepted texts of the types that refer to them by `one_of`; without an
        entry, any text is accepted.
        """
        self._source = source
        self._tables = tables
        self._names = names or {}
        self._problems: list[str] = []
        self._unlisted = 0

    def problem(self, path: str, text: str) -> None:
        self.line(f"{self._source}: {path}: {text}")

    def line(self, problem: str) -> None:
        """Note a whole line of another file."""
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(problem)
        else:
            self._unlisted += 1

    def include(self, other: Reader) -> None:
        """Note what another reader has found in another file."""
        for problem in other._problems:
            self.line(problem)
        self._unlisted += other._unlisted

    def unknown_key(self, path: str, key: str, known: Collection[str]) -> None:
        """Name the nearest key: of this table, or else the table where the key belongs."""
        text = f"unknown key {quoted(key)}"
        if len(self._problems) < MAX_PROBLEMS:  # the search costs more than reading the key
            lowered = key[:SHOWN_CHARS].lower()
            nearest = difflib.get_close_matches(lowered, known, n=1, cutoff=0.5)
            homes = [table for table, keys in self._tables.items() if key in keys]
            if homes:
                text += f", which belongs in {homes[0]}"
            elif nearest:
                text += f', did you mean "{nearest[0]}"?'
            else:
                text += f", known here: {', '.join(known)}"
        self.problem(joined(path, key), text)

    def table(self, path: str, table: object, keys: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a table by key; without those that are wrong."""
        if not isinstance(table, dict):
            self.problem(path, f"expected table, got {shown_value(table)}")
            return {}
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key not in keys:
                self.unknown_key(path, key, keys)
                continue
            read = self.value(joined(path, key), value, keys[key])
            if read is not None:
                values[key] = read
        return values

    def value(self, path: str, value: object, wanted: Any) -> Any:
        """`value` as the annotated type `wanted` reads it, or None after noting a problem."""
        kind, meta = get_args(wanted)
        if get_origin(kind) is tuple and isinstance(value, list) and value:
            (element, _) = get_args(kind)
            items = [self.value(f"{path}[{n}]", item, element) for n, item in enumerate(value)]
            return tuple(dict.fromkeys(items))
        extra = meta.extra or {}
        try:
            read = msgspec.convert(_whole(value), wanted)
        except msgspec.ValidationError:
            shown = shown_value(value, secret="secret" in extra)
            self.problem(path, f"expected {meta.description}, got {shown}")
            return None
        names = self._names.get(extra.get("one_of", ""))
        if names is not None and read not in names:
            known = ", ".join(f'"{name}"' for name in names)
            self.problem(path, f"expected one of {known}, got {quoted(read)}")
            return None
        if "read" not in extra:
            return read
        try:
            return extra["read"](read)
        except ValueError as error:
            self.problem(path, str(error))
            return None

    def variable(self, path: str, name: str, environ: Mapping[str, str], wanted: Any) -> Any:
        """The value of an environment variable as `wanted` reads it, or None."""
        # A key from a file often ends with the file's newline.
        value = environ.get(name, "").strip()
        if value:
            return self.value(path, value, wanted)
        named = quoted(name) if name.isupper() else "a name that is not shown"
        self.problem(path, f"expected an environment variable that is set, got {named}")
        return None

    def raise_problems(self) -> None:
        """Raise ConfigError if there were any."""
        if self._unlisted:
            self._problems.append(f"{self._source}: and {self._unlisted} more problems")
        if self._problems:
            raise ConfigError(self._problems)


def _whole(value: object) -> object:
    """3.0 as 3: the ancestor took it where it expected an int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def joined(path: str, key: str) -> str:
    """The path of a key; what is no bare key is quoted."""
    part = key if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) else quoted(key)
    return f"{path}.{part}" if path else part
