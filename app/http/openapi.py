"""Serve /openapi.json and /docs: what this gateway offers, for programs and for people.

Neither needs a key, and neither loads anything from another host.
"""

import hashlib

from flask import Blueprint, Response, current_app, json, request
from markupsafe import escape
from werkzeug import Response as BaseResponse

from app.http.context import runtime
from app.spec.document import build

bp = Blueprint("openapi", __name__)

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
    content = runtime().documents.get((request.script_root, runtime().current.number), _document)
    response = Response(content, content_type="application/json")
    response.headers["Cache-Control"] = "public, max-age=60"
    response.set_etag(hashlib.sha256(content.encode()).hexdigest()[:32])
    return response.make_conditional(request)


def _document() -> str:
    """Build the document with links under the prefix of this request."""
    parts = runtime()
    root = request.script_root or "/"
    return json.dumps(build(current_app, parts.fleet, parts.settings, root=root))


@bp.get("/docs")
def show_docs() -> Response:
    """Serve the viewer of the OpenAPI document, where requests can be tried."""
    response = Response(
        PAGE.format(prefix=escape(request.script_root)), content_type="text/html; charset=utf-8"
    )
    response.headers["Content-Security-Policy"] = POLICY
    return response
