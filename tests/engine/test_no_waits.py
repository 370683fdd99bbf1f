"""No step waits for the device: a count of all waits, by family, sampler and feature.

On a claimed GPU (`claimed_cuda.py`): an engine with its own loop, its families and their networks.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_builders import a_file, lora_tensors
from claimed_cuda import claimed_cuda
from diffusers import AutoModel, EulerDiscreteScheduler
from engine_builders import ALWAYS, SAMPLERS, a_request, a_spec
from tiny_checkpoints import a_mask, a_picture, save_repainting, save_tiny_sdxl
from tiny_flow_checkpoints import save_tiny_flux, save_tiny_sd3
from tiny_pipelines import a_pipeline_request, a_pipeline_spec, save_tiny_pipeline

from engine.config import EngineConfig
from engine.engine import Engine
from engine.events import Finished, Previewed, Started, Stepped
from engine.families.latent import LatentFamily
from engine.request import AdapterUse
from engine.samplers import FLOW_SAMPLERS

FLOW = tuple(FLOW_SAMPLERS)
NUM_STEPS = 4  # UniPC comes to solve its equations at the third
PICTURE = {"init_image": a_picture(seed=3), "strength": 0.8}
WAYS = {
    "text": {},
    "watched": {},
    "picture": PICTURE,
    "mask": {**PICTURE, "mask": a_mask(), "strength": 0.99},
    "adapter": {"adapters": (AdapterUse("own", 0.8),)},
    "kept": {"keep_steps": (1, 2)},
}
FAMILIES = {"repaint": "sd", "fill": "flux"}  # of checkpoints that are not named for theirs
SAMPLE = [
    *(("sd", sampler, "text") for sampler in SAMPLERS),
    *(("sd", sampler, "mask") for sampler in ("ddim", "euler", "unipc", "lcm")),
    *(("sd", "ddim", way) for way in ("watched", "adapter", "kept")),
    *(("sdxl", "euler", way) for way in ("text", "picture")),
    *(("sd3", sampler, "text") for sampler in ("flow_euler", "flow_unipc")),
    ("sd3", "flow_euler", "adapter"),
    *(("flux", "flow_lcm", way) for way in ("text", "mask")),
    ("fill", "flow_euler", "mask"),
    ("pipeline sd", "default", "text"),
    ("pipeline flux", "default", "text"),
]
OTHERS = [
    *(("sd", sampler, "mask") for sampler in SAMPLERS),
    *(("sd", sampler, "watched") for sampler in SAMPLERS),
    *(("sdxl", sampler, "text") for sampler in SAMPLERS),
    *(("sdxl", "euler", way) for way in WAYS),
    ("repaint", "euler", "mask"),
    *((family, sampler, "text") for family in ("sd3", "flux") for sampler in FLOW),
    *((family, "flow_euler", way) for family in ("sd3", "flux") for way in WAYS),
    ("pipeline sd", "default", "watched"),
    ("pipeline sd-controlnet", "default", "text"),
    ("pipeline instruct-pix2pix", "default", "text"),
]
CASES = SAMPLE + [
    pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS if case not in SAMPLE
]
# What a start reads back once for an image, by the checkpoint: a pipeline's own timesteps, and what
# all rows of its calls share.
READ_AT_START = {
    "pipeline sd": {"families/pipeline/running.py"},
    "pipeline sd-controlnet": {"families/pipeline/running.py"},
    "pipeline instruct-pix2pix": {"families/pipeline/running.py"},
    "pipeline flux": {"families/pipeline/running.py", "families/calls.py"},
}


@pytest.fixture(scope="module")
def spec_of(epsilon_checkpoint, tmp_path_factory):
    """Give the spec of a checkpoint, which is made when it is first asked for."""
    folder = tmp_path_factory.mktemp("families")
    beta = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    make = {
        "sd": lambda path: epsilon_checkpoint,
        "sdxl": lambda path: save_tiny_sdxl(path, beta),
        "repaint": lambda path: save_repainting(path, epsilon_checkpoint),
        "sd3": save_tiny_sd3,
        "flux": save_tiny_flux,
        "fill": lambda path: save_tiny_flux(path, context_channels=4 + 64),
    }

    @cache
    def spec_of(checkpoint):
        path = folder / checkpoint
        if checkpoint.startswith("pipeline "):
            name = checkpoint.removeprefix("pipeline ")
            spec = a_pipeline_spec(name, save_tiny_pipeline(name, path))
            return replace(spec, name=checkpoint)
        family = FAMILIES.get(checkpoint, checkpoint)
        samplers = SAMPLERS if family in ("sd", "sdxl") else FLOW
        if checkpoint == "fill":
            samplers = ("flow_euler",)  # some others start from noise alone
        spec = a_spec(make[checkpoint](path), name=checkpoint, family=family, samplers=samplers)
        if checkpoint in FAMILIES:
            return spec
        return replace(spec, adapters=(an_adapter(spec, folder / f"{checkpoint}.safetensors"),))

    return spec_of


def an_adapter(spec, path):
    """A LoRA over the attention of the checkpoint's denoiser."""
    folder = "unet" if (Path(spec.path) / "unet").is_dir() else "transformer"
    network = AutoModel.from_pretrained(spec.path, subfolder=folder)
    tensors = lora_tensors(network, prefix=folder, seed=1, only=lambda layer: "attn" in layer)
    return replace(a_file(path, tensors), name="own")


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patched, claimed_cuda(patched) as gpu:
        yield gpu


