"""Which targets of a set are used, by their priorities. Pure.

RFC 2782: clients use the servers with the lowest priority number that can be reached.
"""

from __future__ import annotations

import msgspec

from vllm_router.config.discovery import Targets, TargetState
from vllm_router.discovery.intake import Answers


def used_priority(targets: Targets, answers: Answers) -> int:
    """The highest priority number in use: the first with a server that does not fail its checks.

    Servers that have not been checked yet count as reachable. If all servers fail, all are used.
    """
    priorities = sorted({one.priority for one in targets if one.state is TargetState.UP})
    for priority in priorities:
        if any(
            answers(one.url) is not False
            for one in targets
            if one.priority == priority and one.state is TargetState.UP
        ):
            return priority
    return priorities[-1] if priorities else 0


def up_to(targets: Targets, priority: int, unused: TargetState) -> Targets:
    """The set with the state `unused` for servers with a higher priority number.

    Servers with a lower number stay, although they fail, so that their checks go on.
    """
    return tuple(
        [
            msgspec.structs.replace(one, state=unused)
            if one.state is TargetState.UP and one.priority > priority
            else one
            for one in targets
        ]
    )
