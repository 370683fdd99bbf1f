"""Every family, every parameter: another value is seen in the image, or refused by its name.

What would be neither is taken from a tenant and lost. A parameter of policy/params.py that has no
other value here fails by its name.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from adapter_builders import a_file, lora_tensors
from diffusers import EulerDiscreteScheduler
from engine_builders import NATIVE_FAMILIES, a_request, a_spec
from tiny_checkpoints import a_family, a_picture, save_tiny_sdxl
from tiny_flow_checkpoints import save_tiny_flux, save_tiny_sd3
from tiny_pipelines import a_pipeline_request, a_pipeline_spec, save_tiny_pipeline

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import UnsupportedRequest
from engine.families import FAMILIES
from engine.request import AdapterUse
from policy.fleet import OPEN_FAMILIES
from policy.params import PARAMS

SAMPLERS_OF = {
    "sd": ("euler", "dpmpp_2m"),
    "sdxl": ("euler", "dpmpp_2m"),
    "sd3": ("flow_euler", "flow_euler_karras"),
    "flux": ("flow_euler", "flow_euler_karras"),
    "pipeline": ("default", "euler"),
    "plain": ("default", "euler"),
}

# Fields of ImageRequest: another value of each than the builders'. `sampler` is of SAMPLERS_OF.
OTHER = {
    "prompt": "a green square",
    "negative_prompt": "a blue star",
    "width_px": 96,
    "height_px": 96,
    "num_steps": 2,
    "guidance": 2.5,
    "seed": 8,
    "strength": 0.5,
    "clip_skip": 1,
    "adapters": (AdapterUse("ink"),),
}

# How an image shares forwards, not what it shows: tests/engine/test_company.py has both.
OF_THE_BATCH = {"determinism", "bucket_rows"}

FIELDS = [
    param.engine_field
    for param in PARAMS
    if param.engine_field and not param.picture and param.name not in OF_THE_BATCH
]

# Neither seen nor refused, and why.
WITHOUT_EFFECT = {
    ("flux", "negative_prompt"): "distilled guidance has no other side; jobs are told by a warning",
}


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory):
    """One engine with a checkpoint of every family, with an adapter where the family has them."""
    folder = tmp_path_factory.mktemp("params")
    sdxl = save_tiny_sdxl(folder / "sdxl", EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    paths = {
        "sd": checkpoint,
        "sdxl": sdxl,
        "sd3": save_tiny_sd3(folder / "sd3"),
        "flux": save_tiny_flux(folder / "flux"),
    }
    sizes = {"sizes": ((64, 64), (96, 64), (64, 96))}
    specs = [
        a_spec(paths[name], name=name, family=name, samplers=SAMPLERS_OF[name], **sizes)
        for name in NATIVE_FAMILIES
    ]
    text, picture = (
        save_tiny_pipeline("sd", folder / "text"),
        save_tiny_pipeline("sd-img2img", folder / "picture"),
    )
    sizes = {"sizes": ((32, 32), (96, 32), (32, 96))}
    for family in OPEN_FAMILIES:
        specs.append(replace(a_pipeline_spec("sd", text, family=family, **sizes), name=family))
        from_a_picture = a_pipeline_spec("sd-img2img", picture, family=family)
        specs.append(replace(from_a_picture, name=f"{family} with a picture"))
    with Engine(
        EngineConfig(max_batch_rows=2), [_with_adapter(spec, folder) for spec in specs]
    ) as engine:
        yield engine


def _with_adapter(spec, folder):
    """The checkpoint with an adapter `ink` over its denoiser; family plain takes none."""
    if spec.family == "plain":
        return spec
    networks = a_family(spec).networks()
    denoiser = "unet" if "unet" in networks else "transformer"
    tensors = lora_tensors(
        networks[denoiser],
        prefix=denoiser,
        seed=1,
        only=lambda layer: "attn" in layer and "to_" in layer,
    )
    (folder / spec.name).mkdir(exist_ok=True)
    return replace(spec, adapters=(a_file(folder / spec.name / "ink.safetensors", tensors),))


def asked(family, field, **changes):
    """A request whose `field` has an effect if the family gives it any."""
    given = {"checkpoint": family, "sampler": SAMPLERS_OF[family][0], "num_steps": 3}
    if family in OPEN_FAMILIES:
        name = "sd"
        if field == "strength":
            name, given["checkpoint"] = "sd-img2img", f"{family} with a picture"
        return a_pipeline_request(name, **given | changes)
    if field == "strength":
        given["init_image"] = a_picture(seed=3)
    return a_request(**given | changes)


def outcome(engine, request):
    """The pixels of the image, or the refusal of it."""
    try:
        return engine.submit(request).result(60).pixels
    except UnsupportedRequest as refusal:
        return refusal


@pytest.fixture(scope="module")
def plain_pixels(engine):
    """plain_pixels(family, has_picture): of the image that those with another value are unlike."""
    return cache(
        lambda family, has_picture: (
            engine.submit(asked(family, "strength" if has_picture else "")).result(60).pixels
        )
    )


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_another_value_changes_the_image_or_is_refused_by_name(engine, plain_pixels, family, field):
    other = SAMPLERS_OF[family][1] if field == "sampler" else OTHER[field]
    image = plain_pixels(family, field == "strength")

    seen_as = outcome(engine, asked(family, field, **{field: other}))

    if isinstance(seen_as, UnsupportedRequest):
        assert seen_as.field == field
    else:
        assert np.array_equal(image, seen_as) == ((family, field) in WITHOUT_EFFECT)
