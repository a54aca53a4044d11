"""The servers that have a model with a shorter context than another server has."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_router.fleet.server import Server


class ContextLengths:
    """Compares the `max_model_len` of servers, incrementally.

    `shorter` are the servers with a shorter context of any model than the longest in the fleet.
    """

    def __init__(self) -> None:
        self.shorter: set[Server] = set()
        self._lengths: dict[Server, dict[str, int]] = {}
        self._longest: dict[str, int] = {}

    def reset(self) -> None:
        """The set of servers has changed: the next `update` compares all."""
        self._lengths = {}

    def update(self, servers: Iterable[Server], changed: Iterable[Server]) -> bool:
        """Compare the `changed` servers, or all `servers` if necessary; True if all were."""
        if not self._longest_changed(changed):
            return False
        servers = list(servers)
        longest: dict[str, int] = {}
        for server in servers:
            for model, length in server.lengths.items():
                longest[model] = max(length, longest.get(model, 0))
        self._longest = longest
        self._lengths = {server: server.lengths for server in servers}
        self.shorter = {server for server in servers if self._is_shorter(server.lengths)}
        return True

    def _longest_changed(self, changed: Iterable[Server]) -> bool:
        """Whether the longest context of a model may have changed; else updates `shorter`."""
        if not self._lengths:
            return True
        longest = self._longest
        for server in changed:
            before, lengths = self._lengths.get(server, {}), server.lengths
            if before is lengths:
                continue
            for model in before.keys() | lengths.keys():
                old, new, top = before.get(model, 0), lengths.get(model, 0), longest.get(model, 0)
                if old != new and (new > top or old == top):
                    return True
            self._lengths[server] = lengths
            if self._is_shorter(lengths):
                self.shorter.add(server)
            else:
                self.shorter.discard(server)
        return False

    def _is_shorter(self, lengths: dict[str, int]) -> bool:
        return any(length < self._longest[model] for model, length in lengths.items())
