"""Describe the operations of /v1/admin, for operators; keys need the scope `admin`."""

from app.http.admin import KeyBody, RotateBody, TenantBody, TenantChange
from app.schemas.account import IssuedKey, KeyPage, RotatedKey, Tenant, TenantPage, TenantUsage
from app.spec.operation import DAYS, JSON, PAGE, Operation

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/v1/admin/tenants"): Operation(
        summary="List tenants",
        description="Every tenant, newest first.",
        answers=(TenantPage,),
        parameters=PAGE,
    ),
    ("POST", "/v1/admin/tenants"): Operation(
        summary="Create a tenant",
        description="A new tenant, without limits and without keys.",
        status=201,
        answers=(Tenant,),
        body={JSON: TenantBody},
        examples={JSON: {"name": "acme", "weight": 1.0}},
    ),
    ("GET", "/v1/admin/tenants/{tenant_id}"): Operation(
        summary="Show a tenant",
        description="One tenant with its limits.",
        answers=(Tenant,),
    ),
    ("PATCH", "/v1/admin/tenants/{tenant_id}"): Operation(
        summary="Change a tenant's limits",
        description="Changes weight and limits; what the body does not name stays, null takes a"
        " limit away. They hold everywhere within a second.",
        answers=(Tenant,),
        body={JSON: TenantChange},
        examples={JSON: {"requests_per_minute": 600}},
    ),
    ("GET", "/v1/admin/tenants/{tenant_id}/keys"): Operation(
        summary="List a tenant's keys",
        description="What is known of its keys, oldest first, revoked ones included.",
        answers=(KeyPage,),
    ),
    ("POST", "/v1/admin/tenants/{tenant_id}/keys"): Operation(
        summary="Issue a key",
        description="A new key of the tenant; `key` is shown this once.",
        status=201,
        answers=(IssuedKey,),
        body={JSON: KeyBody},
        examples={JSON: {"name": "web", "scopes": ["generate", "read"]}},
    ),
    ("POST", "/v1/admin/keys/{key_id}/rotate"): Operation(
        summary="Rotate a key",
        description="A new key with the same name and scopes; `key` is shown this once. The old one"
        " lives on for `grace_s`, so that nobody is locked out.",
        status=201,
        answers=(RotatedKey,),
        body={JSON: RotateBody},
        is_body_required=False,
        examples={JSON: {"grace_s": 3600}},
    ),
    ("DELETE", "/v1/admin/keys/{key_id}"): Operation(
        summary="Revoke a key",
        description="Refuses the key from now on: within a second, in every process.",
        status=204,
    ),
    ("GET", "/v1/admin/tenants/{tenant_id}/usage"): Operation(
        summary="Show a tenant's usage",
        description="The tenant's ledger by UTC days, first and last included.",
        answers=(TenantUsage,),
        parameters=DAYS,
    ),
}
