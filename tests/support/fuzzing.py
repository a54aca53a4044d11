"""How hard the tests with generated input look.

By default every run tries the same examples, so that it fails only for what a change has broken.
`FUZZ_EXAMPLES=100000 ./scripts/test -k 'fuzz or h11'` tries so many others.
"""

from __future__ import annotations

import os

import hypothesis

CHOSEN = os.environ.get("FUZZ_EXAMPLES")
EXAMPLES = int(CHOSEN or "1000")
"""Examples of the cheapest test; the others take a share of it."""

# A busy machine is no failure.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=CHOSEN is None)
hypothesis.settings.load_profile("suite")
