"""Find out where Darkroom is, with which key, and how to reach it."""

import functools
import os
import ssl
from dataclasses import dataclass
from typing import Any

import httpx

from darkroom_client.errors import NotConfigured
from darkroom_client.version import VERSION

USER_AGENT = f"darkroom-client/{VERSION} python-httpx/{httpx.__version__}"


@dataclass(frozen=True)
class GatewayAddress:
    """The URL of a gateway, and the key for it."""

    url: str
    api_key: str

    @classmethod
    def resolved(cls, url: str | None, api_key: str | None) -> "GatewayAddress":
        """Complete the URL and the key from DARKROOM_URL and DARKROOM_API_KEY.

        Raises NotConfigured.
        """
        known = {
            "DARKROOM_URL": url or os.environ.get("DARKROOM_URL"),
            "DARKROOM_API_KEY": api_key or os.environ.get("DARKROOM_API_KEY"),
        }
        missing = [name for name, value in known.items() if not value]
        if missing:
            raise NotConfigured(
                f"No {' and no '.join(missing)}: pass it, or set it in the environment."
            )
        return cls(str(known["DARKROOM_URL"]), str(known["DARKROOM_API_KEY"]))

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of every httpx client for this address.

        For a gateway on this machine the proxies of the environment are ignored.
        """
        is_near = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
        return {"trust_env": not is_near, "verify": _trusted(not is_near)}

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of every request to the gateway."""
        return {
            "Authorization": f"Bearer {self.api_key}",
            "Accept": "application/json",
            "User-Agent": USER_AGENT,
        }


@functools.cache
def _trusted(trust_env: bool) -> ssl.SSLContext:
    """Load the trusted certificates, once: it takes longer than a request."""
    return httpx.create_ssl_context(trust_env=trust_env)
