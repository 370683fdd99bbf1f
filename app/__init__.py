"""Build the gateway: HTTP in, JSON out, with a blueprint per resource.

It names tasks instead of importing them, so no web process loads the engine.
"""

import re
import time
import uuid

import structlog
from flask import Flask, Response, g, request
from flask.json.provider import DefaultJSONProvider

from app.http import (
    about,
    account,
    admin,
    batches,
    catalog,
    cors,
    errors,
    estimates,
    events,
    files,
    health,
    jobs,
    links,
    openapi,
    ratelimit,
    uploads,
    webhooks,
)
from app.http.context import runtime
from app.http.prefix import PathPrefix
from app.openai import images as openai_images
from app.problems import MethodUnknown
from app.runtime import open_runtime
from edges import telemetry
from policy.current import CurrentFleet
from policy.fleet import Fleet
from settings import GatewaySettings

MAX_FORM_PARTS = 64
BLUEPRINTS = (
    jobs.bp,
    batches.bp,
    estimates.bp,
    events.bp,
    files.bp,
    webhooks.bp,
    openai_images.bp,
    account.bp,
    admin.bp,
    catalog.bp,
    openapi.bp,
    links.bp,
    about.bp,
    health.bp,
)
# The methods of RFC 9110 and 5789.
METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE"}
)
_SANE_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")


def create_app(settings: GatewaySettings, fleet: Fleet | CurrentFleet) -> Flask:
    """Build the gateway as a WSGI application.

    It follows the fleet's revisions once its runtime's `following` is started.
    """
    app = Flask(__name__)
    app.request_class = uploads.SpoolingRequest
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.config["MAX_FORM_MEMORY_SIZE"] = settings.max_body_bytes
    app.config["MAX_FORM_PARTS"] = MAX_FORM_PARTS
    assert isinstance(app.json, DefaultJSONProvider)
    app.json.sort_keys = False
    app.extensions["darkroom"] = open_runtime(settings, fleet)
    errors.register(app)
    for blueprint in BLUEPRINTS:
        app.register_blueprint(blueprint)
    app.before_request(_open_request)
    app.after_request(_close_request)
    # After _open_request, and before any blueprint asks for a key.
    cors.register(app, settings.cors_allowed_origins)
    # The way of Flask's own documents to add WSGI middleware; to mypy it is a method.
    app.wsgi_app = PathPrefix(app.wsgi_app, settings)  # type: ignore[method-assign]
    app.teardown_request(uploads.release)
    app.teardown_request(_go_by_newest_fleet)
    return app


def _go_by_newest_fleet(error: BaseException | None) -> None:
    del error
    runtime().current.unpin()


def _open_request() -> None:
    runtime().current.pin()  # a request never sees two fleets
    offered = request.headers.get("X-Request-Id", "")
    g.request_id = offered if _SANE_REQUEST_ID.match(offered) else str(uuid.uuid4())
    g.opened_at = time.monotonic()
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=g.request_id)
    if request.method not in METHODS:
        raise MethodUnknown("No route takes this method.", accepted=sorted(METHODS))


def _close_request(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.get("request_id", "unknown")
    response.headers["X-Content-Type-Options"] = "nosniff"
    ratelimit.add_ratelimit_headers(response)
    route = request.url_rule.rule if request.url_rule else "unknown"
    # Clients must not choose the value of a metric's label.
    method = request.method if request.method in METHODS else "unknown"
    telemetry.HTTP_REQUESTS.labels(method, route, response.status_code).inc()
    if "Preference-Applied" not in response.headers and "opened_at" in g:
        telemetry.HTTP_SECONDS.labels(method, route).observe(time.monotonic() - g.opened_at)
    return response
