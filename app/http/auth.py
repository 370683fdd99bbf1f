"""Authenticate requests: API keys as Bearer tokens, and what each key may do."""

import time

import structlog
from flask import g, request

from app.caller import Caller
from app.http import uploads
from app.http.context import runtime
from app.live.keyring import NO_LIVE_KEY, CachedKey
from app.problems import Forbidden, RateLimited, Unauthenticated
from edges import telemetry
from edges.limits import WINDOW_S
from models import api_keys
from policy import tracecontext


def require_key() -> None:
    """Authenticate the request by its API key and set `g.caller`.

    Raises Unauthenticated, the same for unknown, revoked and expired keys; Forbidden for a key
    without the scope; RateLimited; and UploadsExhausted for a large body.
    """
    known = _authenticate()
    found = known.key
    g.caller = _caller(known)
    structlog.contextvars.bind_contextvars(tenant_id=str(found.tenant_id))
    enough = _sufficient_scopes()
    if not found.scopes & set(enough):
        telemetry.AUTH_FAILURES.labels("scope").inc()
        detail = f"This API key lacks the scope {' or '.join(f'`{scope}`' for scope in enough)}."
        raise Forbidden(detail, scope=enough[0], scopes=sorted(found.scopes))
    # An operator whose tenant is at its limits must be able to raise them.
    if "admin" not in enough:
        _count_request(g.caller)
    uploads.admit(request, runtime().uploads, g.caller.tenant_id)


def caller_if_known() -> Caller | None:
    """Return who sends the request, where no key is needed; None if it has no live one."""
    key = _key_sent()
    known = None if key is None else _known(key)
    return None if known is None else _caller(known)


def _caller(known: CachedKey) -> Caller:
    found = known.key
    return Caller(
        tenant_id=found.tenant_id,
        tenant=found.tenant,
        api_key_id=found.id,
        kid=found.kid,
        actor=f"key:{found.kid}",
        scopes=found.scopes,
        limits=known.limits,
        request_id=g.get("request_id"),
        traceparent=tracecontext.read(request.headers.get("traceparent", "")),
    )


def _key_sent() -> str | None:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _authenticate() -> CachedKey:
    """Look up the key that the request carries. Raises Unauthenticated."""
    key = _key_sent()
    if key is None:
        telemetry.AUTH_FAILURES.labels("no_key").inc()
        raise Unauthenticated("Send your API key as `Authorization: Bearer dr_…`.")
    known = _known(key)
    if known is None:
        telemetry.AUTH_FAILURES.labels("bad_key").inc()
        raise Unauthenticated(NO_LIVE_KEY)
    return known


def _known(key: str) -> CachedKey | None:
    kid = api_keys.kid_of(key)
    if kid is None:
        return None
    parts = runtime()
    known = parts.keyring.find(kid)
    if known is None or not known.key.is_live(time.time()):
        return None
    pepper = parts.settings.api_key_pepper.get_secret_value()
    return known if api_keys.verify_key(key, known.key.digest, pepper=pepper) else None


def _count_request(asking: Caller) -> None:
    """Count a request of the caller's tenant. Raises RateLimited."""
    most = asking.limits.requests_per_minute
    if most is None:
        return
    counted = runtime().rates.count(asking.tenant_id, most)
    asking.used.requests = counted
    if not counted.passes:
        telemetry.SHED.labels("rate_limited").inc()
        detail = f"Your tenant may send at most {most} requests per minute."
        raise RateLimited(
            detail, retry_after_s=counted.reset_s, policy="requests", quota=most, window_s=WINDOW_S
        )


def _sufficient_scopes() -> tuple[str, ...]:
    """Return the scopes of which the key needs one.

    Reading needs `read` and changing something `generate`. The operator's routes need `admin`,
    which implies neither of the two. An estimate takes either `read` or `generate`: it changes
    nothing, and clients that generate need it.
    """
    if request.blueprint == "admin":
        return ("admin",)
    if request.blueprint == "estimates":
        return ("read", "generate")
    return ("read",) if request.method in ("GET", "HEAD", "OPTIONS") else ("generate",)
