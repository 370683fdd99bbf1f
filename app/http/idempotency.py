"""Read the header Idempotency-Key: a structured-field string (RFC 9651), or one without quotes."""

import hashlib
import json
import re

from flask import Request

from app.problems import InvalidQuery
from models.idempotency import IdempotentRequest

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
MAX_KEY_CHARS = 255
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
# Visible ASCII without " , ; \ which would make the value a list or give it parameters.
_BARE = re.compile(r"[!#-+\--:<-\[\]-~]+")


def read_idempotent(request: Request, asks_for: object) -> IdempotentRequest | None:
    """Return the request's idempotency key with a digest of `asks_for`; None without a key.

    asks_for: plain JSON values. Raises InvalidQuery.
    """
    text = request.headers.get(HEADER)
    if text is None:
        return None
    canonical = json.dumps(
        [request.method, request.path, asks_for], sort_keys=True, separators=(",", ":")
    )
    return IdempotentRequest(read_key(text), hashlib.sha256(canonical.encode()).hexdigest())


def read_key(text: str) -> str:
    """Decode the header's value: `"abc"` and `abc` are the same key. Raises InvalidQuery."""
    text = text.strip(" \t")
    quoted = _QUOTED.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if not 1 <= len(key) <= MAX_KEY_CHARS or not (quoted or _BARE.fullmatch(text)):
        accepted = (
            f"1 to {MAX_KEY_CHARS} printable ASCII characters, in double quotes if there are"
            " spaces, commas, semicolons or quotes"
        )
        raise InvalidQuery(f"{HEADER} must be {accepted}.", header=HEADER, accepted=accepted)
    return key
