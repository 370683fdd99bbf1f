"""Links that show one image to whoever has them, for a while: what a presigned URL is where clients do not reach the object store."""

import uuid

from flask import Blueprint, Response, request

from app.http import delivery
from app.http.context import runtime
from app.problems import Erased, LinkExpired
from models.database import transaction
from models.tables import Artifact

bp = Blueprint("links", __name__)


@bp.get("/links/images/<uuid:artifact_id>")
def show_linked(artifact_id: uuid.UUID) -> Response:
    """The image of a link that this gateway wrote and that has not expired; 410 once its job was erased."""
    parts = runtime()
    if not parts.links.is_good(artifact_id, request.args.get("expires", ""), request.args.get("signature", "")):
        raise LinkExpired("This link has expired, or is not one of this gateway.")
    with transaction(parts.database) as session:
        artifact = session.get(Artifact, artifact_id)
    if artifact is None or artifact.erased_at is not None:
        raise Erased("The images of this job were deleted.")
    return delivery.content(delivery.Stored.image(artifact))
