"""The affinity of keys and servers, on which routers of different versions agree."""

from __future__ import annotations

import pytest

from vllm_router.routing.hashing import draw, seed_of


@pytest.mark.parametrize(
    ("key", "number"),
    [
        (0, 0.06069355973195488),
        (1, 0.45827952132518257),
        (0xDEADBEEF12345678, 0.03138103513480593),
        (2**64 - 1, 0.9717914670357884),
    ],
)
def test_draw_of_a_key_and_a_server_never_changes(key: int, number: float):
    seed = seed_of("http://a.test:1")
    assert seed == 5819378624877764908
    assert draw(key, seed) == number


def test_draw_of_all_keys_is_uniform():
    drawn = sorted(draw(key, seed_of("http://a.test:1")) for key in range(1000))
    assert drawn[0] > 0
    assert drawn[-1] <= 1
    assert all(abs(number - place / 1000) < 0.05 for place, number in enumerate(drawn))
