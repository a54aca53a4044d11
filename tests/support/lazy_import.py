"""Modules that take seconds to import, for the tests that need them only.

Every process of pytest-xdist collects all tests, and so imports every file of them.
"""

from __future__ import annotations

import importlib
from typing import Any


class LazyImport:
    """Stands for a module, and imports it when one of its attributes is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        # pytest looks for special attributes in everything that a file of tests names.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)
