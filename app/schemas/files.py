"""Define documents of the pictures that tenants upload."""

from typing import Annotated, Literal
from uuid import UUID

from pydantic import WithJsonSchema
from typing_extensions import TypedDict

from app.schemas.base import Instant, Link, Page, Sha256, document, one_of, says

Upload = Annotated[
    bytes,
    WithJsonSchema({"type": "string", "contentMediaType": "application/octet-stream"}),
]


@document("Links to the file.")
class FileUrls:
    self: Annotated[Link, says("GET shows this record, DELETE deletes the picture.")]


@document("A picture that you uploaded. Jobs can start from it, by its id.")
class File:
    id: UUID
    object: Literal["file"] = "file"
    width_px: Annotated[int, says("The width in pixels.")]
    height_px: Annotated[int, says("The height in pixels.")]
    mode: Annotated[
        Annotated[str, one_of(("L", "RGB", "RGBA"))],
        says("`L`: grey; `RGB`: colour; `RGBA`: with transparency."),
    ]
    size_bytes: Annotated[int, says("The size of the stored file.")]
    content_type: Annotated[Literal["image/png"], says("All pictures are stored as PNG.")] = (
        "image/png"
    )
    content_sha256: Annotated[Sha256, says("SHA-256 of the stored file.")]
    created_at: Annotated[Instant, says("When it was first uploaded.")]
    url: Annotated[Link, says("Link to the picture itself.")]
    urls: FileUrls


@document("Pictures, newest first.")
class FilePage(Page):
    data: Annotated[list[File], says("The pictures of this page.")]


class FileForm(TypedDict):
    """The form of POST /v1/files."""

    file: Annotated[Upload, says("The picture: PNG, JPEG or WebP.")]
