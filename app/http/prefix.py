"""Handle a path prefix, when a proxy serves the gateway at, say, https://example.com/darkroom/.

A WSGI wrapper, because it acts before routing. Every link that a route writes begins with
SCRIPT_NAME, so the prefix is put there. A proxy may remove the prefix from the path or pass it on;
both work. Repeated slashes count as one: many programs join a base URL that ends in a slash with a
path that begins with one.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from werkzeug.middleware.proxy_fix import ProxyFix

from settings import PATH_PREFIX, GatewaySettings

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_SLASHES = re.compile("//+")


class PathPrefix:
    """Runs the application under the path of PUBLIC_URL or of X-Forwarded-Prefix."""

    def __init__(self, application: "WSGIApplication", settings: GatewaySettings) -> None:
        self._trusts_proxy = settings.trust_forwarded_headers
        self._own = urlsplit(settings.public_url).path
        if self._trusts_proxy:
            application = ProxyFix(application, x_for=0, x_proto=1, x_host=1)
        self._application = application

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        path = _SLASHES.sub("/", environ.get("PATH_INFO", ""))
        prefix = self._prefix(environ)
        if prefix:
            environ["SCRIPT_NAME"] = prefix
            if path == prefix or path.startswith(f"{prefix}/"):
                path = path.removeprefix(prefix) or "/"
        environ["PATH_INFO"] = path
        return self._application(environ, start_response)

    def _prefix(self, environ: "WSGIEnvironment") -> str:
        """Return the prefix that a trusted proxy sends; otherwise the path of PUBLIC_URL."""
        if not self._trusts_proxy:
            return self._own
        told = str(environ.get("HTTP_X_FORWARDED_PREFIX", "")).rstrip("/")
        return told if PATH_PREFIX.fullmatch(told) else self._own
