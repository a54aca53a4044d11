"""Applies a worker's reports in the leader, as if its attempts had been made here."""

from __future__ import annotations

import trio

from vllm_router.fleet.server import Server
from vllm_router.observability.metrics import Metrics
from vllm_router.proxy.handler import Proxy
from vllm_router.proxy.retry import Outcome
from vllm_router.runtime.workers.fleet import LeadingFleet
from vllm_router.runtime.workers.messages import Report, Verdict
from vllm_router.runtime.workers.reporter import unpack
from vllm_router.web.feed import Feed


class ReportReader:
    """Updates the fleet and the recorders of the leader's supervisor."""

    def __init__(self, fleet: LeadingFleet, proxy: Proxy, metrics: Metrics, feed: Feed) -> None:
        self._fleet = fleet
        self._proxy = proxy
        self._metrics = metrics
        self._feed = feed

    async def apply(self, report: Report) -> None:
        fleet = self._fleet
        for verdict in report.verdicts:
            server = fleet.by_url(verdict.url)
            if server is not None:
                self._judge(server, verdict)
        if report.verdicts:
            fleet.settle(trio.current_time())
        for url, outcome in report.attempts:
            server = fleet.by_url(url)
            if server is not None:
                server.served += 1
                self._proxy.context.recorder.attempt_ended(server, Outcome(outcome))
        for ended in report.ended:
            record = unpack(ended, fleet)
            self._metrics.exchange_ended(record)
            self._feed.exchange_ended(record)
        for code in report.refusals:
            self._metrics.refused(code)
        await trio.lowlevel.checkpoint()

    def _judge(self, server: Server, verdict: Verdict) -> None:
        """Call the method of Server or Fleet that the worker would have called on its own."""
        now, jitter, body = verdict.at, verdict.jitter, verdict.body
        match verdict.what:
            case "answered":
                server.answered(now, trial=verdict.trial)
            case "failed":
                self._fleet.failed(
                    server, now, trial=verdict.trial, jitter=jitter, body=body, odd=verdict.odd
                )
            case "answered_elsewhere" if body is not None:
                self._fleet.answered_elsewhere(server, now, jitter=jitter, body=body)
            case "refused":
                server.refused(now, verdict.retry_after)
            case "timed_out":
                self._fleet.timed_out(
                    server,
                    now,
                    verdict.since,
                    trial=verdict.trial,
                    jitter=jitter,
                    stream=verdict.sure,
                )
            case "request_starved":
                self._fleet.request_starved(server, now, verdict.since)
            case "accepted_elsewhere" if body is not None:
                self._fleet.accepted_elsewhere(
                    server,
                    verdict.name,
                    verdict.size,
                    verdict.words,
                    now,
                    body=body,
                    sure=verdict.sure,
                )
            case "refused_again":
                self._fleet.refused_again(server, verdict.name, now)
            case "accepted" if verdict.asked is not None:
                self._fleet.accepted(server, verdict.asked)
            case "unlist":
                self._fleet.unlist(server, verdict.name)
