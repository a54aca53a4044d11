"""The configuration in force, where every process of the router finds it: shared memory.

The leader writes it before it tells the workers; a leader or worker that is started again begins
with it, whatever the file says by then. Nobody but the router's own processes can reach it.
"""

from __future__ import annotations

import os
import pickle
import zlib
from typing import cast

from vllm_router.config import Config

_HEAD = 16


class InForce:
    """One descriptor of memory; the caller's, as long as this is used."""

    def __init__(self, fileno: int) -> None:
        self._fileno = fileno

    @staticmethod
    def create(config: Config) -> int:
        """A descriptor with this configuration; whoever calls closes it."""
        fileno = os.memfd_create("vllm-router configuration")
        InForce(fileno).write(config)
        return fileno

    def write(self, config: Config) -> None:
        data = pickle.dumps(config)
        head = len(data).to_bytes(8, "big") + zlib.crc32(data).to_bytes(8, "big")
        os.pwrite(self._fileno, head + data, 0)

    def read(self) -> Config | None:
        """None while it is being written: whoever writes tells when it is done."""
        head = os.pread(self._fileno, _HEAD, 0)
        data = os.pread(self._fileno, int.from_bytes(head[:8], "big"), _HEAD)
        if zlib.crc32(data) != int.from_bytes(head[8:], "big"):
            return None
        # Only processes of this router hold the descriptor, and only the leader writes.
        return cast("Config", pickle.loads(data))
