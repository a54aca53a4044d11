"""The format of Prometheus' file_sd and http_sd: groups of targets with labels.

    [{"targets": ["gpu-1:8000", "gpu-2:8000"], "labels": {"__weight": "2"}}]

https://prometheus.io/docs/prometheus/latest/configuration/configuration/#file_sd_config
Labels that begin with `__` are for the program that reads the file; of these the router knows keys
of its servers. Other labels, and `__meta_...`, are ignored.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_router.config.discovered import MAX_TARGETS
from vllm_router.config.discovery import Found
from vllm_router.config.server_url import quoted
from vllm_router.config.toml_reader import shown_value

MAX_BYTES = 4_000_000
"""Largest document that is read; 10 000 targets have about 1 MB."""

_MOST = 10**18
"""Whole numbers in labels are smaller; Python refuses to write one of more than 4300 digits."""

Groups = tuple[tuple[Found, ...], list[str]]
"""Targets, and a line for each part that was left out."""


class BadDocument(Exception):
    """The document as a whole cannot be used; the message is for operators."""


class UnreadDocument(BadDocument):
    """The document could not be read just now; the same one may be good later."""


def read_json(data: bytes) -> Groups:
    """Raises BadDocument."""
    _check_size(data)
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadDocument(f"expected JSON, got something else: {error}") from None
    return read_groups(document)


def read_yaml(data: bytes) -> Groups:
    """Raises BadDocument."""
    import yaml

    _check_size(data)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        document = yaml.load(data, loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise BadDocument(f"expected YAML, got something else: {text}") from None
    except (LookupError, AttributeError):
        raise BadDocument("expected YAML, got a value that does not fit its tag") from None
    return read_groups([] if document is None and not data.strip() else document)


def _check_size(data: bytes) -> None:
    if len(data) > MAX_BYTES:
        raise BadDocument(f"expected at most {MAX_BYTES} bytes, got more")
    if not data.strip():
        # What a writer that truncates first leaves for a moment; an empty set is `[]`.
        raise BadDocument("expected an array of groups, got an empty document")


def read_groups(document: Any) -> Groups:
    """The targets of a decoded document. Raises BadDocument if it is no array of groups.

    Aliases of YAML make a small document name a large group very often: no more than MAX_TARGETS
    targets and problems are read, and labels that several groups share are read once.
    """
    if not isinstance(document, list):
        raise BadDocument(f"expected an array of groups, got {shown_value(document)}")
    found: list[Found] = []
    problems: list[str] = []
    labels_by_id: dict[int, tuple[dict[str, str], list[str]]] = {}
    for number, group in enumerate(document):
        where = f"[{number}]"
        if len(found) + len(problems) > MAX_TARGETS:
            return _first_parts(found, problems)
        if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
            problems.append(f'{where}: expected a group like {{"targets": ["host:8000"]}}')
            continue
        given = group.get("labels")
        if id(given) not in labels_by_id:
            labels_by_id[id(given)] = _labels(given)
        labels, bad = labels_by_id[id(given)]
        room = MAX_TARGETS + 1 - len(found) - len(problems)
        problems += [f"{where}.labels{line}" for line in bad[:room]]
        for place, target in enumerate(group["targets"][:room]):
            if isinstance(target, str):
                found.append(Found(target, labels=labels))
            else:
                problems.append(
                    f"{where}.targets[{place}]: expected host:port, got {shown_value(target)}"
                )
    if len(found) + len(problems) > MAX_TARGETS:
        return _first_parts(found, problems)
    return tuple(found), problems


def _first_parts(found: list[Found], problems: list[str]) -> Groups:
    more = f"expected at most {MAX_TARGETS} targets, got more: left out the rest"
    return tuple(found[:MAX_TARGETS]), [*problems[:MAX_TARGETS], more]


def _labels(given: object) -> tuple[dict[str, str], list[str]]:
    """The labels for the router, without their `__`, and problems."""
    if given is None:
        return {}, []
    if not isinstance(given, dict):
        return {}, [f": expected a table, got {shown_value(given)}"]
    labels: dict[str, str] = {}
    problems: list[str] = []
    for key, value in given.items():
        if not (isinstance(key, str) and key.startswith("__")) or key.startswith("__meta_"):
            continue
        name = key.removeprefix("__").removesuffix("__")
        number = isinstance(value, float) or (isinstance(value, int) and -_MOST < value < _MOST)
        if isinstance(value, bool) or not (number or isinstance(value, str)):
            problems.append(f".{quoted(key)}: expected a string, got {shown_value(value)}")
        elif not key.endswith("__") or name == "scheme":
            labels[name] = str(value)
    return labels, problems
