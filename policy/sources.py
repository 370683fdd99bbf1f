"""Read where the weights of a version or an adapter are kept: a folder, S3, or the hub.

Pure. What is fetched from elsewhere is named file by file in fleet.toml, with its digest.
"""

import re
from dataclasses import dataclass

# The files that are ever fetched: no pickles, no code.
FETCHED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")
ACCEPTED = (
    'a folder, "s3://BUCKET/PREFIX", or "hf:ORG/REPO@COMMIT" with all 40 hex digits of the commit'
)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_HUB = re.compile(r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})@(?P<commit>[0-9a-f]{40})(?:/(?P<path>.+))?")
_SCHEME = re.compile(r"(?:[a-z][a-z0-9+.-]*://|hf:)")


@dataclass(frozen=True)
class S3Source:
    """A prefix of a bucket. path: without slashes at its ends; "" is the whole bucket."""

    bucket: str
    path: str


@dataclass(frozen=True)
class HubSource:
    """A folder of a repository of the Hugging Face hub at one commit. path: as of S3Source."""

    repo: str
    commit: str
    path: str


RemoteSource = S3Source | HubSource


def remote_source(text: str) -> RemoteSource | None:
    """Return where the files are kept; None for a folder or file of this machine.

    Raises ValueError, which says what is accepted.
    """
    scheme = _SCHEME.match(text)
    if scheme is None:
        return None
    rest = text[scheme.end() :]
    if scheme[0] == "s3://":
        bucket, _, path = rest.partition("/")
        path = path.strip("/")
        if _BUCKET.fullmatch(bucket) and (not path or is_plain_path(path)):
            return S3Source(bucket, path)
    if scheme[0] == "hf:" and (found := _HUB.fullmatch(rest)):
        path = (found["path"] or "").strip("/")
        if not path or is_plain_path(path):
            return HubSource(found["repo"], found["commit"], path)
    raise ValueError(f"{text!r} is no place of weights; accepted: {ACCEPTED}")


def is_plain_path(name: str) -> bool:
    """Tell whether a name leads down from a folder, without `..` or a leading slash."""
    parts = name.split("/")
    return "\\" not in name and name.isprintable() and not {"", ".", ".."} & set(parts)


def is_fetched(name: str) -> bool:
    """Tell whether a file of this name may be fetched from elsewhere."""
    return is_plain_path(name) and name.endswith(FETCHED_SUFFIXES)
