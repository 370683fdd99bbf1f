"""Serve /v1: which version answers, and where its API is described. It needs no key."""

from flask import Blueprint, url_for
from flask.typing import ResponseReturnValue

from app.http.answers import answer
from app.schemas import about as schemas
from policy.version import VERSION

bp = Blueprint("about", __name__)


@bp.get("/v1", strict_slashes=False)  # programs know the address with a slash at its end, too
def show_about() -> ResponseReturnValue:
    urls = schemas.AboutUrls(
        openapi=url_for("openapi.show_spec"), docs=url_for("openapi.show_docs")
    )
    return answer(schemas.About(version=VERSION, urls=urls))
