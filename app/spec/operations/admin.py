"""Describe the operations of /v1/admin, for operators; keys need the scope `admin`."""

from app.http.admin import KeyBody, RotateBody, TenantBody, TenantChange
from app.schemas.account import IssuedKey, KeyPage, RotatedKey, Tenant, TenantPage, TenantUsage
from app.spec.operation import DAYS, JSON, PAGE, Operation

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/v1/admin/tenants"): Operation(
        summary="List tenants",
        description="All tenants, newest first.",
        answers=(TenantPage,),
        parameters=PAGE,
    ),
    ("POST", "/v1/admin/tenants"): Operation(
        summary="Create a tenant",
        description="Creates a tenant, which has no limits and no keys yet.",
        status=201,
        answers=(Tenant,),
        body={JSON: TenantBody},
        examples={JSON: {"name": "acme", "weight": 1.0}},
    ),
    ("GET", "/v1/admin/tenants/{tenant_id}"): Operation(
        summary="Show a tenant",
        description="A tenant with its limits.",
        answers=(Tenant,),
    ),
    ("PATCH", "/v1/admin/tenants/{tenant_id}"): Operation(
        summary="Change a tenant's limits",
        description="Sets the weight and the limits that the body names. Those that it does not"
        " name stay as they are; null removes a limit. Every process applies the change within a"
        " second.",
        answers=(Tenant,),
        body={JSON: TenantChange},
        examples={JSON: {"requests_per_minute": 600}},
    ),
    ("GET", "/v1/admin/tenants/{tenant_id}/keys"): Operation(
        summary="List a tenant's keys",
        description="The tenant's keys, oldest first, including revoked ones. The secret part of"
        " a key is never shown again.",
        answers=(KeyPage,),
    ),
    ("POST", "/v1/admin/tenants/{tenant_id}/keys"): Operation(
        summary="Issue a key",
        description="Creates a key of the tenant. `key` is shown only in this answer.",
        status=201,
        answers=(IssuedKey,),
        body={JSON: KeyBody},
        examples={JSON: {"name": "web", "scopes": ["generate", "read"]}},
    ),
    ("POST", "/v1/admin/keys/{key_id}/rotate"): Operation(
        summary="Rotate a key",
        description="Creates a key with the same name and scopes. `key` is shown only in this"
        " answer. The old key works for `grace_s` more seconds, so that clients can change over.",
        status=201,
        answers=(RotatedKey,),
        body={JSON: RotateBody},
        is_body_required=False,
        examples={JSON: {"grace_s": 3600}},
    ),
    ("DELETE", "/v1/admin/keys/{key_id}"): Operation(
        summary="Revoke a key",
        description="Revokes the key. Every process refuses it within a second.",
        status=204,
    ),
    ("GET", "/v1/admin/tenants/{tenant_id}/usage"): Operation(
        summary="Show a tenant's usage",
        description="What the tenant used on each UTC day from `from` to `to`.",
        answers=(TenantUsage,),
        parameters=DAYS,
    ),
}
