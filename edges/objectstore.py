"""Read and write the object store, any that speaks S3, through boto3 alone.

Nothing here depends on conditional writes or lifecycle rules: keys are content-addressed, so
writing the same key twice writes the same bytes, and Postgres says which objects exist.
"""

import functools
import hashlib
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.client import BaseClient
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from edges.errors import wrap
from settings import StoreSettings

# Only the client's own cache may keep a picture: its tenant may erase it.
PRIVATE = "private, max-age=600"
PIECE_BYTES = 65_536
_FOREIGN = (BotoCoreError, ClientError)


class StoreUnavailable(Exception):
    """The object store refused or could not be reached; try again later."""


class ObjectGone(StoreUnavailable):
    """There is no such object; trying again will not help."""


@dataclass(frozen=True)
class Span:
    """Name a part of an object: from its byte `first` to its byte `last`, both included."""

    first: int
    last: int


class Pieces:
    """Iterate over an object's bytes in pieces of PIECE_BYTES. The caller must close it."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        """Yield the pieces. Raises StoreUnavailable when the store stops sending."""
        with wrap(BotoCoreError, _unavailable):
            yield from self._body.iter_chunks(PIECE_BYTES)

    def close(self) -> None:
        """Release the connection."""
        self._body.close()


class ObjectStore:
    """Read and write one bucket. Thread-safe, as boto3 clients are."""

    def __init__(self, settings: StoreSettings) -> None:
        self._bucket = settings.s3_bucket
        self._presign_ttl_s = settings.presign_ttl_s
        self._client = _client(settings, settings.s3_endpoint_url)
        self._hasty = _client(settings, settings.s3_endpoint_url, read_timeout_s=3, retries=0)
        public = settings.s3_public_endpoint_url
        self._probe = _client(settings, settings.s3_endpoint_url, read_timeout_s=1, retries=0)
        self._public = (
            self._client
            if public in (None, settings.s3_endpoint_url)
            else _client(settings, public)
        )

    def put(self, key: str, content: bytes, *, content_type: str) -> None:
        """Store `content` under `key`. Raises StoreUnavailable."""
        with wrap(_FOREIGN, _unavailable):
            self._client.put_object(
                Bucket=self._bucket,
                Key=key,
                Body=content,
                ContentType=content_type,
                CacheControl=PRIVATE,
            )

    def get(self, key: str, *, soon: bool = False) -> bytes:
        """Return an object's bytes. Raises StoreUnavailable; ObjectGone if there is no such key.

        soon: give up (StoreUnavailable) when the store takes more than a few seconds.
        """
        client = self._hasty if soon else self._client
        with wrap(_FOREIGN, _gone_or_unavailable):
            return bytes(client.get_object(Bucket=self._bucket, Key=key)["Body"].read())

    def open(self, key: str, span: Span | None = None) -> Pieces:
        """Open the object, or a part of it, for reading as it arrives.

        Raises StoreUnavailable; ObjectGone if there is no such key.
        """
        part = {} if span is None else {"Range": f"bytes={span.first}-{span.last}"}
        with wrap(_FOREIGN, _gone_or_unavailable):
            return Pieces(self._client.get_object(Bucket=self._bucket, Key=key, **part)["Body"])

    def holds(self, key: str) -> bool:
        """Tell whether there is such an object. Raises StoreUnavailable."""
        with wrap(_FOREIGN, _unavailable):
            try:
                self._client.head_object(Bucket=self._bucket, Key=key)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey", "NotFound"):
                    return False
                raise
            return True

    def delete(self, key: str) -> None:
        """Delete the object; harmless if there is no such key. Raises StoreUnavailable."""
        with wrap(_FOREIGN, _unavailable):
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def presigned_url(self, key: str, *, content_type: str, filename: str) -> str:
        """Sign a URL of the public endpoint; who has it can read the object for `presign_ttl_s`."""
        disposition = f'inline; filename="{filename}"'
        told = {
            "ResponseContentType": content_type,
            "ResponseContentDisposition": disposition,
            "ResponseCacheControl": PRIVATE,
        }
        parameters = {"Bucket": self._bucket, "Key": key, **told}
        return str(
            self._public.generate_presigned_url(
                "get_object", Params=parameters, ExpiresIn=self._presign_ttl_s
            )
        )

    def ping(self) -> None:
        """Raise StoreUnavailable if the bucket cannot be seen."""
        with wrap(_FOREIGN, _unavailable):
            self._probe.head_bucket(Bucket=self._bucket)


def image_key(tenant_id: uuid.UUID, content_sha256: str, extension: str) -> str:
    """Return `t/<tenant>/sha256/ab/<hash>.<ext>`.

    Content-addressed, and per tenant, so that nobody learns what another tenant has.
    """
    return f"t/{tenant_id}/sha256/{content_sha256[:2]}/{content_sha256}.{extension}"


def picture_key(tenant_id: uuid.UUID, content_sha256: str) -> str:
    """Return the key of a tenant's picture; the same as an image's with the same bytes."""
    return image_key(tenant_id, content_sha256, "png")


def content_sha256(content: bytes) -> str:
    """Return the digest of the stored bytes, used in the key and to check a download."""
    return hashlib.sha256(content).hexdigest()


def _client(
    settings: StoreSettings,
    endpoint_url: str | None,
    *,
    read_timeout_s: float = 20,
    retries: int = 3,
) -> BaseClient:
    style = settings.s3_addressing_style
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path" if endpoint_url and style == "auto" else style},
        request_checksum_calculation=settings.s3_checksums,
        response_checksum_validation=settings.s3_checksums,
        connect_timeout=min(3, read_timeout_s),
        read_timeout=read_timeout_s,
        retries={"mode": "standard", "max_attempts": retries},
        max_pool_connections=32,
    )
    with _ONE_AT_A_TIME:
        return _session().client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=settings.s3_region,
            aws_access_key_id=settings.s3_access_key_id.get_secret_value(),
            aws_secret_access_key=settings.s3_secret_access_key.get_secret_value(),
            config=config,
        )


_ONE_AT_A_TIME = threading.Lock()  # a session is not thread-safe; its clients are


@functools.cache
def _session() -> boto3.session.Session:
    """Make the process's session: it reads boto3's large description of S3 only once."""
    return boto3.session.Session()


def _unavailable(error: BotoCoreError | ClientError) -> StoreUnavailable:
    return StoreUnavailable(_reason(error))


def _gone_or_unavailable(error: BotoCoreError | ClientError) -> StoreUnavailable:
    is_gone = (
        isinstance(error, ClientError)
        and error.response.get("Error", {}).get("Code") == "NoSuchKey"
    )
    return (ObjectGone if is_gone else StoreUnavailable)(_reason(error))


def _reason(error: Exception) -> str:
    """Say what went wrong, without URLs that carry signatures."""
    if isinstance(error, ClientError):
        facts = error.response.get("Error", {})
        return f"{error.operation_name}: {facts.get('Code', 'unknown')}"
    return type(error).__name__
