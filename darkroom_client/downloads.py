"""Images on their way into files: names, digests, and a write that is whole or not at all."""

import hashlib
import os
import uuid
from pathlib import Path

from darkroom_client.jobs import Image, Job

_EXTENSIONS = {"image/png": "png", "image/webp": "webp", "image/jpeg": "jpg"}


def path_of(folder: Path, job: Job, image: Image, names: str) -> Path:
    """Return the path at which to store an image.

    names: the file name, in which {job}, {index} and {seed} are filled in. The extension follows
    the image's content type and is always one of those known here.
    """
    extension = _EXTENSIONS.get(image.content_type or "") or _EXTENSIONS.get(
        f"image/{job.output_format}", "bin"
    )
    return folder / f"{names.format(job=job.id, index=image.index, seed=job.seed)}.{extension}"


def is_there(path: Path, content_sha256: str) -> bool:
    """Tell whether the file has exactly the bytes with this digest."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == content_sha256
    except FileNotFoundError:
        return False


def write(path: Path, content: bytes) -> None:
    """Write the file, and create the folders above it.

    The write is atomic: a reader, also one after a crash, sees the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
