"""Serve links that show one image without an API key, for a while.

They stand in for presigned URLs where clients cannot reach the object store.
"""

import uuid

from flask import Blueprint, Response, request

from app.http import delivery
from app.http.context import runtime
from app.services import artifacts

bp = Blueprint("links", __name__)


@bp.get("/links/images/<uuid:artifact_id>")
def show_linked(artifact_id: uuid.UUID) -> Response:
    """Deliver the image of a link that this gateway signed and that has not expired.

    410 once its job was erased.
    """
    artifact = artifacts.find_linked(
        runtime(),
        artifact_id,
        expires=request.args.get("expires", ""),
        signature=request.args.get("signature", ""),
    )
    return delivery.content(delivery.StoredContent.image(artifact))
