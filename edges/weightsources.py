"""Read files of weights where they are kept: a bucket of S3, or a repository of the hub.

WeightsError                    a version cannot be brought here; the message says why
├── SourceUnavailable           no answer, or a broken one: trying again helps
├── SourceRefused               it is not there, or we may not read it: trying again does not help
├── DigestWrong                 the file is not the one that fleet.toml lists
└── CacheFull                   there is too little room for it (edges/weightroom.py)

Keys of the bucket of images have no say here: a GPU worker has none.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import quote

import httpx
from pydantic import SecretStr

from edges.errors import wrap
from policy.sources import HubSource, RemoteSource, S3Source
from policy.version import VERSION
from settings import DeviceSettings

PIECE_BYTES = 1_048_576
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that pass
_TIMES = httpx.Timeout(30.0, connect=5.0)
_S3_KEYS = "MODEL_S3_ACCESS_KEY_ID and MODEL_S3_SECRET_ACCESS_KEY"


class WeightsError(Exception):
    """Weights cannot be brought to this machine; the message names file and reason."""


class SourceUnavailable(WeightsError):
    """The place does not answer, or stopped sending; try again."""


class SourceRefused(WeightsError):
    """The file is not there, or may not be read; correct the source or the keys."""


class DigestWrong(WeightsError):
    """The file is not the one that is listed; correct the digest or the source."""


@dataclass(frozen=True)
class Download:
    """The bytes of a file from `first` on: 0 where the place cannot begin elsewhere."""

    first: int
    pieces: Iterator[bytes]


class RemoteFolder(Protocol):
    """A folder of weights that is kept elsewhere. Every method raises WeightsError."""

    kind: str  # s3 or hub

    def names(self) -> list[str]:
        """List the files below the folder, as paths from it."""

    def size_bytes(self, name: str) -> int:
        """Return the size of a file."""

    def open(self, name: str, first: int = 0) -> AbstractContextManager[Download]:
        """Read a file as it arrives, from byte `first` on."""


def open_folder(source: RemoteSource, settings: DeviceSettings) -> RemoteFolder:
    """Return the folder that a source names; nothing is asked of it yet."""
    if isinstance(source, S3Source):
        return S3Folder(source, settings)
    return HubFolder(source, settings)


def _below(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


# --- S3 ---


class S3Folder:
    """A prefix of a bucket."""

    kind = "s3"

    def __init__(self, source: S3Source, settings: DeviceSettings) -> None:
        self._source = source
        self._settings = settings

    @cached_property
    def _client(self) -> Any:
        return _s3_client(self._settings)

    def names(self) -> list[str]:
        """List the files below the prefix."""
        prefix = f"{self._source.path}/" if self._source.path else ""
        with self._told(prefix):
            pages = self._client.get_paginator("list_objects_v2")
            return [
                each["Key"].removeprefix(prefix)
                for page in pages.paginate(Bucket=self._source.bucket, Prefix=prefix)
                for each in page.get("Contents", ())
            ]

    def size_bytes(self, name: str) -> int:
        """Return the size of an object."""
        with self._told(name):
            return int(self._client.head_object(**self._place(name))["ContentLength"])

    @contextmanager
    def open(self, name: str, first: int = 0) -> Iterator[Download]:
        """Read an object from byte `first` on."""
        part = {"Range": f"bytes={first}-"} if first else {}
        with self._told(name):
            answer = self._client.get_object(**self._place(name), **part)
            with closing(answer["Body"]) as body:
                begins = first if answer.get("ContentRange") else 0
                yield Download(begins, body.iter_chunks(PIECE_BYTES))

    def _place(self, name: str) -> dict[str, str]:
        return {"Bucket": self._source.bucket, "Key": _below(self._source.path, name)}

    def _told(self, name: str) -> wrap:
        """Turn boto3's errors into ours, which name the file."""
        from botocore.exceptions import BotoCoreError, ClientError

        place = f"s3://{self._source.bucket}/{_below(self._source.path, name)}"
        return wrap((BotoCoreError, ClientError), lambda error: _s3_problem(place, error))


def _s3_client(settings: DeviceSettings) -> Any:
    import boto3
    from botocore.config import Config

    endpoint = settings.model_s3_endpoint_url
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path" if endpoint else "auto"},
        response_checksum_validation="when_required",
        connect_timeout=5,
        read_timeout=30,
        retries={"mode": "standard", "max_attempts": 1},  # the cache tries again, and resumes
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings.model_s3_region,
        aws_access_key_id=_secret(settings.model_s3_access_key_id),
        aws_secret_access_key=_secret(settings.model_s3_secret_access_key),
        config=config,
    )


