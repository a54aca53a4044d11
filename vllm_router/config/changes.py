"""The difference of two configurations, in one line for the log."""

from __future__ import annotations

from collections.abc import Collection
from operator import ne
from typing import NamedTuple

import msgspec
from msgspec.structs import astuple

from vllm_router.config.auth import AuthConfig
from vllm_router.config.discovery import DiscoveryConfig
from vllm_router.config.models import changed_models
from vllm_router.config.schema import DERIVED_TIMEOUTS, Config
from vllm_router.config.server_url import SHOWN_CHARS, escaped
from vllm_router.config.tls import File
from vllm_router.config.types import Secret

_SHOWN_CHANGES = 10


class Changes(NamedTuple):
    """What a reload changes.

    added, removed: servers.
    details: the first other changes, `request_timeout 120 → 60`.
    more: how many are not in `details`.
    """

    added: int
    removed: int
    details: list[str]
    more: int

    @property
    def text(self) -> str:
        """All in one line: `+1 server, -1, request_timeout 120 → 60`."""
        parts = []
        if self.added:
            parts.append(f"+{self.added} server{'s' if self.added > 1 else ''}")
        if self.removed:
            noun = "" if self.added else " servers" if self.removed > 1 else " server"
            parts.append(f"-{self.removed}{noun}")
        parts += self.details
        if self.more:
            parts.append(f"and {self.more} more")
        return ", ".join(parts) or "nothing changed"

    @property
    def values(self) -> dict[str, str]:
        """The fields as texts, for translations."""
        details = ", ".join(self.details)
        numbers = {"added": self.added, "removed": self.removed, "more": self.more}
        return {**{name: str(number) for name, number in numbers.items()}, "details": details}


def changes(old: Config, new: Config) -> str:
    """What a reload changes, in one line."""
    return changes_of(old, new).text


def changes_of(old: Config, new: Config) -> Changes:
    """What a reload changes.

    Timeouts derived from `request_timeout` are left out, values of secrets are not shown, and
    long lists are cut.
    """
    before = {server.url: server for server in old.servers}
    after = {server.url: server for server in new.servers}
    details: list[str] = []
    beyond = 0
    for url, server in after.items():
        old_server = before.get(url)
        if old_server is None or old_server == server:
            continue
        if len(details) < _SHOWN_CHANGES:
            changed = _changed_fields(old_server, server)
            details += [f"{old_server.name} {change}" for change in changed]
        else:  # in words, the changes of a thousand servers would take 10 ms
            beyond += sum(map(ne, astuple(old_server), astuple(server)))
    kept = [url for url in after if url in before]
    if kept != [url for url in before if url in after]:
        details.append("order of servers")
    derived = _derived_timeouts(old) & _derived_timeouts(new)
    details += _changed_fields(old.settings, new.settings, ignore=derived)
    details += changed_models(old.models, new.models)
    details += _changed_auth(old.auth, new.auth)
    details += _changed_table("limits", old.limits, new.limits)
    details += _changed_table("tls", old.tls, new.tls)
    details += _changed_table("shared", old.shared, new.shared)
    details += _changed_discovery(old.discovery, new.discovery)
    if old.slo != new.slo:
        details.append("slo changed")
    details += [f"log {change}" for change in _changed_fields(old.log, new.log)]
    details += [f"run {change}" for change in _changed_fields(old.run, new.run)]
    return Changes(
        added=len(after.keys() - before.keys()),
        removed=len(before.keys() - after.keys()),
        details=details[:_SHOWN_CHANGES],
        more=max(0, len(details) + beyond - _SHOWN_CHANGES),
    )


def _changed_auth(old: AuthConfig | None, new: AuthConfig | None) -> list[str]:
    """Client keys by name, never by value."""
    if old is None or new is None:
        return [] if old is new else [f"auth {'off' if new is None else 'on'}"]
    before, after = ({key.name: key for key in auth.keys} for auth in (old, new))
    parts = [f"key +{name}" for name in after if name not in before]
    parts += [f"key -{name}" for name in before if name not in after]
    for name in (name for name in after if name in before):
        parts += [f"key {name} {change}" for change in _changed_fields(before[name], after[name])]
    return parts + [f"auth {change}" for change in _changed_fields(old, new, ignore=("keys",))]


def _changed_discovery(old: DiscoveryConfig | None, new: DiscoveryConfig | None) -> list[str]:
    if old is None or new is None:
        return [] if old is new else [f"discovery {'off' if new is None else 'on'}"]
    before, after = ({one.name: one for one in both.sources} for both in (old, new))
    parts = [f"source +{name}" for name in after if name not in before]
    parts += [f"source -{name}" for name in before if name not in after]
    parts += [
        f"source {name} changed" for name in after if before.get(name, after[name]) != after[name]
    ]
    fields = _changed_fields(old, new, ignore=("sources", "label_keys"))
    if old.label_keys != new.label_keys:
        parts.append("discovery label keys changed")
    return parts + [f"discovery {change}" for change in fields]


def _changed_table(name: str, old: msgspec.Struct | None, new: msgspec.Struct | None) -> list[str]:
    if old is None or new is None:
        return [] if old is new else [f"{name} {'off' if new is None else 'on'}"]
    return [f"{name} {change}" for change in _changed_fields(old, new)]


def _derived_timeouts(config: Config) -> set[str]:
    """The timeouts whose value is the one derived from `request_timeout`."""
    settings = config.settings
    return {
        key
        for key, derive in DERIVED_TIMEOUTS.items()
        if getattr(settings, key) == derive(settings.request_timeout)
    }


def _changed_fields(
    old: msgspec.Struct, new: msgspec.Struct, ignore: Collection[str] = ()
) -> list[str]:
    if old is new or old == new:
        return []
    changed = []
    for field in old.__struct_fields__:
        a, b = getattr(old, field), getattr(new, field)
        if a == b or field in ignore:
            continue
        secret = isinstance(a, Secret) or isinstance(b, Secret)
        if isinstance(a, File) and isinstance(b, File) and a.path == b.path:
            secret = True  # the same path with other content
        changed.append(f"{field} changed" if secret else f"{field} {_brief(a)} → {_brief(b)}")
    return changed


def _brief(value: object) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.12g}"
        case tuple():
            text = "".join(map(escaped, f"[{', '.join(value)}]"))
            return text if len(text) <= SHOWN_CHARS else f"[{len(value)} entries]"
    return str(value)
