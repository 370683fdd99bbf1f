"""Find stored images for clients that present a signed link instead of an API key."""

from uuid import UUID

from app.problems import Erased, LinkExpired
from app.runtime import Runtime
from models.database import transaction
from models.tables import Artifact


def find_linked(runtime: Runtime, artifact_id: UUID, *, expires: str, signature: str) -> Artifact:
    """Return the image of a link that this gateway signed and that has not expired.

    Raises LinkExpired, and Erased once its job was erased.
    """
    if not runtime.links.is_good(artifact_id, expires, signature):
        raise LinkExpired("This link has expired, or was not made by this gateway.")
    with transaction(runtime.database) as session:
        artifact = session.get(Artifact, artifact_id)
    if artifact is None or artifact.erased_at is not None:
        raise Erased("The images of this job were deleted.")
    return artifact
