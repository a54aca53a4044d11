"""The control plane as a Quart application: all paths except inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import msgspec
import trio
from quart import Response, request, websocket
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
from vllm_router.proxy.identity import FEED_PROTOCOL
from vllm_router.proxy.refusal import names_shown
from vllm_router.routing.paths import PathClass, classify
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.steps import Steps
from vllm_router.web import admin, answers, status
from vllm_router.web.access import check_admin
from vllm_router.web.engine_control import control
from vllm_router.web.explain import explain, facts_of, policy_of
from vllm_router.web.feed import Feed
from vllm_router.web.guard import FEED_PATH, MAY_READ, identity_of, visible
from vllm_router.web.openapi import document
from vllm_router.web.pages import FOREVER, SECURITY_HEADERS, VERSION_FOLDER, Page, Pages
from vllm_router.web.router import Router
from vllm_router.web.sessions import CODE_SECONDS, SESSION_SECONDS

MAX_BODY = 1024 * 1024
"""Largest request body of the control plane in bytes."""

BODY_TIMEOUT = 10.0
FEED_STALL_TIMEOUT = 20.0
"""Seconds for a client of the feed to take a message before it is disconnected."""

SHOWN_DECISIONS = 100
"""Default of `limit` for decisions."""

MAX_DIGITS = 9
"""Digits of `limit`: enough for all decisions."""

ONLY_FAILED = {"0": False, "1": True, "false": False, "true": True}
"""Values of `failed` for decisions."""


class Wired(Router, Protocol):
    """A router with its recorders: the supervisor."""

    metrics: Metrics
    feed: Feed


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
    _dashboard(app, router)
    _feed(app, router)
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


def _may_read() -> bool:
    """True if a public path may include data for authorized clients."""
    return bool(answers.scope().get(MAY_READ, True))


async def _of_fleet(router: Wired, page: Callable[[Router], Steps[Any]]) -> Response:
    """A JSON page that is made in slices."""
    return answers.json(await of_one_fleet(router.fleet, lambda: page(router)))


def _observation(app: QuartTrio, router: Wired) -> None:
    @app.get("/health")
    async def health() -> Response:
        if not _may_read():
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
        if not _may_read():
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
        facts = RoutingInfo(request.args.get("model") or None)
        policy = policy_of(router, answers.fields())
        return answers.json(await in_turns(explain(router, facts, policy)))

    @app.post("/explain")
    async def explain_body() -> Response:
        fields = answers.fields()
        policy = policy_of(router, fields)
        facts = await facts_of(router, fields, await answers.body(), policy)
        return answers.json(await in_turns(explain(router, facts, policy)))

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


# -- the dashboard ----------------------------------------------------------------------------


def _dashboard(app: QuartTrio, router: Wired) -> None:
    pages = Pages()

    @app.get("/")
    async def root() -> Response:
        page = pages.index() if "text/html" in answers.fields().get("accept", "") else None
        if page is not None:
            response = _page(page)
        else:
            running = "draining" if router.draining else "running"
            named = {"version": __version__} if _may_read() else {}
            response = answers.json({"service": "vLLM Router", **named, "status": running})
        response.headers["vary"] = "accept, accept-encoding"
        return response

    @app.get("/static/<name:path>")
    async def static(path: str) -> Response:
        lasting = path.startswith(f"{pages.version}/")
        # A page that was loaded before an update asks by the old version.
        page = pages.get(VERSION_FOLDER.sub("", path))
        if page is None:
            raise Refused(404, "not_found", f"There is nothing at /static/{path}.")
        return _page(page, lasting=lasting)


def _page(page: Page, *, lasting: bool = False) -> Response:
    """`lasting`: its address changes with its content, so that it may be kept for ever."""
    fresh = page.etag in answers.fields().get("if-none-match", "")
    packed = page.packed if _takes_gzip(answers.fields().get("accept-encoding", "")) else None
    body = page.body if packed is None else packed
    response = Response(
        b"" if fresh else body, 304 if fresh else 200, content_type=page.content_type
    )
    response.headers.update(SECURITY_HEADERS)
    response.headers["etag"] = page.etag
    response.headers["cache-control"] = FOREVER if lasting else "no-cache"
    response.headers["vary"] = "accept-encoding"
    if packed is not None and not fresh:
        response.headers["content-encoding"] = "gzip"
    return response


def _takes_gzip(accepted: str) -> bool:
    """Whether `accept-encoding` names gzip, and not only to exclude it (RFC 9110, 12.5.3)."""
    for coding in accepted.lower().split(","):
        name, _, quality = coding.partition(";")
        if name.strip() == "gzip":
            return quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


# -- the feed ---------------------------------------------------------------------------------


def _feed(app: QuartTrio, router: Wired) -> None:
    @app.websocket(FEED_PATH)
    async def load() -> None:
        if FEED_PROTOCOL in websocket.requested_subprotocols:
            await websocket.accept(subprotocol=FEED_PROTOCOL)
        mailbox = await router.feed.subscribe(admin=_may_admin())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_ignore_input)
                while (text := await mailbox.get()) is not None:
                    # Over HTTP/1.1 the kernel closes a stalled connection after the same time.
                    with trio.fail_after(FEED_STALL_TIMEOUT):
                        await websocket.send(text)
                        missed = mailbox.take_missed()
                        if missed:
                            await websocket.send(router.feed.missed(missed))
                await websocket.close(1001, "the router is shutting down")
                nursery.cancel_scope.cancel(reason="feed closed")
        except* trio.TooSlowError:
            pass  # the client has disconnected without a close frame
        finally:
            router.feed.unsubscribe(mailbox)

    def _may_admin() -> bool:
        try:
            _check_admin(router)
        except Refused:
            return False
        return True


async def _ignore_input() -> None:
    """Read and discard messages: unread input would hide that the client has disconnected."""
    while True:
        await websocket.receive()


# -- administration ---------------------------------------------------------------------------


def _check_admin(router: Router) -> None:
    """Raise Refused unless the guard has found an administrator."""
    identity = identity_of(answers.scope())
    check_admin(identity, has_admin_key=router.guard.keyring.has_admin)


def _administration(app: QuartTrio, router: Wired) -> None:
    @app.get("/admin/servers")
    async def servers() -> Response:
        _check_admin(router)
        return await _of_fleet(router, admin.servers_view)

    @app.post("/admin/servers/<name:server>/drain")
    async def drain(server: str) -> Response:
        _check_admin(router)
        return answers.json(admin.drain(router, server, on=True))

    @app.post("/admin/servers/<name:server>/undrain")
    async def undrain(server: str) -> Response:
        _check_admin(router)
        return answers.json(admin.drain(router, server, on=False))

    @app.get("/admin/keys")
    async def keys() -> Response:
        _check_admin(router)
        totals = router.metrics.key_totals()
        return answers.json(admin.keys_view(router.feed.key_usage.recent(totals)))

    @app.get("/admin/servers/<server:server>")
    async def one(server: str) -> Response:
        _check_admin(router)
        return answers.json(admin.server_view(admin.find(router, server), router))

    @app.post("/admin/sign-in")
    async def new_code() -> Response:
        _check_admin(router)
        return answers.json({"code": router.sessions.new_code(), "seconds": CODE_SECONDS})

    @app.post("/sign-in")
    async def sign_in() -> Response:
        try:
            code = msgspec.json.decode(await answers.body(), type=_SignIn).code
        except msgspec.DecodeError as error:
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
        _check_admin(router)
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
        _check_admin(router)
        code, results = await control(
            router, method, path, scope["query_string"], answers.fields(), await answers.body()
        )
        return answers.json(results, code)
