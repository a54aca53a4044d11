"""The states of a server as operators see them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from vllm_router.fleet.reason import Reason


class State(enum.StrEnum):
    """The state of a server. If several apply, the first one is shown."""

    DRAINING = "draining"
    UNKNOWN = "unknown"
    DOWN = "down"
    ASLEEP = "asleep"
    PAUSED = "paused"
    EJECTED = "ejected"
    SILENT = "silent"
    REFUSING = "refusing"
    FULL = "full"
    UP = "up"


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of a server's state."""

    server: str
    old: State
    new: State
    reason: Reason
