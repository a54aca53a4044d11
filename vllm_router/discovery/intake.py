"""Whether to believe a set of targets: a broken source must not empty the fleet. Pure.

Time is an argument, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_router.config.discovery import Target, Targets, TargetState

Answers = Callable[[str], bool | None]
"""Whether the checks of the server at a URL are good; None before the first one."""


class Intake:
    """The targets of one source that are in force.

    A set that lacks more than half of the servers in force is *doubtful*: its new targets are added
    at once, but the missing ones stay until the source has said the same for `second_look` seconds,
    or `keep_for` if the set is empty. Servers that fail their checks are not missed, so a set that
    the checks agree with is applied at once. Nor are targets that the source itself drains.

    targets: the set in force; None before the first one.
    offered: the last set of the source.
    doubt: why missing targets are kept, in words; empty if none are.
    doubt_values: how many are `named` and how many `kept`, for translations; empty if none are.
    """

    def __init__(self, targets: Targets | None, keep_for: float, second_look: float) -> None:
        self.targets = targets
        self.offered: Targets | None = targets
        self.doubt = ""
        self.doubt_values: dict[str, str] = {}
        self.keep_for = keep_for
        self.second_look = second_look
        self._doubted_since: float | None = None

    @property
    def look_due(self) -> float | None:
        """When the source should be asked again, because its set is doubtful; None if never."""
        if self._doubted_since is None:
            return None
        return self._doubted_since + self._patience()

    def offer(self, targets: Targets, now: float, answers: Answers) -> bool:
        """A complete set from the source; returns whether the targets in force have changed."""
        self.offered = targets
        due = self.look_due
        return self._take(targets, now, answers, sure=due is not None and now >= due)

    def reconsider(self, now: float, answers: Answers) -> bool:
        """The same for the last set: the checks may agree with it by now."""
        if self._doubted_since is None or self.offered is None:
            return False
        return self._take(self.offered, now, answers, sure=False)

    def _patience(self) -> float:
        return self.second_look if self.offered else self.keep_for

    def _take(self, targets: Targets, now: float, answers: Answers, *, sure: bool) -> bool:
        before = self.targets
        missing = () if sure else self._missed(targets, answers)
        if missing:
            if self._doubted_since is None:
                self._doubted_since = now
            said = f"it names {_count(targets)}" if targets else "its set is empty"
            self.doubt = f"{said}, but {len(missing)} that it left out still answer their checks"
            self.doubt_values = {"named": str(_up(targets)), "kept": str(len(missing))}
        else:
            self._doubted_since = None
            self.doubt, self.doubt_values = "", {}
        kept = {target.url: target for target in missing}
        merged = [kept.pop(target.url, target) for target in targets]
        self.targets = tuple(sorted([*merged, *kept.values()], key=lambda target: target.url))
        return self.targets != before

    def _missed(self, targets: Targets, answers: Answers) -> tuple[Target, ...]:
        """The targets in force that a doubtful set lacks; none if the set is not doubtful."""
        active = [target for target in self.targets or () if target.state is TargetState.UP]
        said = {target.url: target.state for target in targets}
        gone = [one for one in active if said.get(one.url, TargetState.WAIT) is TargetState.WAIT]
        missed = tuple([target for target in gone if answers(target.url)])
        tolerated = len(active) // 2 if targets else 0
        return missed if len(missed) > tolerated else ()


def _count(targets: Targets) -> str:
    up = _up(targets)
    return f"{up} server{'s' if up != 1 else ''}"


def _up(targets: Targets) -> int:
    return sum(target.state is TargetState.UP for target in targets)
