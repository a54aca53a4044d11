"""What a key asks the monitor to do beyond changing the display. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quit:
    """Leave the monitor."""


@dataclass(frozen=True, slots=True)
class Suspend:
    """Stop this process until the shell continues it."""


@dataclass(frozen=True, slots=True)
class SetDrain:
    """Drain a server, or take it back."""

    server: str
    on: bool


@dataclass(frozen=True, slots=True)
class ReloadFile:
    """Have the router read its configuration file again."""


@dataclass(frozen=True, slots=True)
class Explain:
    """Ask the router where a request for the model would go; None asks for any model."""

    model: str | None


Action = Quit | Suspend | SetDrain | ReloadFile | Explain


@dataclass(frozen=True, slots=True)
class Question:
    """A question at the bottom of the screen: `y` performs `action`, other keys cancel."""

    text: str
    action: Action


class Overlay(enum.Enum):
    """What is shown instead of the fleet."""

    HELP = enum.auto()
    DETAILS = enum.auto()
    EXPLAINED = enum.auto()
    REQUESTS = enum.auto()
    LOG = enum.auto()
