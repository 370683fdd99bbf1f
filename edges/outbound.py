"""Send requests to URLs that tenants choose (webhooks, pictures), never to a private address.

A name is resolved once, and the connection goes to the very address that was checked
(`requests-hardened`): a name server that changes its answer between the two gains nothing (DNS
rebinding). No redirects, no proxies, no credentials from the environment; the whole request has a
limit on time and on bytes. `allowed_networks` opens intranets and, for tests, this machine: there
plain http and any port are accepted.
"""

import email.utils
import ipaddress
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from urllib.parse import SplitResult, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests_hardened.ip_filter import InvalidIPAddress, filter_host
from requests_hardened.ip_filter_adapter import IPFilterAdapter
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError

from edges.errors import wrap
from policy.version import VERSION

USER_AGENT = f"Darkroom/{VERSION}"
PORTS = (443, 8443)
MAX_URL_CHARS = 2048
TOO_LONG = "it took too long"
_CONNECT_S = 5.0


class Unreachable(Exception):
    """No answer came, or the request is not allowed; `reason` says why, without the URL."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Unresolved(requests.ConnectionError):
    """The name has no address; the text says why."""


@dataclass(frozen=True)
class ReceiverAnswer:
    """Hold a receiver's answer. retry_after_s: its Retry-After, None if it sent none."""

    status: int
    retry_after_s: float | None


