"""The reason of a server's state, or of a decision: a code with values. Pure.

Displays translate the code. The English text, for logs and JSON, is here alone.
"""

from __future__ import annotations

import msgspec

TEXTS = {
    "not_probed": "not probed yet",
    "draining": "draining, {n} in flight",
    "asleep": "the engine sleeps",
    "paused": "its engine was paused through the router: POST /resume",
    "full": "it refused a request as too busy",
    # Failed checks; `Reason.in_row` adds their number.
    "check_status": "{path} answered {status}",
    "no_answer": "no answer to {path} in {seconds} s",
    "no_connection": "no connection in {seconds} s",
    "no_handshake": "no TLS handshake in {seconds} s",
    "no_name": "no answer of the resolver for {host} in {seconds} s",
    "connection_refused": "Connection refused",
    "check_failed": "{detail}",
    "damped": "went down {n} times: back after {seconds} s of good checks",
    "few_good_checks": "only {share} of the last {n} checks were good",
    "slow_checks": "checks take {seconds} s on average",
    # Ejections and silence.
    "trial_failed": "its trial request failed",
    "failed_in_row": "{n} requests in a row failed",
    "outlier": "only {share} of its last {n} requests succeeded, {other} elsewhere",
    "starved": "a request waited {seconds} s without a byte, and no other had a token",
    "no_response": "no response in {seconds} s, nor to any other request",
    "no_token": "no token for {seconds} s while {n} requests wait on it",
    "stands_still": "its load stands still at {n}",
    # Refusals, `words` are the server's.
    "refuses_path": "refuses {path}, which other servers accept: {words}",
    "refuses_model": "refuses model {model}, which other servers accept: {words}",
    "refuses_long_path": (
        "refuses {path} with {bytes} bytes or more, which other servers accept: {words}"
    ),
    "refuses_long_model": (
        "refuses model {model} with {bytes} bytes or more, which other servers accept: {words}"
    ),
    "more_refusals": "and {n} more",
    # Explanations: why a request would not go to a server.
    "other_owner": "does not have the response that the request continues",
    "not_listed": "does not list the model",
    "list_unread": "model list could not be read, and another server lists the model",
    "at_max_in_flight": "at max_in_flight: {n} of {most} in flight",
    "trial_in": "a trial in {seconds} s",
    "trial_runs": "a trial is under way",
    "trial_due": "a trial is due",
    "tried_in": "tried again in {seconds} s",
    "tried_now": "tried again now",
    # Explanations: notes on the whole decision.
    "owner_known": "{server} has the response that it continues: no other server is used.",
    "owner_unknown": (
        "It continues a response whose server is not known: all servers would be asked for it, "
        "and the one that has it used."
    ),
    "all_ejected": "Every server of the model is ejected; they are tried anyway.",
    "all_full": "Every server of the model has just refused a request as too busy.",
    "lists_unread": "No available server lists the model; some model lists could not be read.",
    "refuser_avoided": "Such requests go elsewhere than to {server}",
    "equal_servers": "{n} servers are equal: any of them may be picked.",
    "model_unknown": "No server lists the model {model}.",
    "capped_refused": "All servers of the model are at max_in_flight: the request would get a 429.",
    "capped_waits": (
        "All servers of the model are at max_in_flight: the request would wait, {n} ahead of it."
    ),
    "none_refused": "No server is available: the request would get a 503.",
    "none_waits": "No server is available: the request would wait, {n} ahead of it.",
}
"""The English text of each code. The page has the same codes in other languages."""

IN_ROW = "{text} ({n} checks in a row)"


class Reason(msgspec.Struct, frozen=True, array_like=True):
    """Why a server is in its state, or why a decision is so; false if there is no reason.

    values: the values in the text by name, as shown. `in_row` is not in the text of the code: it
        is the number of failed checks in a row.
    also: further reasons, which follow it in the text.
    """

    code: str = ""
    values: dict[str, str] = {}
    also: tuple[Reason, ...] = ()

    def __bool__(self) -> bool:
        return self.code != ""

    @property
    def text(self) -> str:
        """The reason in English."""
        if not self:
            return ""
        text = TEXTS[self.code].format_map(self.values)
        if in_row := self.values.get("in_row"):
            text = IN_ROW.format(text=text, n=in_row)
        return "; ".join([text, *(other.text for other in self.also)])

    def in_row(self, checks: int) -> Reason:
        """The reason of so many failed checks in a row."""
        return Reason(self.code, {**self.values, "in_row": str(checks)})

    def and_also(self, other: Reason) -> Reason:
        """Both reasons, this one first."""
        return Reason(self.code, self.values, (*self.also, other))


NONE = Reason()


def because(code: str, **values: object) -> Reason:
    """The reason with this code. `values` are shown as `str` writes them."""
    return Reason(code, {name: str(value) for name, value in values.items()})
