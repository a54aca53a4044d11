"""A strict reader of TOML: bytes to a document, and tables by the types of their keys.

A type is `Annotated` with one msgspec `Meta`: constraints, a description of the expected value for
error messages, and in `extra` optionally

* `read`: a function that checks further and returns the value to keep, or raises ValueError with
  the full text of the problem;
* `one_of`: the accepted texts, or the key of the reader's `names` that lists them;
* `secret`: the value is never shown.

All problems of a file are collected, one line each:
`source:line:column: key.path: expected ..., got ...`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
import tomli

from vllm_router.config.excerpts import Location
from vllm_router.config.positions import Positions
from vllm_router.config.server_url import SHOWN_CHARS, joined, quoted
from vllm_router.config.syntax import excerpt_of, explain
from vllm_router.errors import ConfigError, Problem

MAX_FILE_BYTES = 1024 * 1024
"""Parsing takes up to 2 s per MB; the file of 200 servers has about 20 kB."""

MAX_PROBLEMS = 100
"""Problems of a file that are listed; the rest are only counted."""


def shown_value(value: object, *, secret: bool = False) -> str:
    """A value for an error message. Arrays and tables are not shown: they may hold secrets."""
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


_OTHER_NAMES = {
    "probe_interval": ("health_check_interval", "metrics_interval"),
    "probe_timeout": ("health_check_timeout",),
    "retries": ("max_retries",),
    "timeout": ("request_timeout",),
    "capacity": ("max_concurrent_requests",),
    "concurrency": ("max_concurrent_requests",),
    "max_num_seqs": ("max_concurrent_requests",),
    "address": ("url",),
    "endpoint": ("url",),
    "token": ("api_key",),
    "certificate": ("client_certificate",),
    "cert": ("certificate", "client_certificate"),
}
"""Keys of other programs, and what they are called here."""
_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)(\}?)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


Tables = Mapping[str, Mapping[str, Any]]
"""The keys of all known tables, with their types, by the table's path."""


def shown_keys(tables: Tables) -> set[str]:
    """The keys whose values are no secrets in any table."""
    kinds = [item for keys in tables.values() for item in keys.items()]
    return {key for key, _ in kinds} - {key for key, kind in kinds if _is_secret(kind)}


def load_document(data: bytes, source: str, tables: Tables) -> dict[str, Any]:
    """Decode TOML. Raises ConfigError with one problem; `tables` as in `Reader`."""

    def refuse(problem: str) -> ConfigError:
        return ConfigError([f"{source}: {problem}"])

    def refuse_at(problem: str, location: Location) -> ConfigError:
        line = f"{source}:{location.line}:{location.column}: {problem}"
        return ConfigError([line], {line: location.excerpt})

    def refuse_byte(problem: str, at: int) -> ConfigError:
        start = len(data[:at].decode("utf-8", "replace"))
        text = data.decode("utf-8", "replace")
        return refuse_at(problem, excerpt_of(text, known, shown, start, start + 1))

    if len(data) > MAX_FILE_BYTES:
        raise refuse(f"expected a file of at most {MAX_FILE_BYTES} bytes, got more")
    if not data.strip():
        raise refuse("expected a configuration, got an empty file")
    data = data.removeprefix(b"\xef\xbb\xbf")  # Notepad begins UTF-8 files with a byte order mark
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise refuse("expected UTF-8, got a file that starts with the byte order mark of UTF-16")
    shown = shown_keys(tables)
    known = {part for table in tables for part in table.split(".")}.union(*tables.values())
    if (nul := data.find(b"\0")) >= 0:
        raise refuse_byte("expected text, got a NUL byte", nul)
    try:
        return tomli.loads(data.decode())
    except UnicodeDecodeError as error:
        got = f"got byte 0x{data[error.start]:02x}"
        raise refuse_byte(f"expected UTF-8, {got}", error.start) from None
    except tomli.TOMLDecodeError as error:
        raise refuse_at(*explain(error, known, shown)) from None
    except (RecursionError, ValueError):
        # ValueError: Python converts no decimal integer of more than 4300 digits.
        raise refuse("expected TOML, got tables nested too deeply or a number too long") from None


