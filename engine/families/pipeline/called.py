"""The parts that both pipeline families share: a loaded pipeline, and one call of it per image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from torch import Tensor, nn

from engine.capabilities import Capabilities
from engine.config import CheckpointSpec
from engine.errors import EngineError, UnsupportedRequest
from engine.families.calls import NetworkCall
from engine.families.contract import Recall
from engine.families.coroutine import Ask
from engine.families.pipeline.folder import folder_names, index_sha256, load_pipeline
from engine.families.pipeline.running import PipelineCalls, running_of
from engine.families.pipeline.signature import CallSignature
from engine.inflight import InFlight
from engine.previews import Projector, fit
from engine.request import ImageRequest
from engine.texts import ReadTexts


class CalledPipeline(ABC):
    """One loaded pipeline of diffusers. Implements most of `contract.Family`."""

    follows_stream = False  # a call stays on the stream it began on

    def __init__(
        self,
        pipe: Any,
        spec: CheckpointSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Sort the pipeline's networks. Raises `UnsupportedRequest` for options it has not."""
        self.device = device
        self.dtype = dtype
        self._pipe = pipe
        self._spec = spec
        parts = pipe.components
        names = [name for name, part in parts.items() if isinstance(part, nn.Module)]
        networks: dict[str, Any] = {name: parts[name] for name in names}
        ours = {name: part for name, part in networks.items() if _is_of_diffusers(part)}
        self._decoders = {name: part for name, part in ours.items() if hasattr(part, "decode")}
        self._denoisers = {name: part for name, part in ours.items() if name not in self._decoders}
        encoders = [name for name in networks if name.startswith("text_encoder")]
        self._text_encoders = {name: networks[name] for name in encoders}
        self._index_sha256 = index_sha256(Path(spec.path))
        scale = int(getattr(pipe, "vae_scale_factor", 8))
        # UNets shrink latents themselves, and their pipelines ask for multiples of 8; transformers
        # take them in patches of 2x2.
        self.pixels_per_latent: int = max(8, scale) if "unet" in ours else 2 * scale
        self._signature = CallSignature(
            pipe,
            spec,
            is_controlled="controlnet" in networks,
            pixels_per_latent=self.pixels_per_latent,
        )
        self._rows = {False: 1, True: 1}  # of a forward, by whether the image is guided
        self._calls = PipelineCalls(pipe, decoders=self._decoders, device=device)

    @classmethod
    def folders(cls, path: Path) -> tuple[str, ...]:
        return folder_names(path)

    @classmethod
    def load(cls, spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device) -> Self:
        """Read a pipeline and make trial calls at the smallest size.

        Raises `CheckpointCorrupt`, and `UnsupportedRequest` for a pipeline class or options that
        cannot be served.
        """
        pipe = load_pipeline(spec, dtype=dtype, device=device)
        family = cls(pipe, spec, dtype=dtype, device=device)
        with torch.inference_mode():
            family._try()
        return family

    @abstractmethod
    def _try(self) -> None:
        """Find out by calling what cannot be read off the pipeline's signature."""

    def networks(self) -> Mapping[str, nn.Module]:
        return self._denoisers | self._text_encoders

    def modules(self) -> Sequence[nn.Module]:
        parts = self._pipe.components.values()
        return list(dict.fromkeys(part for part in parts if isinstance(part, nn.Module)))

    def facts(self) -> dict[str, Any]:
        decoders = self._decoders.values()
        return {
            "pipeline": self._signature.name,
            "model_index": self._index_sha256,
            "options": dict(self._spec.options),
            "attention_backend": DIFFUSERS_ATTN_BACKEND,
            "attention": {name: _attention_of(part) for name, part in self._denoisers.items()},
            "text_attention": {
                name: str(getattr(part.config, "_attn_implementation", None))  # "sdpa", "eager"…
                for name, part in self._text_encoders.items()
            },
            "vae_tiling": any(getattr(decoder, "use_tiling", False) for decoder in decoders),
            "vae_slicing": any(getattr(decoder, "use_slicing", False) for decoder in decoders),
        }

    # --- of a request ---

    @cached_property
    def capabilities(self) -> Capabilities:
        return self._signature.describe(self._spec.family, self._rows)

    def check(self, request: ImageRequest) -> None:
        self.capabilities.check(request)
        self._signature.check(request)

    def rows(self, request: ImageRequest) -> int:
        """Give as many as the trial took."""
        return self._rows[request.is_guided]

    def text_length(self, request: ImageRequest) -> int:
        """Give 0: how long a prompt has become shows in the calls, and so in their names."""
        return 0

    def read_texts(self, request: ImageRequest) -> ReadTexts:
        """Tell nothing: what a call makes of its texts is its own affair."""
        return ReadTexts()

    # --- of an image ---

    def _begin(self, image: InFlight, **more: Any) -> None:
        """Let the image hold its call, not begun yet, with `more` than its request's arguments."""

        def call(pipe: Any, ask: Ask) -> Any:
            self._let_ask(pipe, image, ask)
            return pipe(**self._signature.arguments(image.request) | more)

        self._calls.begin(image, call)

    @abstractmethod
    def _let_ask(self, pipe: Any, image: InFlight, ask: Ask) -> None:
        """Put into the image's own copy of the pipeline what will ask; in the call's own thread."""

    def _make(self, call: NetworkCall) -> Any:
        return self._denoisers[call.network](*call.args, **call.kwargs)

    def clean_latents(self, image: InFlight) -> Tensor | None:
        """Give what the last step predicted.

        None also where latents are packed, and of a sampler that the house does not know.
        """
        return running_of(image).clean

    def decode(self, image: InFlight) -> Tensor:
        """Run the call to its end; pixels [1, 3, h, w] in -1..1.

        In float64: pipelines give 0..1, and in less that would not survive -1..1 and back. A call
        that fails in here is over: to decode again fails too. Raises `UnsupportedRequest` for a
        picture of another size than the request's: the warm-up, which tries every size that is
        offered, ends the start with it.
        """
        running = running_of(image)
        while running.returned is None:
            asked = running.asked
            self._calls.go_on(image, None if asked is None else self._make(asked))
        pictures = running.returned.value[0]
        if isinstance(pictures, np.ndarray):
            pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        if not isinstance(pictures, Tensor) or pictures.shape[:-2] != (1, 3):
            raise EngineError(f"{self._signature.name} did not give one picture")
        self._check_size(image.request, pictures)
        return pictures.double() * 2 - 1

    def _check_size(self, request: ImageRequest, pictures: Tensor) -> None:
        height_px, width_px = pictures.shape[-2:]
        if (height_px, width_px) == (request.height_px, request.width_px):
            return
        reason = (
            f"{self._signature.name} makes {width_px}x{height_px} where"
            f" {request.width_px}x{request.height_px} is asked for: offer sizes that it makes"
        )
        if self._signature.size_options:
            reason += f", or set in its options {', '.join(self._signature.size_options)}"
        raise UnsupportedRequest("sizes", reason)

    def fork(self, image: InFlight, latents: Tensor, recall: Recall) -> None:
        """Refuse: the latents are the pipeline's own."""
        raise UnsupportedRequest("fork", f"is not for {self._signature.name}")

    def latents(self, image: InFlight) -> Tensor:
        """Refuse, likewise."""
        raise UnsupportedRequest("keep_steps", f"is not for {self._signature.name}")

    def release(self, image: InFlight) -> None:
        running = image.held
        image.held = None
        if running is not None:
            running.coroutine.close()

    def projector(self) -> Projector | None:
        """Fit one to the VAE, where that has one scale for its latents."""
        vae: Any = self._decoders.get("vae")
        if vae is None or "scaling_factor" not in vae.config:
            return None

        def encode(pictures: Tensor) -> Tensor:
            encoded = vae.encode(pictures, return_dict=False)[0]
            raw = encoded if isinstance(encoded, Tensor) else encoded.mode()
            shifted = raw - (vae.config.get("shift_factor") or 0)
            latents: Tensor = shifted * vae.config.scaling_factor
            return latents

        return fit(
            encode,
            latent_channels=vae.config.latent_channels,
            pixels_per_latent=self._pipe.vae_scale_factor,
            device=self.device,
            dtype=self.dtype,
        )


def _is_of_diffusers(network: nn.Module) -> bool:
    return type(network).__module__.startswith("diffusers.")


def _attention_of(network: Any) -> list[str]:
    """Name the classes of a network's attention."""
    return sorted({type(one).__name__ for one in getattr(network, "attn_processors", {}).values()})
