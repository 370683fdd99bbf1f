"""Serve /v1/admin, for operators: tenants with their limits, API keys, and usage.

Keys need the scope `admin`.
"""

import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, get_type_hints

from flask import Blueprint, request, url_for
from flask.typing import ResponseReturnValue
from pydantic import BaseModel, Field, StringConstraints, create_model

from app.http.account import limits_view, read_days, usage_view
from app.http.answers import answer, answer_page, whole_list
from app.http.auth import require_key
from app.http.body import parse, read_object
from app.http.context import caller, runtime
from app.http.pages import read_cursor, read_limit
from app.problems import InvalidRequest
from app.schemas import account as schemas
from app.schemas.base import says
from app.schemas.bodies import STRICT, json_type
from app.services import tenants, usage
from models.tables import ApiKey, Tenant
from policy.limits import (
    DEFAULT_SCOPES,
    KEY_GRACE_S,
    LIMITS,
    MAX_WEIGHT,
    MIN_WEIGHT,
    Limits,
    Scope,
    limits_of,
)
from policy.text import is_human

bp = Blueprint("admin", __name__, url_prefix="/v1/admin")
bp.before_request(require_key)

Name = Annotated[
    str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
]
Weight = Annotated[float, Field(ge=MIN_WEIGHT, le=MAX_WEIGHT)]


class _Body(BaseModel):
    model_config = STRICT


_LIMITS: dict[str, Any] = {
    name: (json_type(hint) | None, None)
    for name, hint in get_type_hints(Limits, include_extras=True).items()
}
_LimitsBody: Any = create_model("_LimitsBody", __base__=_Body, **_LIMITS)


class TenantBody(_Body):
    """The body of POST /v1/admin/tenants."""

    name: Annotated[Name, says("The name, which no other tenant has.")]
    weight: Annotated[Weight, says("Its share of device time while several tenants wait.")] = 1.0


class TenantChange(_LimitsBody):
    """The body of PATCH /v1/admin/tenants/{id}; a missing field stays, null removes a limit."""

    weight: Weight | None = None


class KeyBody(_Body):
    """The body of POST /v1/admin/tenants/{id}/keys."""

    name: Annotated[
        str, StringConstraints(min_length=1, max_length=64), says("A name for the key.")
    ] = "api"
    scopes: Annotated[list[Scope], Field(min_length=1), says("What the key may do.")] = list(
        DEFAULT_SCOPES
    )
    expires_at: Annotated[
        str | None, says("An instant in the future from which the key is refused; null: never.")
    ] = None


class RotateBody(_Body):
    """The body of POST /v1/admin/keys/{id}/rotate."""

    grace_s: Annotated[
        float, Field(ge=0, le=30 * 86_400), says("For so many seconds the old key still works.")
    ] = KEY_GRACE_S


@bp.get("/tenants")
def list_tenants() -> ResponseReturnValue:
    """List every tenant, newest first: `limit` (1 to 100), `cursor`."""
    limit = read_limit(request)
    before = read_cursor(request)
    rows = tenants.page(runtime(), limit=limit + 1, before=before)
    return answer_page(
        request,
        schemas.TenantPage,
        rows,
        _tenant_view,
        limit=limit,
        id_of=lambda row: row.id,
    )


@bp.post("/tenants")
def create_tenant() -> ResponseReturnValue:
    """Add a tenant, without limits and without keys: 201."""
    body = parse(TenantBody, read_object(request))
    tenant = tenants.create(runtime(), caller(), name=body.name, weight=body.weight)
    location = url_for(".show_tenant", tenant_id=tenant.id)
    return answer(_tenant_view(tenant), 201, {"Location": location})


@bp.get("/tenants/<uuid:tenant_id>")
def show_tenant(tenant_id: uuid.UUID) -> ResponseReturnValue:
    """Show one tenant with its limits."""
    return answer(_tenant_view(tenants.find(runtime(), tenant_id)))


