"""Keys of clients with limits, and what is refused to them."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_router.config.auth import KeyConfig
from vllm_router.config.types import digest_of
from vllm_router.errors import Refused
from vllm_router.proxy.key_limits import KeyLimits


def key(**limits: Any) -> KeyConfig:
    return KeyConfig(name="a", digest=digest_of("k"), **limits)


def refusal(usage: KeyLimits, of: KeyConfig, now: float) -> Refused:
    with pytest.raises(Refused) as caught:
        usage.enter(of, now)
    return caught.value