class Outbound:
    """Send the requests. Thread-safe: every request has a session of its own."""

    def __init__(self, allowed_networks: str) -> None:
        """Take the allowed networks: CIDRs separated by commas. Raises ValueError if one is not."""
        self._allowed = [
            ipaddress.ip_network(part.strip())
            for part in allowed_networks.split(",")
            if part.strip()
        ]

    def refusal(self, url: str) -> str | None:
        """Say why no request will ever go to this URL; None if one may.

        The name is not resolved here, so `post` and `fetch` may still refuse it.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            return "is not a URL"
        if len(url) > MAX_URL_CHARS or not url.isascii() or not url.isprintable() or " " in url:
            return f"must be printable ASCII of at most {MAX_URL_CHARS} characters"
        if parts.scheme not in ("https", "http") or not parts.hostname:
            return "must be an https URL"
        if parts.username is not None or parts.password is not None:
            return "must not carry a user or password"
        address = _literal(parts.hostname)
        if address is not None and self._is_allowed(address):
            return None
        if parts.scheme != "https" and not self._may_be_inside(address):
            return "must be an https URL"
        if port not in (None, *PORTS) and not self._may_be_inside(address):
            return f"must use port {' or '.join(map(str, PORTS))}"
        if address is not None:
            return _private(parts.hostname)
        return None

    def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float
    ) -> ReceiverAnswer:
        """Post and return the status; the response body is not read. Raises Unreachable."""
        with self._request("POST", url, timeout_s, data=body, headers=dict(headers)) as response:
            return ReceiverAnswer(
                response.status_code, _retry_after_s(response.headers.get("Retry-After"))
            )

    def fetch(self, url: str, *, max_bytes: int, timeout_s: float) -> bytes:
        """Return the bytes behind `url`.

        Raises Unreachable, also for a status other than 200 and for more than `max_bytes`.
        """
        with self._request(
            "GET", url, timeout_s, headers={"Accept": "image/*", "Accept-Encoding": "identity"}
        ) as response:
            if response.status_code != 200:
                raise Unreachable(f"it answered {response.status_code}")
            content = bytearray()
            with wrap((HTTPError, OSError), lambda error: Unreachable(_reason(error))):
                while piece := response.raw.read(65_536, decode_content=False):
                    content += piece
                    if len(content) > max_bytes:
                        raise Unreachable(f"it has more than {max_bytes} bytes")
            length = response.headers.get("Content-Length")
            if length is not None and length.isdigit() and len(content) < int(length):
                raise Unreachable("it ended early")
            return bytes(content)

    def _request(self, method: str, url: str, timeout_s: float, **arguments: Any) -> "_Response":
        if (why := self.refusal(url)) is not None:
            raise Unreachable(f"the URL {why}")
        adapter = _Adapter(self, urlsplit(url))
        watch = _Watch(adapter, timeout_s)
        session = requests.Session()
        session.trust_env = False
        session.headers["User-Agent"] = USER_AGENT
        session.mount(f"{urlsplit(url).scheme}://", adapter)
        try:
            timeout = (min(_CONNECT_S, timeout_s), timeout_s)
            response = session.request(
                method, url, allow_redirects=False, stream=True, timeout=timeout, **arguments
            )
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            watch.end()
            session.close()
            raise Unreachable(TOO_LONG if watch.is_over() else _reason(error)) from error
        answered = _Response(response, session, watch)
        if watch.is_over():  # headers that end because we shut the connection look complete
            answered.close()
            raise Unreachable(TOO_LONG)
        return answered

    def address_in_time(self, parts: SplitResult, within_s: float) -> str:
        """Find the address to connect to, or give up after `within_s`.

        Raises InvalidIPAddress, ConnectionError. Runs in a thread of its own, because `getaddrinfo`
        has no deadline: a silent name server would block the caller, and an attempt at a delivery
        would outlive its claim.
        """
        found: Future[str] = Future()

        def resolve() -> None:
            try:
                found.set_result(self.address_of(parts))
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
                found.set_exception(error)

        threading.Thread(target=resolve, name="resolve", daemon=True).start()
        try:
            return found.result(timeout=within_s)
        except TimeoutError as error:
            raise _Unresolved("its name was not resolved in time") from error

    def address_of(self, parts: SplitResult) -> str:
        """Find the address to connect to. Raises InvalidIPAddress, ConnectionError."""
        host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        if self._allowed:
            try:
                first = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
            except OSError as error:
                raise _Unresolved("its name cannot be resolved") from error
            address = ipaddress.ip_address(first)
            if self._is_allowed(address):
                return f"[{address}]" if address.version == 6 else str(address)
        if parts.scheme != "https" or port not in PORTS:
            raise InvalidIPAddress(f"{parts.scheme} on port {port} outside the allowed networks")
        public: str = filter_host(host, port, allow_loopback=False)
        return public

    def _is_allowed(self, address: IPv4Address | IPv6Address) -> bool:
        return any(
            address.version == network.version and address in network for network in self._allowed
        )

    def _may_be_inside(self, address: IPv4Address | IPv6Address | None) -> bool:
        """Tell whether a host may be in an allowed network: a name may resolve into one.

        A literal address was checked before.
        """
        return bool(self._allowed) and address is None


class _Adapter(IPFilterAdapter):  # type: ignore[misc]  # requests_hardened has no types
    """Connect to the address that was checked, under the name in the URL; keep the connection."""

    def __init__(self, outbound: Outbound, parts: SplitResult) -> None:
        super().__init__(is_https_proto=parts.scheme == "https")
        self._outbound = outbound
        self._parts = parts
        self.connections: list[HTTPConnection] = []

    def build_connection_pool_key_attributes(
        self, request: Any, verify: Any, cert: Any = None
    ) -> Any:
        host_params, pool_kwargs = HTTPAdapter.build_connection_pool_key_attributes(
            self, request, verify, cert
        )
        request.headers["Host"] = self._parts.netloc
        if self._parts.scheme == "https":
            pool_kwargs["assert_hostname"] = pool_kwargs["server_hostname"] = self._parts.hostname
        host_params["host"] = self._outbound.address_in_time(self._parts, _CONNECT_S)
        return host_params, pool_kwargs

    def get_connection_with_tls_context(self, *arguments: Any, **named: Any) -> Any:
        pool = super().get_connection_with_tls_context(*arguments, **named)
        connections = self.connections

        # The base class is known at run time only.
        class Remembered(pool.ConnectionCls):  # type: ignore[misc, name-defined]
            def connect(self) -> None:
                connections.append(self)
                super().connect()

        pool.ConnectionCls = Remembered
        return pool


class _Watch:
    """Shut the connection when time is up.

    A socket's own timeout does not: it starts anew with every byte that a slow receiver sends.
    """

    def __init__(self, adapter: _Adapter, timeout_s: float) -> None:
        self._adapter = adapter
        self._deadline = time.monotonic() + timeout_s
        self._timer = threading.Timer(timeout_s, self._shut)
        self._timer.daemon = True
        self._timer.start()

    def is_over(self) -> bool:
        return time.monotonic() >= self._deadline

    def end(self) -> None:
        self._timer.cancel()

    def _shut(self) -> None:
        for connection in self._adapter.connections:
            if connection.sock is not None:
                try:
                    connection.sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue


class _Response:
    """Hold a response, and close with it its session and its watch."""

    def __init__(
        self, response: requests.Response, session: requests.Session, watch: _Watch
    ) -> None:
        self._response = response
        self._session = session
        self._watch = watch

    def __enter__(self) -> requests.Response:
        return self._response

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._watch.end()
        self._response.close()
        self._session.close()


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    """Parse `host` as an address, however it is written; None for a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:  # 127.1, 0x7f000001, 2130706433: libc takes them for addresses
        return ipaddress.ip_address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None


def _private(host: str) -> str | None:
    try:
        filter_host(host.partition("%")[0], 443, allow_loopback=False)
    except InvalidIPAddress:
        return "must not point to a private address"
    except requests.RequestException:
        return "is not a URL"
    return None


def _retry_after_s(text: str | None) -> float | None:
    if text is None:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _reason(error: BaseException) -> str:
    """Say what went wrong, without the URL."""
    if isinstance(error, InvalidIPAddress):
        return "its name resolves to an address that is not allowed"
    if isinstance(error, _Unresolved):
        return str(error)
    for cause in (error, *getattr(error, "args", ())):
        reason = getattr(cause, "reason", None)
        if reason is not None:
            return type(reason).__name__
    return type(error).__name__
