"""The batches of the routers of one fleet, encoded as MessagePack.

A router that reads a batch trusts neither its sender nor the store in between: `decode` checks
every field and its length, and raises BadBatch. Durations are in seconds. URLs identify servers,
so all routers of a fleet must name a server by the same URL.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated

import msgspec
from msgspec import Meta

from vllm_router.fleet.engine_metrics import LONGEST_ADAPTER, MAX_ADAPTERS, EngineMetrics

VERSION = 1
"""Version of the format. New fields are appended and need no new version."""

MAX_BYTES = 256 * 1024
"""Largest encoded batch."""

MAX_HASHES = 8192
"""Block hashes in a batch: 64 KB. The others follow in the next batch."""

MAX_ITEMS = 4096
"""Entries of any other list or map in a batch."""

MAX_FIGURES = 256
"""Servers with figures in a batch: applying them takes 3 ms."""

_LARGEST = 1e15
_MAX_INT = 2**62

Url = Annotated[str, Meta(min_length=1, max_length=2048)]
Name = Annotated[str, Meta(max_length=256)]
Level = Annotated[float, Meta(ge=0, le=_LARGEST)]
Count = Annotated[int, Meta(ge=0, le=_MAX_INT)]
Share = Annotated[float, Meta(ge=0, le=1)]
Access = Annotated[int, Meta(ge=0, lt=2**16)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Hashes = Annotated[bytes, Meta(max_length=8 * MAX_HASHES)]

Placed = tuple[Url, Hashes]
"""Blocks of a prompt that was sent to a server, see `pack_blocks`."""


class BadBatch(ValueError):
    """The bytes are not a batch that this version understands; the text says why."""


class About(msgspec.Struct, frozen=True, array_like=True):
    """A router, for display.

    name: for people, such as its host name.
    software: its version.
    configuration: a digest of its configuration.
    age: seconds since its start.
    served: attempts that have ended since its start.
    """

    name: Name
    software: Name
    configuration: Name
    age: Level
    served: Count


class ServerLevel(msgspec.Struct, frozen=True, array_like=True):
    """One router's requests on one server now.

    queued: uncached prompt tokens that wait for a first token.
    in_flight: requests.
    adapters: running requests by LoRA adapter.
    """

    queued: Level
    in_flight: Count
    adapters: Annotated[dict[Name, Count], Meta(max_length=MAX_ADAPTERS)] = {}


class KeyUse(msgspec.Struct, frozen=True, array_like=True):
    """One router's requests of one API key.

    admitted: since the start of the router.
    recent: of these, since its last batch; 0 after an interruption.
    running: now.
    unheard: of the admitted ones, during the interruption that ends with this batch.
    """

    admitted: Count
    recent: Count
    running: Count
    unheard: Count = 0


class Figures(msgspec.Struct, frozen=True, array_like=True):
    """One server's metrics as a router has scraped them, see `EngineMetrics`.

    age: seconds from the scrape to the batch.
    access: differs for routers with different API keys for the server, see `access_of`.
    models: differs when the server's list of models differs.
    """

    age: Level
    access: Access
    models: Count
    running: Level
    waiting: Level | None = None
    kv_usage: Share | None = None
    prefix_queries: Level | None = None
    prefix_hits: Level | None = None
    prompt_tokens: Level | None = None
    generation_tokens: Level | None = None
    token_latency_sum: Level | None = None
    token_latency_count: Level | None = None
    first_token_sum: Level | None = None
    first_token_count: Level | None = None
    asleep: bool = False
    kv_tokens: Count | None = None
    max_adapters: Count | None = None
    adapters: Annotated[tuple[Name, ...], Meta(max_length=MAX_ADAPTERS)] = ()
    waiting_adapters: Annotated[tuple[Name, ...], Meta(max_length=MAX_ADAPTERS)] = ()

    def metrics(self) -> EngineMetrics:
        """The same figures as of a scrape by this router."""
        return EngineMetrics(**{name: getattr(self, name) for name in _METRICS})


_METRICS = tuple(field.name for field in dataclasses.fields(EngineMetrics))


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """The news of one router since its last batch.

    router: the id of the router process, new at each start.
    number: counts the batches of the process from 1.
    servers: by URL, those with requests of this router.
    placed, withdrawn: blocks sent to servers, and blocks that a server has refused after all.
    keys: by name, the keys that are in use or whose use has changed.
    ejected: servers that this router has just ejected.
    quarantined: digests of requests that have crashed servers.
    owners: servers of stored responses: digest of the id, URL, name of the key.
    figures: by URL, of the servers that this router has just scraped.
    interrupted: seconds since its last batch, if sharing was interrupted, else 0.
    """

    router: Annotated[str, Meta(min_length=1, max_length=64)]
    number: Count
    about: About
    servers: Annotated[dict[Url, ServerLevel], Meta(max_length=MAX_ITEMS)] = {}
    placed: Annotated[list[Placed], Meta(max_length=MAX_ITEMS)] = []
    withdrawn: Annotated[list[Placed], Meta(max_length=MAX_ITEMS)] = []
    keys: Annotated[dict[Name, KeyUse], Meta(max_length=MAX_ITEMS)] = {}
    ejected: Annotated[list[Url], Meta(max_length=MAX_ITEMS)] = []
    quarantined: Annotated[list[Digest], Meta(max_length=MAX_ITEMS)] = []
    owners: Annotated[list[tuple[Digest, Url, Name]], Meta(max_length=MAX_ITEMS)] = []
    figures: Annotated[dict[Url, Figures], Meta(max_length=MAX_FIGURES)] = {}
    interrupted: Level = 0.0


class _Envelope(msgspec.Struct, array_like=True):
    version: int
    batch: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(_Envelope)
_batches = msgspec.msgpack.Decoder(Batch)


def encode(batch: Batch) -> bytes:
    """The batch as it is stored."""
    return _encoder.encode(_Envelope(VERSION, msgspec.Raw(_encoder.encode(batch))))


def decode(data: bytes) -> Batch:
    """Read a batch. Raises BadBatch."""
    if len(data) > MAX_BYTES:
        raise BadBatch(f"longer than {MAX_BYTES} bytes")
    try:
        envelope = _envelopes.decode(data)
        if envelope.version != VERSION:
            raise BadBatch(f"version {envelope.version}, this router understands {VERSION}")
        return checked(_batches.decode(envelope.batch))
    except msgspec.MsgspecError as error:
        raise BadBatch(str(error)) from None
    except (RecursionError, UnicodeDecodeError) as error:
        raise BadBatch(type(error).__name__) from None


def checked(batch: Batch) -> Batch:
    """The batch, if its lists of blocks are whole and not too long. Raises BadBatch."""
    lengths = [len(blocks) for _, blocks in (*batch.placed, *batch.withdrawn)]
    if any(length % 8 for length in lengths):
        raise BadBatch("blocks are not a multiple of 8 bytes")
    if sum(lengths) > 16 * MAX_HASHES:
        raise BadBatch(f"more than {2 * MAX_HASHES} blocks")
    return batch


def announced(adapters: Mapping[str, int]) -> dict[str, int]:
    """The adapters that fit into a ServerLevel."""
    short = {name: count for name, count in adapters.items() if len(name) <= LONGEST_ADAPTER}
    return dict(islice(short.items(), MAX_ADAPTERS))


def pack_blocks(hashes: Sequence[int]) -> bytes:
    """Block hashes as 8 bytes each, little-endian."""
    return struct.pack(f"<{len(hashes)}Q", *hashes)


def unpack_blocks(blocks: bytes) -> tuple[int, ...]:
    """The inverse of `pack_blocks`."""
    return struct.unpack(f"<{len(blocks) // 8}Q", blocks)
