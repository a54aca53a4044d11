"""The control plane as a Quart application: all paths except inference.

Here are the paths that answer with JSON; `dashboard` and `feed_socket` add the page and its feed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import msgspec
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.routing import BaseConverter

from vllm_router import __version__
from vllm_router.errors import Refused
from vllm_router.http.asgi_types import App
from vllm_router.http.request_ids import request_id
from vllm_router.observability import prometheus_text as exposition
from vllm_router.observability.decisions import decision_row
from vllm_router.observability.metrics import Metrics
from vllm_router.observability.router_state import wall_offset
from vllm_router.observability.slices import each, in_turns, of_one_fleet
from vllm_router.proxy.refusal import names_shown
from vllm_router.routing.paths import PathClass, classify
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.steps import Steps
from vllm_router.web import admin, answers, status
from vllm_router.web.dashboard import add_dashboard
from vllm_router.web.engine_control import control
from vllm_router.web.explain import explain, policy_of, routing_info_of
from vllm_router.web.feed_socket import FeedRouter, add_feed
from vllm_router.web.guard import identity_of, visible
from vllm_router.web.openapi import document
from vllm_router.web.router import Router
from vllm_router.web.sessions import CODE_SECONDS, SESSION_SECONDS

MAX_BODY = 1024 * 1024
"""Largest request body of the control plane in bytes."""

BODY_TIMEOUT = 10.0
SHOWN_DECISIONS = 100
"""Default of `limit` for decisions."""

MAX_DIGITS = 9
"""Digits of `limit`: enough for all decisions."""

ONLY_FAILED = {"0": False, "1": True, "false": False, "true": True}
"""Values of `failed` for decisions."""


class Wired(FeedRouter, Protocol):
    """A router with its recorders: the supervisor."""

    metrics: Metrics


class _SignIn(msgspec.Struct):
    """The body of the page's sign-in: the code from its URL."""

    code: str


class AnyName(BaseConverter):
    """A server or model name in a path, with any characters: `gpu-1:8081/prefix`."""

    regex = ".+?"
    part_isolating = False


class ServerName(AnyName):
    """A server name that is followed by an action."""

    regex = r".+?(?<!/drain)(?<!/undrain)"


def make_app(router: Wired) -> App:
    """The application of one router. Sets `router` of its metrics and its feed."""
    router.metrics.router = router.feed.router = router
    app = QuartTrio(__name__, static_folder=None, template_folder=None)
    app.config["RESPONSE_TIMEOUT"] = None
    app.config["BODY_TIMEOUT"] = BODY_TIMEOUT
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.url_map.merge_slashes = False
    app.url_map.redirect_defaults = False
    app.url_map.converters["name"] = AnyName
    app.url_map.converters["server"] = ServerName
    answers.install_errors(app)
    app.after_request(_with_request_id)
    _openai(app, router)
    _observation(app, router)
    add_dashboard(app, router)
    add_feed(app, router)
    _administration(app, router)
    _engine_control(app, router)
    return cast("App", app)


# -- OpenAI's own -----------------------------------------------------------------------------


async def _with_request_id(response: Response) -> Response:
    """Add the request id to every response, not only for inference.

    Without a wait, yet `async`: Quart runs other functions in a thread, for each response.
    """
    if "x-request-id" not in response.headers:
        given = request.headers.get("x-request-id", "")
        response.headers["x-request-id"] = request_id(given.encode("latin-1")).decode()
    return response


def _openai(app: QuartTrio, router: Wired) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        cards = _cards(router)
        if not cards and not router.fleet.probed:
            raise Refused(
                503,
                "starting",
                "No server has reported its models yet. Try again in a moment.",
                retry_after=1.0,
            )
        return answers.json({"object": "list", "data": cards})

    @app.get("/v1/models/<name:model>")
    async def model(model: str) -> Response:
        cards = _cards(router)
        for card in cards:
            if card["id"] == model:
                return answers.json(card)
        known = names_shown([card["id"] for card in cards])
        raise Refused(
            404,
            "model_not_found",
            f"The model {model!r} does not exist. Available models: {known}.",
            param="model",
        )


def _cards(router: Wired) -> list[dict[str, Any]]:
    """The models that the client may use."""
    return visible(router.fleet.model_cards(), identity_of(answers.scope()).key)


# -- observation ------------------------------------------------------------------------------


async def _of_fleet(router: Wired, page: Callable[[Router], Steps[Any]]) -> Response:
    """A JSON page that is made in slices."""
    return answers.json(await of_one_fleet(router.fleet, lambda: page(router)))


