"""Define the document that says which version answers."""

from typing import Annotated, Literal

from pydantic.fields import FieldInfo

from app.schemas.base import document, says

Address = Annotated[str, FieldInfo(json_schema_extra={"pattern": "^(/[^/]+)+$"})]


@document("Where an API is described.")
class AboutUrls:
    openapi: Annotated[Address, says("The OpenAPI document.")]
    docs: Annotated[Address, says("A page to read it and try it in a browser.")]


@document("What answers, and in which version.")
class About:
    name: Annotated[Literal["Darkroom"], says("The product that answers.")] = "Darkroom"
    version: Annotated[str, says("The release that this gateway runs.")]
    api_version: Annotated[
        Literal["v1"], says("The version of the API, with which its paths begin.")
    ] = "v1"
    urls: AboutUrls
