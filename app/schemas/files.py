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


@document("Where the file is found.")
class FileUrls:
    self: Annotated[Link, says("GET shows the record, DELETE erases the picture.")]


@document("A picture of the tenant's: what jobs start from, by its id.")
class File:
    id: UUID
    object: Literal["file"] = "file"
    width_px: Annotated[int, says("Its width.")]
    height_px: Annotated[int, says("Its height.")]
    mode: Annotated[
        Annotated[str, one_of(("L", "RGB", "RGBA"))],
        says("Grey, colour, or with transparency."),
    ]
    size_bytes: Annotated[int, says("The size of the file as it is kept.")]
    content_type: Annotated[Literal["image/png"], says("All are kept as PNG.")] = "image/png"
    content_sha256: Annotated[Sha256, says("Of the file as it is kept.")]
    created_at: Annotated[Instant, says("When it was first brought.")]
    url: Annotated[Link, says("Where the picture itself is found.")]
    urls: FileUrls


@document("Pictures, newest first.")
class FilePage(Page):
    data: Annotated[list[File], says("The pictures of this page.")]


class FileForm(TypedDict):
    """The form of POST /v1/files."""

    file: Annotated[Upload, says("The picture: PNG, JPEG or WebP.")]
