"""Turn pictures into what a native family's networks take: the init image and the mask.

It also checks their sizes.

Bit for bit the numbers that diffusers' `VaeImageProcessor` makes of a PIL image of the same size,
laid out in memory as it lays out a tensor: channels outermost. A PIL image it leaves with channels
innermost, latents inherit that, and a convolution adds in another order then; as latents of both
kinds meet in one forward, an image's bits would depend on its neighbours. So parity with
`pipe(...)` is parity with `pipe(image=tensor)`; `pipe(image=pil)` differs in the last bits of
float32. It knows no network.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.errors import UnsupportedRequest
from engine.request import ImageRequest, Picture
from engine.transfers import to_device


def picture_tensor(picture: Picture, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give the pixels as a VAE encodes them: [1, 3, h, w] in -1..1.

    Computed in float32 on the CPU, then moved.
    """
    unit = torch.from_numpy(picture.pixels.astype(np.float32) / 255.0)
    return to_device(2.0 * unit.permute(2, 0, 1)[None].contiguous() - 1.0, device, dtype)


def mask_tensor(picture: Picture) -> Tensor:
    """Return the mask as [1, 1, h, w] float32 on the CPU.

    1.0 where the image is repainted (128 and more of 255), 0.0 where it is kept.
    """
    unit = torch.from_numpy(picture.pixels.astype(np.float32) / 255.0)
    return (unit >= 0.5).to(torch.float32)[None, None]


def check_pixels(request: ImageRequest) -> None:
    """Raise `UnsupportedRequest`, naming the field, for a picture of another size or kind."""
    size = (request.height_px, request.width_px)
    if request.init_image is not None:
        _check_pixels("init_image", request.init_image, (*size, 3))
    if request.mask is not None:
        _check_pixels("mask", request.mask, size)


def _check_pixels(field_name: str, picture: Picture, shape: tuple[int, ...]) -> None:
    pixels = picture.pixels
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise UnsupportedRequest(
            field_name, f"is {list(pixels.shape)} of {pixels.dtype}, must be {list(shape)} of uint8"
        )
