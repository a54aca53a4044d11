"""What a process announces to the others: new blocks only, within bounds, nothing twice."""

from __future__ import annotations

from support.fleet_makers import make_fleet
from vllm_router.routing.prompt.blocks import Prompt, hash_blocks
from vllm_router.routing.sharing import outbox as module
from vllm_router.routing.sharing.messages import (
    MAX_BYTES,
    MAX_HASHES,
    About,
    Batch,
    KeyUse,
    ServerLevel,
    decode,
    encode,
    unpack_blocks,
)
from vllm_router.routing.sharing.outbox import MAX_WAITING_HASHES, REPEAT_AFTER, Outbox
from vllm_router.routing.sharing.scrapes import BYTES_PER_BATCH

ABOUT = About("n", "v", "c", 1.0, 0)
A, B = make_fleet(2).servers.values()
BLOCKS = 500


def prompt(size: int, conversation: int = 1) -> Prompt:
    text = bytes(n * n % 251 for n in range(size))
    return Prompt(hash_blocks(text, seed=conversation), size, conversation=conversation)


def many_blocks(conversation: int) -> Prompt:
    """A prompt with BLOCKS blocks, without a text."""
    hashes = tuple(range(conversation * BLOCKS, (conversation + 1) * BLOCKS))
    return Prompt(hashes, BLOCKS * 256, conversation=conversation)


def taken(outbox: Outbox, now: float = 0.0) -> Batch:
    return decode(encode(outbox.batch(ABOUT, {}, {}, now)))


def announced(batch: Batch) -> list[tuple[str, int]]:
    return [(url, len(unpack_blocks(blocks))) for url, blocks in batch.placed]


def test_outbox_announces_all_blocks_once_and_then_new_ones():
    outbox = Outbox("r")
    first, second = prompt(2560), prompt(5120)
    outbox.placed(A, first, 0, 0.0)
    outbox.placed(A, second, len(first.block_hashes), 1.0)
    outbox.placed(A, second, len(second.block_hashes), 2.0)
    assert announced(taken(outbox)) == [(A.url, 10), (A.url, 10)]
    assert taken(outbox).placed == []
    assert not outbox.waiting


def test_outbox_announces_known_blocks_again_after_a_while():
    """Else the others would evict the first blocks of a long conversation as unused."""
    outbox = Outbox("r")
    whole = prompt(2560)
    outbox.placed(A, whole, 0, 0.0)
    taken(outbox)
    outbox.placed(A, whole, 10, REPEAT_AFTER + 1)
    outbox.placed(A, whole, 10, REPEAT_AFTER + 2)
    assert announced(taken(outbox)) == [(A.url, 10)]


def test_outbox_announces_blocks_of_every_server():
    outbox = Outbox("r")
    outbox.placed(A, prompt(2560), 0, 0.0)
    outbox.placed(B, prompt(2560), 0, 0.0)
    assert announced(taken(outbox)) == [(A.url, 10), (B.url, 10)]


def test_outbox_refused_prompt_is_withdrawn():
    outbox = Outbox("r")
    refused, sent = prompt(2560), prompt(2560, conversation=2)
    outbox.placed(A, refused, 0, 0.0)
    outbox.withdrawn(A, refused, 0)
    assert not outbox.waiting  # not sent yet
    outbox.placed(A, sent, 0, 0.0)
    assert taken(outbox).withdrawn == []
    outbox.withdrawn(A, sent, 4)
    batch = taken(outbox)
    assert [(url, unpack_blocks(blocks)) for url, blocks in batch.withdrawn] == [
        (A.url, sent.block_hashes[4:])
    ]


def test_outbox_withdraws_nothing_of_a_prompt_that_the_server_had():
    outbox = Outbox("r")
    known = prompt(2560)
    outbox.withdrawn(A, known, len(known.block_hashes))
    assert taken(outbox).withdrawn == []


