"""Signs in one event of a stream, or in one plain answer, about the attempt."""

from __future__ import annotations

OPENS = 0
"""Nothing yet: the server has accepted the request, the engine may not have seen it."""
PROVES = 1
"""Output: a token, reasoning, a tool call, or a count of generated tokens above zero."""
FINISHES = 2
"""The engine has finished and gives a reason (`stop`, `length`, …)."""
ENDS = 4
"""The stream's end marker: no event follows that matters."""
ABORTS = 8
"""The engine gave the request up (`finish_reason: "abort"` and its forms in other APIs)."""
FAILS = 16
"""An error is reported; `faults.fault_of` finds the party at fault."""
UNKNOWN = 32
"""Not readable by the table: passed on unjudged."""

Signs = int
"""Any of the above, combined with `|`."""
