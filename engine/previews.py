"""Small pictures of what an image will become, while it is still being denoised.

The clean latents that a sampler foresees are projected to RGB by one small matrix per family, a
fraction of a millisecond where the VAE takes seconds; the noisy latents themselves would show noise
until the end. It does not know who watches, nor how a family packs its latents: what comes in is
unpacked, and scaled as the denoiser sees it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engine.transfers import to_device

Rgb = tuple[float, float, float]

# How a scheduler class of diffusers writes noisy latents x of clean latents x0 and unit noise n.
# x = sqrt(acp) x0 + sqrt(1 - acp) n.
BY_TIMESTEP = frozenset({"DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"})
# x = (x0 + sigma n) / sqrt(1 + sigma^2), or as flow.
BY_SIGMA = frozenset({"DPMSolverMultistepScheduler", "UniPCMultistepScheduler"})
# x = x0 + sigma n.
UNSCALED = frozenset({"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"})
# x = (1 - sigma) x0 + sigma n, and the prediction is n - x0.
FLOW = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"})


def clean_latents(
    sampler: Any, latents: Tensor, prediction: Tensor, timestep: Tensor
) -> Tensor | None:
    """Give the clean latents that a prediction implies, in float32.

    None for a sampler this house does not know.

    To be asked before `sampler.step` with the same arguments: latents x_t as the sampler keeps them
    (before `scale_model_input`), the guided prediction of the same shape, whatever that is, and a
    timestep of the sampler's own. The sampler is left untouched, also before its first step. Any
    clipping that its config asks for is left out: latents have no range to be clipped to.
    """
    name = type(sampler).__name__
    level = _noise_level(sampler, timestep)
    if level is None:
        return None
    signal, noise = level
    noisy = latents.float() * signal if name in UNSCALED else latents.float()
    predicted = prediction.float()
    match "flow_prediction" if name in FLOW else sampler.config.prediction_type:
        case "epsilon":
            return (noisy - noise * predicted) / signal
        case "v_prediction":
            return signal * noisy - noise * predicted
        case "flow_prediction":
            return noisy - noise * predicted
        case "sample" | "original_sample":
            return predicted
    return None


def _noise_level(sampler: Any, timestep: Tensor) -> tuple[float, float] | None:
    """Return the factors of clean latents and of noise that are in the latents at this timestep.

    None for a sampler this house does not know.
    """
    name = type(sampler).__name__
    if name in BY_TIMESTEP:
        signal_share = float(sampler.alphas_cumprod[int(timestep)])
        return math.sqrt(signal_share), math.sqrt(1 - signal_share)
    if name not in BY_SIGMA | UNSCALED | FLOW:
        return None
    sigma = float(sampler.sigmas[_step_index(sampler, timestep)])
    if name in FLOW or sampler.config.get("use_flow_sigmas", False):
        return 1 - sigma, sigma
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def _step_index(sampler: Any, timestep: Tensor) -> int:
    """Return the sampler's place in its schedule.

    Before its first step, when it has not looked for it yet, it is where it will start.
    """
    for index in (sampler.step_index, sampler.begin_index):
        if index is not None:
            return int(index)
    return int(sampler.index_for_timestep(timestep))


@dataclass(frozen=True)
class Projector:
    """A map from latent channels to red, green and blue, all nominally in -1..1.

    It is linear, or uses the products of channels as well.
    """

    factors: tuple[Rgb, ...]  # one row per latent channel
    bias: Rgb
    # One row per pair of channels, itself included: 00, 01, .. 0c, 11, .. cc; mostly not needed.
    squares: tuple[Rgb, ...] = ()
    # How much of each colour's variance a fit explains; None for a published table.
    r_squared: Rgb | None = None

    def project(self, latents: Tensor) -> Tensor:
        """Give one pixel per latent, [h, w, 3] uint8, of unpacked latents [1, c, h, w].

        On their device, without waiting for it.
        """
        terms = _terms(latents[0].float().permute(1, 2, 0), with_squares=bool(self.squares))
        factors = to_device(torch.tensor(self.factors + self.squares), latents.device)
        rgb = terms @ factors + to_device(torch.tensor(self.bias), latents.device)
        return ((rgb * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def _terms(channels: Tensor, *, with_squares: bool) -> Tensor:
    """Return what is weighted and summed up: channels [..., c].

    Where asked, all products of two of them follow.
    """
    if not with_squares:
        return channels
    one, other = torch.triu_indices(channels.shape[-1], channels.shape[-1], device=channels.device)
    return torch.cat([channels, channels[..., one] * channels[..., other]], dim=-1)


# Least-squares fits of each family's own VAE on photographs, for latents as the denoiser sees them:
# shifted, then scaled. Published with InvokeAI (Apache-2.0, invokeai/app/util/step_callback.py),
# after the forum thread "Decoding latents to RGB without upscaling".
FACTORS: dict[str, Projector] = {
    "sd": Projector(
        (
            (0.3444, 0.1385, 0.0670),
            (0.1247, 0.4027, 0.1494),
            (-0.3192, 0.2513, 0.2103),
            (-0.1307, -0.1874, -0.7445),
        ),
        (0.0, 0.0, 0.0),
    ),
    "sdxl": Projector(
        (
            (0.3816, 0.4930, 0.5320),
            (-0.3753, 0.1631, 0.1739),
            (0.1770, 0.3588, -0.2048),
            (-0.4350, -0.2644, -0.4289),
        ),
        (0.0, 0.0, 0.0),
    ),
    "sd3": Projector(
        (
            (-0.05240681, 0.03251581, 0.0749016),
            (-0.0580572, 0.00759826, 0.05729818),
            (0.16144888, 0.01270368, -0.03768577),
            (0.14418615, 0.08460266, 0.15941818),
            (0.04894035, 0.0056485, -0.06686988),
            (0.05187166, 0.19222395, 0.06261094),
            (0.1539433, 0.04818359, 0.07103094),
            (-0.08601796, 0.09013458, 0.10893912),
            (-0.12398469, -0.06766567, 0.0033688),
            (-0.0439737, 0.07825329, 0.02258823),
            (0.03101129, 0.06382551, 0.07753657),
            (-0.01315361, 0.08554491, -0.08772475),
            (0.06464487, 0.05914605, 0.13262741),
            (-0.07863674, -0.02261737, -0.12761454),
            (-0.09923835, -0.08010759, -0.06264447),
            (-0.03392309, -0.0804029, -0.06078822),
        ),
        (0.0, 0.0, 0.0),
    ),
    "flux": Projector(
        (
            (-0.0412, 0.0149, 0.0521),
            (0.0056, 0.0291, 0.0768),
            (0.0342, -0.0681, -0.0427),
            (-0.0258, 0.0092, 0.0463),
            (0.0863, 0.0784, 0.0547),
            (-0.0017, 0.0402, 0.0158),
            (0.0501, 0.1058, 0.1152),
            (-0.0209, -0.0218, -0.0329),
            (-0.0314, 0.0083, 0.0896),
            (0.0851, 0.0665, -0.0472),
            (-0.0534, 0.0238, -0.0024),
            (0.0452, -0.0026, 0.0048),
            (0.0892, 0.0831, 0.0881),
            (-0.1117, -0.0304, -0.0789),
            (0.0027, -0.0479, -0.0043),
            (-0.1146, -0.0827, -0.0598),
        ),
        (0.0, 0.0, 0.0),
    ),
}


SIDE_LATENTS = 16  # of a picture to fit on
# From this R squared of every colour on, products of channels add too little to be worth it.
LINEAR_ENOUGH = 0.8


def fit(
    encode: Callable[[Tensor], Tensor],
    *,
    latent_channels: int,
    pixels_per_latent: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Projector:
    """Fit a projector to a checkpoint's own VAE by least squares over drawn pictures.

    Its `r_squared` says how well that went.

    encode: pixels [n, 3, H, W] in -1..1, of `dtype` on `device`, to unpacked latents [n,
    latent_channels, h, w] as the denoiser sees them; called four times, with up to 16 pictures of
    16x16 latents. The same VAE gives the same projector. Large VAEs are close to linear; one as
    small as pocket's is not, and gets products of channels too. Raises `ValueError` for latents of
    another shape.
    """
    latents = []
    colours = []
    for pictures in _drawn_pictures(pixels_per_latent):
        encoded = encode(pictures.to(device, dtype))
        expected = (len(pictures), latent_channels, SIDE_LATENTS, SIDE_LATENTS)
        if tuple(encoded.shape) != expected:
            raise ValueError(
                f"encode gave latents {tuple(encoded.shape)} where {expected} were expected"
            )
        latents.append(encoded.permute(0, 2, 3, 1).reshape(-1, latent_channels).cpu().double())
        pooled = torch.nn.functional.avg_pool2d(pictures, pixels_per_latent)
        colours.append(pooled.permute(0, 2, 3, 1).reshape(-1, 3).double())
    given = torch.cat(latents)
    wanted = torch.cat(colours)
    linear = _least_squares(given, wanted, with_squares=False)
    is_enough = linear.r_squared is not None and min(linear.r_squared) >= LINEAR_ENOUGH
    return linear if is_enough else _least_squares(given, wanted, with_squares=True)


def _least_squares(latents: Tensor, colours: Tensor, *, with_squares: bool) -> Projector:
    """Give the best map from latents [n, c] to colours [n, 3] in -1..1, both in float64."""
    terms = torch.cat(
        [_terms(latents, with_squares=with_squares), latents.new_ones(len(latents), 1)], dim=1
    )
    solution = torch.linalg.lstsq(terms, colours).solution
    unexplained = (terms @ solution - colours).square().sum(0)
    r_squared = 1 - unexplained / (colours - colours.mean(0)).square().sum(0)
    *weights, bias = (_rgb(row) for row in solution)
    num_channels = latents.shape[1]
    return Projector(
        tuple(weights[:num_channels]), bias, tuple(weights[num_channels:]), _rgb(r_squared)
    )


def _drawn_pictures(pixels_per_latent: int) -> list[Tensor]:
    """Draw large and small flat patches, gradients and chequers in vivid colours.

    Each is [n, 3, H, W] in -1..1. They are always the same ones.
    """
    colours = partial(_vivid_colours, torch.Generator("cpu").manual_seed(0))
    enlarged = partial(_enlarged, SIDE_LATENTS * pixels_per_latent)
    squares = torch.arange(SIDE_LATENTS // 4)
    is_dark = ((squares[:, None] + squares) % 2).bool()
    return [
        enlarged(colours(16, 2), "nearest"),
        enlarged(colours(8, 4), "nearest"),
        enlarged(colours(8, 3), "bicubic"),
        enlarged(torch.where(is_dark, colours(8, 1), colours(8, 1)), "nearest"),
    ]


def _vivid_colours(generator: torch.Generator, num_pictures: int, cells: int) -> Tensor:
    even = torch.rand((num_pictures, 3, cells, cells), generator=generator) * 2 - 1
    # Drawn towards the corners of the cube: evenly drawn ones are mostly greyish.
    return even.sign() * even.abs().sqrt()


def _enlarged(side_px: int, colours: Tensor, mode: str) -> Tensor:
    size = (side_px, side_px)
    return torch.nn.functional.interpolate(colours, size=size, mode=mode).clamp(-1, 1)


def _rgb(values: Tensor) -> Rgb:
    """Round to plain numbers of six decimals.

    lstsq is not exact to the last bit from one call to the next.
    """
    red, green, blue = (round(value, 6) for value in values.tolist())
    return red, green, blue


def jpeg(pixels: NDArray[np.uint8], *, size_px: int = 256, quality: int = 80) -> bytes:
    """Pack pixels [h, w, 3] as a JPEG whose longer side is `size_px`.

    It is scaled up smoothly, for a preview has fewer pixels than the image.
    """
    picture = Image.fromarray(pixels)
    scale = size_px / max(picture.size)
    width_px, height_px = (max(1, round(side * scale)) for side in picture.size)
    packed = io.BytesIO()
    picture.resize((width_px, height_px), Image.Resampling.BILINEAR).save(
        packed, "JPEG", quality=quality
    )
    return packed.getvalue()


class Pace:
    """How often one image shows a preview.

    One that comes too early is not kept: the next step's is better anyway.
    """

    def __init__(self, per_s: float) -> None:
        self._interval_s = 1 / per_s if per_s > 0 else math.inf
        self._next_s = -math.inf if per_s > 0 else math.inf

    def may_show(self, now_s: float) -> bool:
        """Tell whether the image may show a preview at `now_s`; a yes counts as shown.

        `now_s` is on any clock that only goes forward.
        """
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._interval_s
        return True