def test_outbox_splits_many_blocks_into_batches_and_drops_the_oldest():
    outbox = Outbox("r")
    for conversation in range(1, 2 * MAX_WAITING_HASHES // BLOCKS):
        outbox.placed(A, many_blocks(conversation), 0, 0.0)
    assert outbox.dropped > 0
    total = 0
    while outbox.waiting:
        batch = taken(outbox)
        assert batch.placed
        count = sum(count for _, count in announced(batch))
        assert count <= MAX_HASHES
        total += count
    assert MAX_WAITING_HASHES - BLOCKS <= total <= MAX_WAITING_HASHES


def test_outbox_fullest_batch_can_be_decoded():
    outbox = Outbox("r")
    for conversation in range(1, 100):
        outbox.placed(A, many_blocks(conversation), 0, 0.0)
    for number in range(5000):
        outbox.ejected(f"http://server-{number}.example:8000")
        outbox.quarantined(number.to_bytes(16, "big"))
        outbox.owner((number.to_bytes(16, "big"), "http://server.example:8000", "team"))
    names = {f"{number:0>10}": 5 for number in range(256)}
    levels = {f"http://server-{n}.example:8000": ServerLevel(1e6, 5, names) for n in range(1000)}
    keys = {f"team-{n}": (10**6, 10) for n in range(1000)}
    data = encode(outbox.batch(ABOUT, levels, keys, 0.0))
    assert len(data) <= MAX_BYTES - BYTES_PER_BATCH  # of figures
    assert len(decode(data).servers) == 1000


def test_outbox_adapters_of_many_servers_fit_into_a_batch():
    """Of the others routers know what the servers' metrics say."""
    names = {f"{number:0>100}": 1 for number in range(10)}
    levels = {f"http://s{number}.test:1": ServerLevel(5, 1, names) for number in range(1000)}
    batch = decode(encode(Outbox("r").batch(ABOUT, levels, {}, 0.0)))
    assert {(level.queued, level.in_flight) for level in batch.servers.values()} == {(5, 1)}
    sent = [level.adapters for level in batch.servers.values() if level.adapters]
    assert sent == [names] * 15


def test_outbox_remembers_bounded_number_of_conversations(monkeypatch):
    monkeypatch.setattr(module, "MAX_CONVERSATIONS", 10)
    outbox = Outbox("r")
    for conversation in range(1, 1000):
        outbox.placed(A, prompt(512, conversation), 0, 0.0)
        taken(outbox)
    assert len(outbox._announced_at) + len(outbox._announced_before) <= 20


def test_outbox_key_use_is_total_with_recent_part():
    outbox = Outbox("r")
    use = [
        outbox.batch(ABOUT, {}, {"team": counts}, now).keys
        for counts, now in [((5, 1), 0.0), ((5, 1), 0.2), ((9, 2), 0.4), ((20, 0), 60.0)]
    ]
    assert outbox.batch(ABOUT, {}, {"team": (20, 0)}, 60.2).keys == {}
    assert use == [
        {"team": KeyUse(5, 0, 1)},
        {"team": KeyUse(5, 0, 1)},
        {"team": KeyUse(9, 4, 2)},
        {"team": KeyUse(20, 0, 0, unheard=11)},
    ]


def test_outbox_batch_after_an_interruption_has_its_length():
    outbox = Outbox("r")
    found = [outbox.batch(ABOUT, {}, {}, now).interrupted for now in (5.0, 6.0, 60.0, 60.2)]
    assert found == [0.0, 0.0, 54.0, 0.0]


def test_outbox_passes_on_batches_of_workers():
    worker, leader = Outbox("w"), Outbox("l")
    worker.placed(A, prompt(2560), 0, 0.0)
    worker.quarantined(bytes(16))
    leader.pass_on(taken(worker))
    batch = taken(leader)
    assert announced(batch) == [(A.url, 10)]
    assert batch.quarantined == [bytes(16)]
    assert (batch.router, batch.number) == ("l", 1)
