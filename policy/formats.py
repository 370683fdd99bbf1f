"""List the formats in which images are stored and delivered."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageFormat:
    """A format. content_type: as HTTP says it.  extension: of file names, without its dot."""

    content_type: str
    extension: str


FORMATS = {
    "png": ImageFormat("image/png", "png"),
    "webp": ImageFormat("image/webp", "webp"),
    "jpeg": ImageFormat("image/jpeg", "jpg"),
}


def extension_of(content_type: str) -> str:
    """Find the file name extension of a stored image. Raises KeyError for an unknown type."""
    return {kind.content_type: kind.extension for kind in FORMATS.values()}[content_type]
