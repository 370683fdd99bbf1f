"""The object store, any that speaks S3, through boto3 alone.

Nothing here depends on conditional writes or lifecycle rules: keys are content-addressed, so writing the same key twice
writes the same bytes, and the truth about what exists is in Postgres.
"""

import hashlib
import uuid

import boto3
from botocore.client import BaseClient
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from settings import StoreSettings

IMMUTABLE = "public, max-age=31536000, immutable"


class StoreUnavailable(Exception):
    """The object store refused or could not be reached; try again later."""


class ObjectGone(StoreUnavailable):
    """There is no such object; trying again will not help."""


class ObjectStore:
    """One bucket. Thread-safe: boto3 clients are."""

    def __init__(self, settings: StoreSettings) -> None:
        self._bucket, self._presign_ttl_s = settings.s3_bucket, settings.presign_ttl_s
        self._client = _client(settings, settings.s3_endpoint_url)
        self._hasty = _client(settings, settings.s3_endpoint_url, read_timeout_s=3, attempts=1)
        public = settings.s3_public_endpoint_url
        self._public = self._client if public in (None, settings.s3_endpoint_url) else _client(settings, public)

    def put(self, key: str, content: bytes, *, content_type: str) -> None:
        """Store `content` under `key`. Raises StoreUnavailable."""
        try:
            self._client.put_object(Bucket=self._bucket, Key=key, Body=content, ContentType=content_type, CacheControl=IMMUTABLE)
        except (BotoCoreError, ClientError) as error:
            raise StoreUnavailable(_reason(error)) from error

    def get(self, key: str, *, soon: bool = False) -> bytes:
        """Raises StoreUnavailable, also for a store that takes more than a few seconds if `soon`; ObjectGone when there is no such key."""
        client = self._hasty if soon else self._client
        try:
            return bytes(client.get_object(Bucket=self._bucket, Key=key)["Body"].read())
        except (BotoCoreError, ClientError) as error:
            is_gone = isinstance(error, ClientError) and error.response.get("Error", {}).get("Code") == "NoSuchKey"
            raise (ObjectGone if is_gone else StoreUnavailable)(_reason(error)) from error

    def delete(self, key: str) -> None:
        """Harmless when there is no such key. Raises StoreUnavailable."""
        try:
            self._client.delete_object(Bucket=self._bucket, Key=key)
        except (BotoCoreError, ClientError) as error:
            raise StoreUnavailable(_reason(error)) from error

    def presigned_url(self, key: str, *, content_type: str, filename: str) -> str:
        """A URL that shows the object to whoever has it, for `presign_ttl_s`; signed for the public endpoint."""
        disposition = f'inline; filename="{filename}"'
        parameters = {"Bucket": self._bucket, "Key": key, "ResponseContentType": content_type, "ResponseContentDisposition": disposition}
        return str(self._public.generate_presigned_url("get_object", Params=parameters, ExpiresIn=self._presign_ttl_s))

    def ping(self) -> None:
        """Raises StoreUnavailable if the bucket cannot be seen."""
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except (BotoCoreError, ClientError) as error:
            raise StoreUnavailable(_reason(error)) from error


def image_key(tenant_id: uuid.UUID, content_sha256: str, extension: str) -> str:
    """`t/<tenant>/sha256/ab/<hash>.<ext>`: content-addressed, and scoped so that nobody learns what another tenant has."""
    return f"t/{tenant_id}/sha256/{content_sha256[:2]}/{content_sha256}.{extension}"


def picture_key(tenant_id: uuid.UUID, content_sha256: str) -> str:
    """Where a tenant's picture lies; the very object of an image that has the same bytes."""
    return image_key(tenant_id, content_sha256, "png")


def content_sha256(content: bytes) -> str:
    """Digest of the stored bytes: key and download check."""
    return hashlib.sha256(content).hexdigest()


def _client(settings: StoreSettings, endpoint_url: str | None, *, read_timeout_s: int = 20, attempts: int = 3) -> BaseClient:
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        request_checksum_calculation=settings.s3_checksums,
        response_checksum_validation=settings.s3_checksums,
        connect_timeout=3,
        read_timeout=read_timeout_s,
        retries={"mode": "standard", "max_attempts": attempts},
        max_pool_connections=32,
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id.get_secret_value(),
        aws_secret_access_key=settings.s3_secret_access_key.get_secret_value(),
        config=config,
    )


def _reason(error: Exception) -> str:
    """What went wrong, without URLs that carry signatures."""
    if isinstance(error, ClientError):
        facts = error.response.get("Error", {})
        return f"{error.operation_name}: {facts.get('Code', 'unknown')}"
    return type(error).__name__