def _observation(app: QuartTrio, router: Wired) -> None:
    @app.get("/health")
    async def health() -> Response:
        if not answers.may_read():
            return answers.json(status.health_in_short(router))
        return await _of_fleet(router, status.health)

    @app.get("/load-stats")
    async def load_stats() -> Response:
        return await _of_fleet(router, status.load_stats)

    @app.get("/load")
    async def server_load() -> Response:
        return answers.json(status.server_load(router))

    @app.get("/server-models")
    async def server_models() -> Response:
        return await _of_fleet(router, status.server_models)

    @app.get("/livez")
    async def livez() -> Response:
        return answers.json({"alive": True})

    @app.get("/readyz")
    async def readyz() -> Response:
        ready, body = status.readiness(router)
        if not answers.may_read():
            body.pop("servers", None)
        return answers.json(body, 200 if ready else 503)

    @app.get("/version")
    async def version() -> Response:
        return answers.json({"version": __version__, "service": "vLLM Router"})

    @app.route("/ping", methods=["GET", "POST"])
    async def ping() -> Response:
        return Response(b"", 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        page = await router.metrics.page()
        return Response(page, content_type=exposition.CONTENT_TYPE)

    @app.get("/explain")
    async def explain_model() -> Response:
        info = RoutingInfo(request.args.get("model") or None)
        policy = policy_of(router, answers.fields())
        return answers.json(await in_turns(explain(router, info, policy)))

    @app.post("/explain")
    async def explain_body() -> Response:
        fields = answers.fields()
        policy = policy_of(router, fields)
        info = await routing_info_of(router, fields, await answers.body(), policy)
        return answers.json(await in_turns(explain(router, info, policy)))

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return answers.json(document())

    @app.get("/decisions")
    async def decisions() -> Response:
        limit, only_failed = _choice_of_decisions()
        records = router.feed.decisions.newest(
            limit, request.args.get("server"), only_failed=only_failed
        )
        wall = wall_offset()
        rows = each(records, lambda one: status.encoded(decision_row(one, wall)))
        return answers.json({"decisions": await in_turns(rows)})


def _choice_of_decisions() -> tuple[int, bool]:
    """The number of decisions, and whether only failed ones. Raises Refused."""
    limit = request.args.get("limit", str(SHOWN_DECISIONS))
    if not (limit.isascii() and limit.isdigit()):
        raise Refused(400, "bad_request", "limit: expected a number, 0 or more.", param="limit")
    only_failed = ONLY_FAILED.get(request.args.get("failed", "0"))
    if only_failed is None:
        raise Refused(400, "bad_request", "failed: expected 1 or 0.", param="failed")
    return int(limit[:MAX_DIGITS]), only_failed


# -- administration ---------------------------------------------------------------------------


def _administration(app: QuartTrio, router: Wired) -> None:
    @app.get("/admin/servers")
    async def servers() -> Response:
        answers.check_administrator(router)
        return await _of_fleet(router, admin.servers_view)

    @app.post("/admin/servers/<name:server>/drain")
    async def drain(server: str) -> Response:
        answers.check_administrator(router)
        return answers.json(admin.drain(router, server, on=True))

    @app.post("/admin/servers/<name:server>/undrain")
    async def undrain(server: str) -> Response:
        answers.check_administrator(router)
        return answers.json(admin.drain(router, server, on=False))

    @app.get("/admin/keys")
    async def keys() -> Response:
        answers.check_administrator(router)
        totals = router.metrics.key_totals()
        return answers.json(admin.keys_view(router.feed.key_usage.recent(totals)))

    @app.get("/admin/servers/<server:server>")
    async def one(server: str) -> Response:
        answers.check_administrator(router)
        return answers.json(admin.server_view(admin.find(router, server), router))

    @app.post("/admin/sign-in")
    async def new_code() -> Response:
        answers.check_administrator(router)
        return answers.json({"code": router.sessions.new_code(), "seconds": CODE_SECONDS})

    @app.post("/sign-in")
    async def sign_in() -> Response:
        try:
            code = msgspec.json.decode(await answers.body(), type=_SignIn).code
        except (msgspec.DecodeError, RecursionError) as error:
            raise Refused(400, "bad_request", f"sign-in: {error}") from None
        key = router.sessions.exchange(code)
        if key is None:
            raise Refused(
                403,
                "sign_in_expired",
                "This sign-in link is used or expired. Run vllm-router open for a new one.",
            )
        return answers.json({"key": key, "seconds": SESSION_SECONDS})

    @app.post("/admin/reload")
    async def reload() -> Response:
        answers.check_administrator(router)
        return answers.json(await admin.reload(router))


def _engine_control(app: QuartTrio, router: Wired) -> None:
    @app.before_request
    async def forward() -> Response | None:
        scope = answers.scope()
        method, path = scope["method"], scope["path"]
        if classify(method, scope.get("raw_path") or b"") is not PathClass.ENGINE_CONTROL:
            return None
        if not router.config.settings.allow_engine_control:
            raise Refused(
                403,
                "engine_control_closed",
                "Engine control is disabled: set allow_engine_control = true to enable it.",
            )
        answers.check_administrator(router)
        code, results = await control(
            router, method, path, scope["query_string"], answers.fields(), await answers.body()
        )
        return answers.json(results, code)
