"""The configuration in force, where every process of the router finds it: shared memory.

The leader writes it before it tells the workers; a leader or worker that is started again begins
with it, whatever the file says by then. Nobody but the router's own processes can reach it.

A leader that dies while it writes leaves the one before in force: a new one is written beside it,
and only then the head, which says where it is.
"""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from typing import cast

from vllm_router.config.schema import Config

_HEAD = struct.Struct("=QQQ")
"""Where it is, how long, and its checksum."""


class ConfigSnapshot:
    """One descriptor of memory; the caller's, as long as this is used."""

    def __init__(self, fileno: int) -> None:
        self._fileno = fileno

    @staticmethod
    def create(config: Config) -> int:
        """A descriptor with this configuration; whoever calls closes it."""
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
        """None while it is being written: whoever writes tells when it is done."""
        place, length, checksum = self._head()
        data = os.pread(self._fileno, length, place)
        if not data or zlib.crc32(data) != checksum:
            return None
        # Only processes of this router hold the descriptor, and only the leader writes.
        return cast("Config", pickle.loads(data))

    def _head(self) -> tuple[int, int, int]:
        """All zero before the first is written."""
        place, length, checksum = _HEAD.unpack(
            os.pread(self._fileno, _HEAD.size, 0).ljust(_HEAD.size, b"\0")
        )
        return place, length, checksum
