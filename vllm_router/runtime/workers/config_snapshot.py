"""The configuration in force, in memory shared by all processes of a router.

The leader writes it before it announces it to the workers. A restarted leader or worker begins with
it, even if the file has changed since. Only the router's own processes can access the memory.

A new configuration is written beside the previous one, and the header is switched last: if the
leader dies while writing, the previous one stays valid.
"""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from typing import cast

from vllm_router.config.schema import Config

_HEAD = struct.Struct("=QQQ")
"""Offset, length and checksum of the current configuration."""


class ConfigSnapshot:
    """The caller owns the descriptor, and keeps it open while this object is used."""

    def __init__(self, fileno: int) -> None:
        self._fileno = fileno

    @staticmethod
    def create(config: Config) -> int:
        """Create a descriptor with this configuration; the caller closes it."""
        fileno = os.memfd_create("vllm-router configuration")
        ConfigSnapshot(fileno).write(config)
        return fileno

    def write(self, config: Config) -> None:
        data = pickle.dumps(config)
        place, length, _ = self._head()
        start = _HEAD.size if _HEAD.size + len(data) <= place else place + length
        os.pwrite(self._fileno, data, max(start, _HEAD.size))
        head = _HEAD.pack(max(start, _HEAD.size), len(data), zlib.crc32(data))
        os.pwrite(self._fileno, head, 0)

    def read(self) -> Config | None:
        """Return None while a new one is being written; the leader announces it afterwards."""
        place, length, checksum = self._head()
        data = os.pread(self._fileno, length, place)
        if not data or zlib.crc32(data) != checksum:
            return None
        # Only processes of this router hold the descriptor, and only the leader writes.
        return cast("Config", pickle.loads(data))

    def _head(self) -> tuple[int, int, int]:
        """All zero before the first write."""
        place, length, checksum = _HEAD.unpack(
            os.pread(self._fileno, _HEAD.size, 0).ljust(_HEAD.size, b"\0")
        )
        return place, length, checksum
