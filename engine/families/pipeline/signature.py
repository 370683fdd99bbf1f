"""What a pipeline's own call takes of a request, read off its signature and its scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from engine.capabilities import ROLES, Capabilities, Guidance, Need, NegativePrompt
from engine.config import CheckpointSpec
from engine.errors import UnsupportedRequest
from engine.request import ImageRequest, Option, Picture
from engine.samplers import FLOW_SAMPLERS, SAMPLERS, Recipe, sampler_limits

OWN_SAMPLER = "default"  # the checkpoint's own scheduler class and config
SAID_BY_THE_REQUEST = (
    *("prompt", "negative_prompt", "height", "width", "num_inference_steps"),
    *("generator", "strength", "clip_skip", "image", "mask_image", "control_image"),
)
SAID_BY_NOBODY = (
    *("num_images_per_prompt", "latents", "output_type", "return_dict"),
    *("callback", "callback_steps"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
# Options by which pipelines of diffusers choose another size than the one asked for.
SIZE_OPTIONS = ("max_area", "_auto_resize", "use_resolution_binning", "sample_size")


class CallSignature:
    """The arguments of one pipeline's call, and what requests may ask of it."""

    def __init__(
        self,
        pipe: Any,
        spec: CheckpointSpec,
        *,
        is_controlled: bool,
        pixels_per_latent: int,
    ) -> None:
        """Read the signature. Raises `UnsupportedRequest` for options that the call has not.

        is_controlled: is there a control network?  pixels_per_latent: along a side.
        """
        self.name = type(pipe).__name__
        self.pixels_per_latent = pixels_per_latent
        self._parameters = inspect.signature(type(pipe).__call__).parameters
        self._options = spec.options
        self._sampler_config: Mapping[str, Any] = pipe.scheduler.config
        self._samplers = _samplers_for(pipe.scheduler)
        self._most_clip_skip = _most_clip_skip(pipe)
        self._guidance = _guidance_parameter(self._parameters)
        self.pictures = _picture_parameters(self._parameters, is_controlled=is_controlled)
        self.needs_pictures = False  # a trial call may find out that it cannot do without
        self._check_options(spec.options)

    @property
    def knows_guidance(self) -> bool:
        """Tell whether the call has a guidance argument."""
        return self._guidance is not None

    @property
    def size_options(self) -> list[str]:
        """Name the options of the call that change the size of what it makes."""
        return [name for name in SIZE_OPTIONS if name in self._parameters]

    @property
    def can_double(self) -> bool:
        """Tell whether one call can make two images of one prompt."""
        return "num_images_per_prompt" in self._parameters

    # --- a request ---

    def describe(self, family: str, rows: Mapping[bool, int]) -> Capabilities:
        """Tell what may be asked of the call.

        rows: of a forward, by whether the image is guided.  Guidance is ignored, not refused, where
        the pipeline knows of none: every request has some.
        """
        need = Need.REQUIRED if self.needs_pictures else Need.OPTIONAL
        knows_guidance = self._guidance is not None and self._guidance not in self._options
        return Capabilities(
            family=family,
            side_multiple_px=self.pixels_per_latent,
            pictures={role: need if role in self.pictures else Need.NONE for role in ROLES},
            samplers=sampler_limits(self._sampler_config, self._samplers),
            takes_strength="strength" in self._parameters,
            default_strength=self._default_strength(),
            negative_prompt=self._negative_prompt(rows),
            guidance=Guidance.USED if knows_guidance else Guidance.IGNORED,
            max_clip_skip=self._most_clip_skip if "clip_skip" in self._parameters else 0,
            rows=rows[False],
            rows_guided=rows[True],
        )

    def check(self, request: ImageRequest) -> None:
        """Raise `UnsupportedRequest`, naming the field, for options, pictures' sizes and forks."""
        self._check_options(request.options)
        self._check_sizes(request)
        for name, is_asked in (
            ("fork", request.fork is not None),
            ("keep_steps", bool(request.keep_steps)),
        ):
            if is_asked:
                raise UnsupportedRequest(name, f"is not for {self.name}")

    def _default_strength(self) -> float:
        own = self._parameters["strength"].default if "strength" in self._parameters else None
        return float(own) if isinstance(own, int | float) else 1.0

    def _negative_prompt(self, rows: Mapping[bool, int]) -> NegativePrompt:
        """Tell what becomes of a negative prompt, as far as signature and trial calls show it.

        `true_cfg_scale` guides away from it where the call has that argument, above 1.
        """
        if "negative_prompt" not in self._parameters:
            return NegativePrompt.REFUSED
        scale = self._options.get("true_cfg_scale")
        if scale is None and self._guidance == "true_cfg_scale":
            return NegativePrompt.GUIDED
        if scale is None and "true_cfg_scale" in self._parameters:
            scale = self._parameters["true_cfg_scale"].default
        if isinstance(scale, int | float):
            return NegativePrompt.USED if scale > 1 else NegativePrompt.IGNORED
        takes_a_row = rows[False] == 1 and rows[True] > 1 and self._guidance not in self._options
        return NegativePrompt.GUIDED if takes_a_row else NegativePrompt.USED

    def _check_options(self, options: Mapping[str, Option]) -> None:
        taken = {*self._parameters} - {*SAID_BY_THE_REQUEST, *SAID_BY_NOBODY}
        for name in options:
            if name not in taken:
                raise UnsupportedRequest("options", f"{name!r} is no option of {self.name}")

    def _check_sizes(self, request: ImageRequest) -> None:
        asked = f"{request.width_px}x{request.height_px}"
        for name in self.pictures:
            picture: Picture | None = getattr(request, name)
            if picture is None:
                continue
            height_px, width_px = picture.pixels.shape[:2]
            if (width_px, height_px) != (request.width_px, request.height_px):
                raise UnsupportedRequest(name, f"is {width_px}x{height_px}, the image {asked}")

    def arguments(self, request: ImageRequest) -> dict[str, Any]:
        """Give what `pipe(...)` is called with.

        Guidance is what the pipeline takes it to be: Z-Image guides from 0 upward, not from 1.
        """
        wanted: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "height": request.height_px,
            "width": request.width_px,
            "num_inference_steps": request.num_steps,
            "strength": request.strength,
            "clip_skip": request.clip_skip or None,
            "generator": torch.Generator("cpu").manual_seed(request.seed),
            "output_type": "pt",
        }
        if self._guidance is not None:
            wanted[self._guidance] = request.guidance
        if request.strength is None:
            del wanted["strength"]
        wanted |= self._picture_arguments(request)
        taken = {name: value for name, value in wanted.items() if name in self._parameters}
        arguments = taken | dict(self._options) | dict(request.options)
        if arguments.get("true_cfg_scale", 2) <= 1:
            arguments.pop("negative_prompt", None)  # it would be ignored, with a warning each time
        return arguments

    def _picture_arguments(self, request: ImageRequest) -> dict[str, Image.Image | None]:
        pictures: dict[str, Picture | None] = {
            parameter: getattr(request, name) for name, parameter in self.pictures.items()
        }
        return {
            parameter: None if picture is None else Image.fromarray(picture.pixels)
            for parameter, picture in pictures.items()
        }