def _secret(given: SecretStr | None) -> str | None:
    return None if given is None else given.get_secret_value()


def _s3_problem(place: str, error: Any) -> WeightsError:
    """Say what boto3 met, without anything that is signed."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _by_status(place, int(status), _S3_KEYS)
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return SourceRefused(f"{place}: this machine has no keys for it ({_S3_KEYS})")
    passes = isinstance(
        error,
        exceptions.ConnectionError
        | exceptions.HTTPClientError
        | exceptions.IncompleteReadError
        | exceptions.ResponseStreamingError,
    )
    kind = SourceUnavailable if passes else SourceRefused
    return kind(f"{place}: {type(error).__name__}")


def _by_status(place: str, status: int, keys: str) -> WeightsError:
    if status in _PASSING:
        return SourceUnavailable(f"{place}: answered with status {status}")
    if status == 404:
        return SourceRefused(f"{place}: is not there")
    if status in (401, 403):
        return SourceRefused(f"{place}: may not be read with the keys of this machine ({keys})")
    return SourceRefused(f"{place}: answered with status {status}")


# --- the hub ---


class HubFolder:
    """A folder of a repository at one commit.

    Without the hub's own library, whose downloads go into a cache of another layout, without a
    budget and without our digests, and which HF_HUB_OFFLINE closes: workers have that set, so that
    nothing else is ever fetched.
    """

    kind = "hub"

    def __init__(self, source: HubSource, settings: DeviceSettings) -> None:
        self._source = source
        self._endpoint = settings.hf_endpoint.rstrip("/")
        self._token = _secret(settings.hf_token)

    @cached_property
    def _http(self) -> httpx.Client:
        # Sizes and ranges are those of the file only if nothing is compressed on the way.
        headers = {"Accept-Encoding": "identity", "User-Agent": f"darkroom/{VERSION}"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        return httpx.Client(headers=headers, follow_redirects=True, timeout=_TIMES)

    def names(self) -> list[str]:
        """List the files of the repository below the folder."""
        prefix = f"{self._source.path}/" if self._source.path else ""
        place = f"{self._endpoint}/api/models/{self._source.repo}/revision/{self._source.commit}"
        with self._told(""):
            answer = self._checked("", self._http.get(place))
            found = [str(each["rfilename"]) for each in answer.json()["siblings"]]
        return [name.removeprefix(prefix) for name in found if name.startswith(prefix)]

    def size_bytes(self, name: str) -> int:
        """Return the size of a file."""
        with self._told(name):
            answer = self._checked(name, self._http.head(self._url(name)))
            return int(answer.headers.get("X-Linked-Size") or answer.headers["Content-Length"])

    @contextmanager
    def open(self, name: str, first: int = 0) -> Iterator[Download]:
        """Read a file from byte `first` on."""
        part = {"Range": f"bytes={first}-"} if first else {}
        with self._told(name), self._http.stream("GET", self._url(name), headers=part) as answer:
            self._checked(name, answer)
            begins = first if answer.status_code == 206 else 0
            yield Download(begins, answer.iter_bytes(PIECE_BYTES))

    def _url(self, name: str) -> str:
        path = quote(_below(self._source.path, name))
        return f"{self._endpoint}/{self._source.repo}/resolve/{self._source.commit}/{path}"

    def _checked(self, name: str, answer: httpx.Response) -> httpx.Response:
        """Return the answer. Raises WeightsError unless it has what was asked for."""
        if answer.is_success:
            return answer
        raise _by_status(self._place(name), answer.status_code, "HF_TOKEN")

    def _place(self, name: str) -> str:
        """Name a file as fleet.toml does."""
        path = _below(self._source.path, name)
        return f"hf:{self._source.repo}@{self._source.commit}/{path}".rstrip("/")

    def _told(self, name: str) -> wrap:
        place = self._place(name)

        def problem(error: Exception) -> WeightsError:
            passes = isinstance(error, httpx.TransportError)
            kind = SourceUnavailable if passes else SourceRefused
            return kind(f"{place}: {type(error).__name__}")

        return wrap((httpx.HTTPError, KeyError, ValueError), problem)
