"""Pixels to bytes: PNG, WebP or JPEG, with the same bytes for the same pixels on the same Pillow."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Format:
    content_type: str
    extension: str
    options: dict[str, Any]


# PNG level 1: level 6 saves a tenth of the bytes for more than twice the time.
FORMATS = {
    "png": Format("image/png", "png", {"format": "PNG", "compress_level": 1}),
    "webp": Format("image/webp", "webp", {"format": "WEBP", "lossless": True, "method": 0}),
    "jpeg": Format("image/jpeg", "jpg", {"format": "JPEG", "quality": 92, "subsampling": 0}),
}


def encode(pixels: NDArray[np.uint8], output_format: str) -> bytes:
    """Encode RGB uint8 [h, w, 3]; no metadata is written. KeyError for a format that is not in FORMATS."""
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(buffer, **FORMATS[output_format].options)
    return buffer.getvalue()
