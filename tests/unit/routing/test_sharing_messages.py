"""Batches of routers: encoding, and what happens to bytes that are none."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_router.fleet.engine_metrics import LONGEST_ADAPTER, MAX_ADAPTERS, EngineMetrics
from vllm_router.routing.adapters import summed_requests
from vllm_router.routing.sharing import messages
from vllm_router.routing.sharing.messages import (
    MAX_BYTES,
    MAX_HASHES,
    About,
    BadBatch,
    Batch,
    Figures,
    KeyUse,
    ServerLevel,
    announced,
    decode,
    encode,
    pack_blocks,
    unpack_blocks,
)

ABOUT = About("gateway-1", "1.0", "c0ffee", 12.5, 7)
FULL = Batch(
    "r1",
    3,
    ABOUT,
    servers={"http://a:1": ServerLevel(1200.0, 4)},
    placed=[("http://a:1", pack_blocks([1, 2**64 - 1]))],
    withdrawn=[("http://b:1", pack_blocks([7]))],
    keys={"team": KeyUse(10, 2, 1)},
    ejected=["http://b:1"],
    quarantined=[bytes(16)],
    owners=[(bytes(16), "http://a:1", "team")],
    figures={"http://a:1": Figures(0.1, 7, 8, 3.0, 1.0, 0.5, adapters=("x", "y"))},
)

FIGURES = [0.1, 7, 8, 3.0, *[None] * 10, False, None, None]
"""Encoded figures without the adapters, the last field."""


def changed(**fields: object) -> bytes:
    """The batch with other fields, as a sender without checks would encode it."""
    plain = msgspec.to_builtins(FULL, builtin_types=(bytes,))
    names = Batch.__struct_fields__
    for name, value in fields.items():
        plain[names.index(name)] = value
    return msgspec.msgpack.encode([messages.VERSION, plain])


def test_batch_survives_encoding():
    assert decode(encode(FULL)) == FULL
    assert unpack_blocks(FULL.placed[0][1]) == (1, 2**64 - 1)
    assert decode(encode(Batch("r", 1, ABOUT))) == Batch("r", 1, ABOUT)


def test_batch_of_newer_version_with_appended_field_is_read():
    plain = [*msgspec.to_builtins(FULL, builtin_types=(bytes,)), {"new": 1}]
    assert decode(msgspec.msgpack.encode([messages.VERSION, plain])) == FULL


def test_figures_of_newer_version_with_appended_field_are_read():
    plain = {"http://a:1": [*FIGURES, ["x"], ["y"], {"new": 1}, 5]}
    figures = decode(changed(figures=plain)).figures["http://a:1"]
    assert (figures.adapters, figures.waiting_adapters) == (("x",), ("y",))


def test_levels_of_versions_with_and_without_adapters_are_read():
    plain = {"http://a:1": [7, 2], "http://b:1": [7, 2, {"lora-a": 3}, "new"]}
    levels = decode(changed(servers=plain)).servers
    assert levels["http://a:1"].adapters == {}
    assert levels["http://b:1"].adapters == {"lora-a": 3}


def test_adapters_are_announced_only_if_others_can_read_them():
    many = {f"lora-{number}": 1 for number in range(MAX_ADAPTERS)}
    found = announced({"x" * (LONGEST_ADAPTER + 1): 1, **many, "more": 1})
    assert found == many
    batch = Batch("r", 1, ABOUT, {"http://a:1": ServerLevel(0, 0, found)})
    assert decode(encode(batch)) == batch
    total = summed_requests(many, {"lora-0": 2, "other": 1})
    assert total == {**many, "lora-0": 3}


def test_figures_have_every_field_of_a_scrape():
    names = {field.name for field in dataclasses.fields(EngineMetrics)}
    assert names | {"age", "access", "models"} == set(Figures.__struct_fields__)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x91" * 100_000,
        encode(FULL)[:-1],
        encode(FULL) + b"\0",
        bytes(MAX_BYTES + 1),
        msgspec.msgpack.encode([messages.VERSION + 1, msgspec.to_builtins(FULL)]),
        msgspec.msgpack.encode({"version": 1}),
        changed(router=""),
        changed(router="r" * 65),
        changed(number=-1),
        changed(number=2**63),
        changed(number=1.5),
        changed(about=None),
        changed(about=["n" * 300, "", "", 0.0, 0]),
        changed(about=["n", "", "", math.nan, 0]),
        changed(servers={"http://a:1": [math.nan, 1]}),
        changed(servers={"http://a:1": [math.inf, 1]}),
        changed(servers={"http://a:1": [-1.0, 1]}),
        changed(servers={"": [1.0, 1]}),
        changed(servers={f"http://{n}:1": [1.0, 1] for n in range(5000)}),
        changed(placed=[["http://a:1", b"1234567"]]),
        changed(placed=[["http://a:1", "12345678"]]),
        changed(placed=[["http://a:1", bytes(8 * MAX_HASHES)] for _ in range(3)]),
        changed(placed=[["u" * 3000, bytes(8)]]),
        changed(withdrawn=[["http://a:1", b"1"]]),
        changed(keys={"team": [-1, 0, 0]}),
        changed(ejected=[7]),
        changed(quarantined=[b"short"]),
        changed(owners=[[bytes(16), "http://a:1"]]),
        changed(figures={"http://a:1": [0.1, 7, 8, math.nan]}),
        changed(figures={"http://a:1": [0.1, 7, 8, -1.0]}),
        changed(figures={"http://a:1": [0.1, 7, 8, 1e16]}),
        changed(figures={"http://a:1": [-0.1, 7, 8, 1.0]}),
        changed(figures={"http://a:1": [math.inf, 7, 8, 1.0]}),
        changed(figures={"http://a:1": [0.1, 2**16, 8, 1.0]}),
        changed(figures={"http://a:1": [0.1, 7, -8, 1.0]}),
        changed(figures={"http://a:1": [0.1, 7, 8]}),
        changed(figures={"http://a:1": [0.1, 7, 8, 1.0, math.nan]}),
        changed(figures={"http://a:1": [0.1, 7, 8, 1.0, 1.0, 1.5]}),
        changed(figures={"http://a:1": [0.1, 7, 8, *[1.0] * 10, "asleep"]}),
        changed(figures={"http://a:1": [0.1, 7, 8, *[1.0] * 3, *[None] * 8, False, -1]}),
        changed(figures={"http://a:1": [*FIGURES, ["n"] * 300]}),
        changed(figures={"http://a:1": [*FIGURES, ["n" * 300]]}),
        changed(figures={"": [0.1, 7, 8, 1.0]}),
        changed(figures={f"http://{n}:1": [0.1, 7, 8, 1.0] for n in range(300)}),
    ],
)
def test_decode_bytes_that_are_no_batch_raises_bad_batch(data: bytes):
    with pytest.raises(BadBatch):
        decode(data)


def test_decode_batch_with_as_many_blocks_as_allowed_is_accepted():
    blocks = [["http://a:1", bytes(8 * MAX_HASHES)] for _ in range(2)]
    assert len(decode(changed(placed=blocks, withdrawn=[])).placed) == 2
    with pytest.raises(BadBatch, match="more than"):
        decode(changed(placed=blocks, withdrawn=[["http://a:1", bytes(8)]]))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 60), st.integers(0, 255))
def test_decode_of_damaged_bytes_raises_nothing_else(noise: bytes, place: int, byte: int):
    good = bytearray(encode(FULL))
    good[place] = byte
    for data in (noise, bytes(good)):
        try:
            assert encode(decode(data))
        except BadBatch:
            pass
