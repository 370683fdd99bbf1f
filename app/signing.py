"""Sign links that need no API key."""

import base64
import hmac
import time
import uuid


class LinkSigner:
    """Signs links with a key that is derived from the pepper of the API keys.

    Every gateway process derives the same key, so each accepts the links of the others.
    """

    def __init__(self, pepper: str, *, ttl_s: int) -> None:
        self._key = hmac.digest(pepper.encode(), b"darkroom: links to images", "sha256")
        self._ttl_s = ttl_s

    def signed(self, artifact_id: uuid.UUID) -> dict[str, str]:
        """Return the query of a link: when it expires, and its signature."""
        expires = str(int(time.time()) + self._ttl_s)
        return {"expires": expires, "signature": self._signature(artifact_id, expires)}

    def is_good(self, artifact_id: uuid.UUID, expires: str, signature: str) -> bool:
        """Check that the signature is ours and that the link has not expired."""
        if not (
            expires.isascii() and expires.isdigit() and len(expires) <= 12 and signature.isascii()
        ):
            return False
        is_ours = hmac.compare_digest(signature, self._signature(artifact_id, expires))
        return is_ours and time.time() < int(expires)

    def _signature(self, artifact_id: uuid.UUID, expires: str) -> str:
        digest = hmac.digest(self._key, f"{artifact_id} {expires}".encode(), "sha256")
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")
