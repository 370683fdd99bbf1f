"""Serve /openapi.json and /docs: what this gateway offers, for programs and for people.

Neither needs a key, and neither loads anything from another host. To a request without a key the
document names what is reserved for nobody; to one with a key, what that key may ask for.
"""

import hashlib

from flask import Blueprint, Response, current_app, json, request
from markupsafe import escape
from werkzeug import Response as BaseResponse

from app.http.auth import caller_if_known
from app.http.context import runtime
from app.spec.document import build
from app.spec.job_fields import job_fields
from policy.routing import Asker

bp = Blueprint("openapi", __name__)

# Whoever sends no key: what every key could ask for, one with the scope for versions too.
SOMEBODY = Asker(may_name_versions=True)
# The viewer draws its own styles and pictures; scripts come from here alone.
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Darkroom API</title>
<link rel="icon" href="data:,">
<script type="module" src="{prefix}/static/docs/rapidoc-min.js"></script>
</head>
<body style="margin: 0">
<rapi-doc spec-url="{prefix}/openapi.json" render-style="read" show-header="false" \
allow-authentication="true"
  allow-server-selection="false"
  load-fonts="false" schema-style="table" persist-auth="false" \
regular-font="system-ui, sans-serif" mono-font="ui-monospace, monospace">
</rapi-doc>
</body>
</html>
"""


@bp.get("/openapi.json")
def show_spec() -> BaseResponse:
    """Serve the OpenAPI 3.1 document."""
    known = caller_if_known()
    asker = SOMEBODY if known is None else runtime().asker(known)
    content = runtime().documents.get(_which(asker), lambda: _document(asker))
    response = Response(content, content_type="application/json")
    response.headers["Cache-Control"] = f"{'public' if known is None else 'private'}, max-age=60"
    response.vary.add("Authorization")
    response.set_etag(hashlib.sha256(content.encode()).hexdigest()[:32])
    return response.make_conditional(request)


def _which(asker: Asker) -> tuple[str, ...]:
    """Name the document: by the prefix of its links, the revision, and what is offered."""
    parts = runtime()
    offered = json.dumps(job_fields(parts.fleet, asker))
    return request.script_root, str(parts.current.number), offered


def _document(asker: Asker) -> str:
    """Build the document with links under the prefix of this request."""
    parts = runtime()
    root = request.script_root or "/"
    return json.dumps(build(current_app, parts.fleet, parts.settings, asker=asker, root=root))


@bp.get("/docs")
def show_docs() -> Response:
    """Serve the viewer of the OpenAPI document, where requests can be tried."""
    response = Response(
        PAGE.format(prefix=escape(request.script_root)), content_type="text/html; charset=utf-8"
    )
    response.headers["Content-Security-Policy"] = POLICY
    return response
