"""Plain diffusers, to compare with: whole calls of one `StableDiffusionPipeline`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from numpy.typing import NDArray

from engine.request import ImageRequest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PlainPipeline:
    """A checkpoint's pipeline with its own sampler."""

    def __init__(self, checkpoint: Path, precision: str, device: str) -> None:
        torch.set_num_threads(1)
        disable_progress_bar()
        options: dict[str, Any] = {
            "dtype": DTYPES[precision],
            "safety_checker": None,
            "use_safetensors": True,
        }
        self._pipe = StableDiffusionPipeline.from_pretrained(
            checkpoint, local_files_only=True, **options
        ).to(device)
        self._pipe.set_progress_bar_config(disable=True)

    def render(self, requests: Sequence[ImageRequest]) -> list[NDArray[np.uint8]]:
        """Render requests of one kind by one call; return their pixels [h, w, 3]."""
        images = self._pipe(
            [request.prompt for request in requests],
            negative_prompt=[request.negative_prompt for request in requests],
            num_inference_steps=requests[0].num_steps,
            guidance_scale=requests[0].guidance,
            generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
            output_type="np",
        ).images
        return list((images * 255).round().astype(np.uint8))
