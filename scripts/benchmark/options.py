"""Types of options: what is wrong is said before anything is measured."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return number


def count(text: str) -> int:
    """An integer above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected an integer > 0, got {text}")
    return int(text)


def directory(text: str) -> Path:
    """A directory for results, which is made if it is not there."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    return path