class Reader:
    """Reads tables by the types of their keys, and collects the problems."""

    def __init__(
        self,
        source: str,
        tables: Tables,
        names: Mapping[str, Collection[str]] | None = None,
        data: bytes = b"",
    ) -> None:
        """`tables` has the keys of all known tables by path.

        They suggest where a misplaced key belongs. `names` has the accepted texts of types with
        `one_of`; without an entry any text is accepted. `data` are the bytes of the document, for
        the positions of problems.
        """
        self._source = source
        self._tables = tables
        self._names = names or {}
        self._data = data
        self._positions: Positions | None = None
        self._problems: list[str] = []
        self._excerpts: dict[str, str] = {}
        self._parts: dict[str, Problem] = {}
        self._unexpanded: set[str] = set()
        self._faulty: set[str] = set()
        self._unlisted = 0

    def problem(self, path: str, text: str, *, at_key: bool = False) -> None:
        """Add a problem of the value at `path`, or with `at_key` of the key itself."""
        if path in self._unexpanded:  # one problem is enough
            return
        self._faulty.add(path)
        if len(self._problems) >= MAX_PROBLEMS:
            self._unlisted += 1
            return
        found = self._where().find(path, at_key=at_key)
        where = self._source if found is None else f"{self._source}:{found.line}:{found.column}"
        line = f"{where}: {path}: {text}"
        self.line(line, found.excerpt if found is not None else "", Problem(where, path, text))

    def missing(self, path: str, text: str) -> None:
        """Add the problem that there is no value at `path`, unless one with a problem is there."""
        if path not in self._faulty:
            self.problem(path, text)

    def _where(self) -> Positions:
        if self._positions is None:
            self._positions = Positions(self._data, shown_keys(self._tables))
        return self._positions

    def first_present(self, paths: Sequence[str]) -> str:
        """The first of the paths that the document has; the first of all if it has none."""
        return next((path for path in paths if path in self._where()), paths[0])

    @property
    def found_problems(self) -> int:
        """The number of problems so far."""
        return len(self._problems) + self._unlisted

    def line(self, problem: str, excerpt: str = "", parts: Problem | None = None) -> None:
        """Add a problem as a complete line, with its excerpt and parts as in ConfigError."""
        if len(self._problems) >= MAX_PROBLEMS:
            self._unlisted += 1
            return
        self._problems.append(problem)
        if excerpt:
            self._excerpts[problem] = excerpt
        if parts is not None:
            self._parts[problem] = parts

    def include(self, other: Reader) -> None:
        """Add the problems that another reader has found in another file."""
        for problem in other._problems:
            self.line(problem, other._excerpts.get(problem, ""), other._parts.get(problem))
        self._unlisted += other._unlisted

    def expand(self, path: str, value: Any, environ: Mapping[str, str]) -> Any:
        """`value` with the variables that its texts name as `${NAME}`; `$${` stands for `${`.

        Problems are collected; a text with one stays as it is.
        """
        if isinstance(value, dict):
            return {key: self.expand(joined(path, key), v, environ) for key, v in value.items()}
        if isinstance(value, list):
            return [self.expand(f"{path}[{n}]", v, environ) for n, v in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        problems = []

        def replace(found: re.Match[str]) -> str:
            name = found[1]
            if name is None:
                return "${"
            if not (found[2] and _NAME.fullmatch(name)):
                problems.append(
                    "expected the name of an environment variable in ${…}, got something else: "
                    "write $${ for the characters ${"
                )
            elif name not in environ:
                problems.append(
                    f"expected the environment variable {name} to be set, and it is not"
                )
            return environ.get(name, "")

        expanded = _REFERENCE.sub(replace, value)
        for problem in problems:
            self.problem(path, problem)
        if problems:
            self._unexpanded.add(path)
            return value
        return expanded

    def unknown_key(self, path: str, key: str, known: Collection[str]) -> None:
        """Add a problem that suggests the table where the key belongs, or the nearest key."""
        text = f"unknown key {quoted(key)}"
        if len(self._problems) < MAX_PROBLEMS:  # the search costs more than reading the key
            lowered = key[:SHOWN_CHARS].lower()
            nearest = difflib.get_close_matches(lowered, known, n=1, cutoff=0.5)
            tables = [table for table, keys in self._tables.items() if key in keys]
            others = [name for name in _OTHER_NAMES.get(lowered, ()) if name in known]
            if others:
                text += ", did you mean " + " or ".join(f'"{name}"' for name in others) + "?"
            elif tables:
                text += f", which belongs in {tables[0]}"
            elif nearest:
                text += f', did you mean "{nearest[0]}"?'
            else:
                text += f", known here: {', '.join(known)}"
        self.problem(joined(path, key), text, at_key=True)

    def table(self, path: str, table: object, keys: Mapping[str, Any]) -> dict[str, Any]:
        """The valid values of a table by key; problems are collected."""
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
        """`value` converted to the annotated type `wanted`; None if it has a problem."""
        kind, meta = get_args(wanted)
        if isinstance(value, list) and value and (element := _element(kind)) is not None:
            items = [self.value(f"{path}[{n}]", item, element) for n, item in enumerate(value)]
            return tuple(dict.fromkeys([item for item in items if item is not None]))
        if get_origin(kind) is dict and isinstance(value, dict):
            return self._entries(path, value, *get_args(kind))
        extra = meta.extra or {}
        try:
            read = msgspec.convert(_whole(value), wanted)
        except msgspec.ValidationError:
            shown = shown_value(value, secret="secret" in extra)
            self.problem(path, f"expected {meta.description}, got {shown}")
            return None
        names = extra.get("one_of")
        if isinstance(names, str):
            names = self._names.get(names)
        if names is not None and read not in names:
            known = ", ".join(f'"{name}"' for name in names)
            nearest = difflib.get_close_matches(
                str(read)[:SHOWN_CHARS].lower().replace("-", "_"), names, n=1
            )
            hint = f', did you mean "{nearest[0]}"?' if nearest else ""
            self.problem(path, f"expected one of {known}, got {quoted(read)}{hint}")
            return None
        if "read" not in extra:
            return read
        try:
            return extra["read"](read)
        except ValueError as error:
            self.problem(path, str(error))
            return None

    def _entries(
        self, path: str, table: Mapping[str, object], named: Any, wanted: Any
    ) -> dict[str, Any]:
        """The valid entries of a table of any keys of the type `named`."""
        entries: dict[str, Any] = {}
        for key, value in table.items():
            where = joined(path, key)
            try:
                msgspec.convert(key, named)
            except msgspec.ValidationError:
                (meta,) = get_args(named)[1:]
                text = f"expected {meta.description}, got {quoted(key)}"
                self.problem(where, text, at_key=True)
                continue
            read = self.value(where, value, wanted)
            if read is not None:
                entries[key] = read
        return entries

    def variable(self, path: str, name: str, environ: Mapping[str, str], wanted: Any) -> Any:
        """The value of an environment variable, converted; None if it has a problem."""
        # A key read from a file often ends with the file's newline.
        value = environ.get(name, "").strip()
        if value:
            return self.value(path, value, wanted)
        named = quoted(name) if name.isupper() else "a name that is not shown"
        self.problem(path, f"expected an environment variable that is set, got {named}")
        return None

    def raise_problems(self) -> None:
        """Raise ConfigError if any problem was found."""
        if self._unlisted:
            self._problems.append(f"{self._source}: and {self._unlisted} more problems")
        if self._problems:
            raise ConfigError(self._problems, self._excerpts, self._parts)


def _element(kind: Any) -> Any:
    """The type of the elements if `kind` is a tuple, or a union with one; else None."""
    for one in get_args(kind) if get_origin(kind) is Union else (kind,):
        plain = get_args(one)[0] if get_origin(one) is Annotated else one
        if get_origin(plain) is tuple:
            return get_args(plain)[0]
    return None


def _is_secret(kind: Any) -> bool:
    return any("secret" in (meta.extra or {}) for meta in get_args(kind)[1:])


def _whole(value: object) -> object:
    """Accept 3.0 where 3 is expected, as the ancestor did."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
