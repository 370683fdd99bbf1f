"""Links that show one image to whoever has them, for a while: what a presigned URL is where clients do not reach the object store."""

import uuid

from flask import Blueprint, Response, request

from app.http import delivery
from app.http.context import runtime
from app.services import artifacts

bp = Blueprint("links", __name__)


@bp.get("/links/images/<uuid:artifact_id>")
def show_linked(artifact_id: uuid.UUID) -> Response:
    """Give the image of a link that this gateway wrote and that has not expired.

    410 once its job was erased.
    """
    artifact = artifacts.find_linked(
        runtime(),
        artifact_id,
        expires=request.args.get("expires", ""),
        signature=request.args.get("signature", ""),
    )
    return delivery.content(delivery.Stored.image(artifact))