@bp.patch("/tenants/<uuid:tenant_id>")
def change_tenant(tenant_id: uuid.UUID) -> ResponseReturnValue:
    """Change weight and limits; they hold in every process within a second."""
    fields = read_object(request)
    body = parse(TenantChange, fields)
    limits = {name: getattr(body, name) for name in LIMITS if name in fields}
    tenant = tenants.change(
        runtime(),
        caller(),
        tenant_id,
        weight=body.weight,
        limits=limits,
    )
    return answer(_tenant_view(tenant))


@bp.get("/tenants/<uuid:tenant_id>/keys")
def list_keys(tenant_id: uuid.UUID) -> ResponseReturnValue:
    """List the tenant's keys, oldest first, revoked ones included.

    The secret part of a key is not stored, so it cannot be shown.
    """
    rows = tenants.list_keys_of(runtime(), tenant_id)
    return whole_list(schemas.KeyPage, [_key_view(row) for row in rows])


@bp.post("/tenants/<uuid:tenant_id>/keys")
def issue_key(tenant_id: uuid.UUID) -> ResponseReturnValue:
    """Add a key of the tenant: 201, with `key`, which is shown only this once."""
    body = parse(KeyBody, read_object(request))
    if not is_human(body.name):
        raise InvalidRequest.at(
            "name", "must not have control characters in it", accepted={"max_chars": 64}
        )
    row, key = tenants.issue_key(
        runtime(),
        caller(),
        tenant_id,
        name=body.name,
        scopes=body.scopes,
        expires_at=_instant(body.expires_at),
    )
    return answer(_key_view(row, schemas.IssuedKey, key=key), 201)


@bp.post("/keys/<uuid:key_id>/rotate")
def rotate_key(key_id: uuid.UUID) -> ResponseReturnValue:
    """Add a key with the same name and scopes: 201.

    The old key stays valid for `grace_s` (by default a day), so that nobody is locked out.
    """
    body = parse(RotateBody, read_object(request) if request.get_data() else {})
    row, key = tenants.rotate_key(runtime(), caller(), key_id, grace_s=body.grace_s)
    shown = _key_view(
        row,
        schemas.RotatedKey,
        key=key,
        former_key_id=key_id,
        former_key_lives_for_s=body.grace_s,
    )
    return answer(shown, 201)


@bp.delete("/keys/<uuid:key_id>")
def revoke_key(key_id: uuid.UUID) -> ResponseReturnValue:
    """Revoke the key: 204; every process refuses it within a second."""
    tenants.revoke_key(runtime(), caller(), key_id)
    return "", 204


@bp.get("/tenants/<uuid:tenant_id>/usage")
def show_usage(tenant_id: uuid.UUID) -> ResponseReturnValue:
    """Show the tenant's ledger by UTC days, `from` and `to` included; by default this month."""
    since, until = read_days(request)
    rows = usage.days_of(runtime(), tenant_id, since=since, until=until)
    return answer(schemas.TenantUsage(**usage_view(rows, since, until), tenant_id=tenant_id))


def _instant(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text.upper())
        is_future = at.tzinfo is not None and at.astimezone(UTC) > datetime.now(UTC)
    except (ValueError, OverflowError):  # no instant, or one that is out of range in UTC
        is_future = False
    if not is_future:
        detail = "must be an instant in the future, with its offset"
        raise InvalidRequest.at("expires_at", detail, accepted="2027-01-31T00:00:00Z")
    return at


def _tenant_view(tenant: Tenant) -> schemas.Tenant:
    return schemas.Tenant(
        id=tenant.id,
        name=tenant.name,
        weight=tenant.weight,
        created_at=tenant.created_at,
        limits=limits_view(limits_of({name: getattr(tenant, name) for name in LIMITS})),
    )


def _key_view(row: ApiKey, kind: type[schemas.Key] = schemas.Key, **more: Any) -> schemas.Key:
    """Show a key as a document of this kind; `more`: members that only this kind has."""
    return kind(
        id=row.id,
        kid=row.kid,
        name=row.name,
        scopes=row.scopes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
        **more,
    )