def _most_clip_skip(pipe: Any) -> int:
    """Leave one layer of the encoders that are skipped: CLIP's; two of several are never used."""
    encoders = [
        part
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and "CLIP" in type(part).__name__
    ]
    layers = min((int(encoder.config.num_hidden_layers) for encoder in encoders), default=1)
    return max(0, layers - (1 if len(encoders) == 1 else 2))


def _samplers_for(own: Any) -> dict[str, Recipe]:
    """Return the checkpoint's own sampler, and by name those of the engine that suit its config."""
    own_class = type(own).__name__
    is_flow = "FlowMatch" in own_class or own.config.get("prediction_type") == "flow_prediction"
    fitting = {own_class, *(kind.__name__ for kind in own.compatibles)}
    ours = FLOW_SAMPLERS if is_flow else SAMPLERS
    named = {name: recipe for name, recipe in ours.items() if recipe.scheduler_class in fitting}
    alike = [recipe for recipe in named.values() if recipe.scheduler_class == own_class]
    is_distilled = any(recipe.is_distilled for recipe in alike)
    return {OWN_SAMPLER: Recipe(own_class, is_distilled=is_distilled)} | named


def _picture_parameters(
    parameters: Mapping[str, inspect.Parameter],
    *,
    is_controlled: bool,
) -> dict[str, str]:
    """Tell which argument takes which picture of a request.

    Where a control network has only `image`, it follows that.
    """
    pictures = {"init_image": "image", "mask": "mask_image", "control_image": "control_image"}
    if is_controlled and "control_image" not in parameters:
        pictures = {"control_image": "image"}
    return {name: parameter for name, parameter in pictures.items() if parameter in parameters}


def _guidance_parameter(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """Name the argument that is classifier-free guidance, or what a distilled network takes for it.

    Where `guidance_scale` has no default, as in Qwen-Image, it is for distilled networks to come,
    and `true_cfg_scale` guides.
    """
    scale = parameters.get("guidance_scale")
    if scale is not None and scale.default is not None:
        return "guidance_scale"
    return next((name for name in ("true_cfg_scale", "guidance_scale") if name in parameters), None)
