"""Describe every operation by method and path, with texts for users of the API."""

from app.spec.operation import Operation
from app.spec.operations import account, admin, files, jobs, openai, webhooks

OPERATIONS: dict[tuple[str, str], Operation] = {
    **jobs.OPERATIONS,
    **files.OPERATIONS,
    **openai.OPERATIONS,
    **webhooks.OPERATIONS,
    **account.OPERATIONS,
    **admin.OPERATIONS,
}