@pytest.fixture(scope="module")
def engine_of(gpu, spec_of):
    """Give the engine of a checkpoint and device, which is started when it is first asked for."""
    with ExitStack() as started:

        @cache
        def engine_of(checkpoint, device):
            config = EngineConfig(
                device=device,
                max_batch_rows=3,
                row_buckets=(3,),  # a short warm-up
                growth_ceiling=ALWAYS,
                previews_per_s=1e6,
            )
            return started.enter_context(Engine(config, [spec_of(checkpoint)]))

        yield engine_of


def asked(checkpoint, sampler, way, id="image"):
    if checkpoint.startswith("pipeline "):
        name = checkpoint.removeprefix("pipeline ")
        return a_pipeline_request(name, id, checkpoint=checkpoint, num_steps=NUM_STEPS)
    given = {"checkpoint": checkpoint, "sampler": sampler, "num_steps": NUM_STEPS}
    return a_request(id, **given | WAYS[way])


@dataclass
class Rendered:
    """An image, and what the host waited for meanwhile, as "what, where"."""

    pixels: np.ndarray
    start: Counter
    steps: list[Counter]
    end: Counter
    previews: int


def render(engine, gpu, request, *, is_watched=False) -> Rendered:
    """Render an image alone and sort the waits by what the engine did."""
    start, steps, ends, previews = Counter(), [], [], []

    def on_event(event):
        if isinstance(event, Previewed):
            previews.append(event)
            return
        seen = Counter(gpu.waits)
        gpu.waits.clear()
        if isinstance(event, Started):
            start.update(seen)
            engine.watch(request.id, is_watched)
        elif isinstance(event, Stepped):
            steps.append(seen)
        elif isinstance(event, Finished):
            ends.append(seen)

    finished = engine.submit(request, on_event).result(60)
    return Rendered(finished.pixels, start, steps, ends[0], len(previews))


@pytest.fixture(scope="module")
def rendered(engine_of, gpu):
    """Give the image of a case, each rendered once."""

    @cache
    def render_case(checkpoint, sampler, way) -> Rendered:
        engine = engine_of(checkpoint, "cuda:0")
        if way == "watched":  # a projector is fitted to a VAE once, if none is published for it
            render(engine, gpu, asked(checkpoint, sampler, way), is_watched=True)
        request = asked(checkpoint, sampler, way)
        return render(engine, gpu, request, is_watched=way == "watched")

    return render_case


def places(waits: Counter) -> set[str]:
    """Name the modules that waits come from."""
    return {wait.partition(", ")[2].partition(":")[0] for wait in waits}


@pytest.mark.parametrize(("checkpoint", "sampler", "way"), CASES)
def test_no_step_waits_for_the_device(rendered, checkpoint, sampler, way):
    image = rendered(checkpoint, sampler, way)

    assert image.steps == [Counter()] * len(image.steps)
    assert len(image.steps) >= 3
    assert places(image.start) == READ_AT_START.get(checkpoint, set())
    # Its pixels are awaited where nothing else is to do.
    assert {wait.partition(",")[0] for wait in image.end} <= {"event"}
    assert (image.previews > 0) == (way == "watched")


@pytest.mark.parametrize(("checkpoint", "sampler", "way"), CASES)
def test_an_image_without_waits_has_the_bits_of_one_on_the_host(
    rendered, engine_of, checkpoint, sampler, way
):
    request = asked(checkpoint, sampler, way)
    expected = engine_of(checkpoint, "cpu").submit(request).result(60)

    assert np.array_equal(rendered(checkpoint, sampler, way).pixels, expected.pixels)


PLANTED = {
    "a number read back": lambda tensor: tensor.sum().item(),
    "a condition": lambda tensor: bool((tensor > 0).any()),
    "an index of unknown length": lambda tensor: tensor[tensor > 0],
    "a copy to ordinary memory": lambda tensor: tensor.cpu(),
    "a copy of ordinary memory": lambda tensor: torch.zeros(3).to(tensor.device),
    "an ordinary copy launched": lambda tensor: torch.zeros(3).to("cuda:0", non_blocking=True),
    "a tensor of numbers": lambda tensor: torch.tensor([1.0], device=tensor.device),
    "an index of the host": lambda tensor: tensor[torch.tensor([0])],
    "a system solved": lambda tensor: torch.linalg.solve(tensor[0, 0], tensor[0, 0]),
    "all that was launched": lambda tensor: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_a_wait_that_is_planted_in_the_loop_is_counted(engine_of, gpu, monkeypatch, planted):
    guide = LatentFamily.guide

    def guide_and_wait(family, image, prediction):
        planted(prediction)
        return guide(family, image, prediction)

    monkeypatch.setattr(LatentFamily, "guide", guide_and_wait)

    image = render(engine_of("sd", "cuda:0"), gpu, asked("sd", "ddim", "text"))

    assert [step.total() for step in image.steps] == [1] * NUM_STEPS
