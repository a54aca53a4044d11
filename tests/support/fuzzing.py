"""Effort of the tests with generated input.

By default every run tries the same examples, so that only a change of the code can make it fail.
`FUZZ_EXAMPLES=100000 ./scripts/test -k 'fuzz or h11'` tries that many others.
"""

from __future__ import annotations

import os

import hypothesis
import hypothesis.strategies

CHOSEN = os.environ.get("FUZZ_EXAMPLES")
EXAMPLES = int(CHOSEN or "1000")
"""Examples of the cheapest test; the others take a share of it."""

# A busy machine must not fail a test.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=CHOSEN is None)
hypothesis.settings.load_profile("suite")


@hypothesis.settings(max_examples=1, database=None)
@hypothesis.given(hypothesis.strategies.none())
def start_hypothesis(_: None) -> None:
    """Let Hypothesis make its random generator, which it does in the first test of a process.

    It asks the garbage collector for an object that refers to the generator, and warns if there is
    none. On Python 3.14, the object is not found after `gc.freeze()`.
    """
