"""Encode pixels as PNG, WebP or JPEG: the same bytes for the same pixels on the same Pillow."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Pillow's options for each of `policy.formats`. PNG level 1: level 6 saves a tenth of the bytes and
# takes more than twice the time.
OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "lossless": True, "method": 0},
    "jpeg": {"format": "JPEG", "quality": 92, "subsampling": 0},
}


def encode(pixels: NDArray[np.uint8], output_format: str) -> bytes:
    """Encode RGB uint8 [h, w, 3]; no metadata is written. Raises KeyError for an unknown format."""
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(buffer, **OPTIONS[output_format])
    return buffer.getvalue()
