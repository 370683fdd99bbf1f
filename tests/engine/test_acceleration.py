"""Layout, compilation and attention kernels.

Asked for by name, named in the fingerprint, and no image notices its neighbours by them.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_builders import a_file, lora_tensors
from diffusers import EulerDiscreteScheduler
from engine_builders import ALWAYS, a_request, a_spec, reproducible
from tiny_checkpoints import a_picture, decoded, save_tiny_sdxl, stepped

from engine.acceleration import COMPILED, COMPILERS
from engine.config import EngineConfig
from engine.device import Device
from engine.engine import Engine
from engine.errors import UnsupportedRequest
from engine.events import Stepped
from engine.families.sdxl import takes_tf32
from engine.loading import load_checkpoint
from engine.request import AdapterUse
from settings import REPO


def alone_and_in_company(engine):
    alone = engine.submit(reproducible("same", num_steps=5)).result(60)
    neighbours = []

    def join(event):
        if isinstance(event, Stepped) and event.step == 1:
            neighbours.append(engine.submit(reproducible("n", seed=3, num_steps=3)))

    accompanied = engine.submit(reproducible("same", num_steps=5), join).result(60)
    neighbours[0].result(60)
    assert accompanied.record.shared_forwards == 3
    return alone, accompanied


@pytest.mark.parametrize(
    ("config", "spec"),
    [
        ({}, {"channels_last": True}),
        ({}, {"channels_last": True, "precision": "bf16"}),
        ({"attention": "math"}, {}),
        ({"attention": "flash"}, {"precision": "bf16"}),
        ({"row_buckets": (2, 4, 8)}, {}),
        pytest.param({}, {"compile_blocks": True}, marks=pytest.mark.slow),
    ],
)
def test_a_reproducible_image_is_the_same_alone_and_in_company(checkpoint, config, spec):
    with Engine(
        EngineConfig(**{"growth_ceiling": ALWAYS, "max_batch_rows": 8} | config),
        [a_spec(checkpoint, **spec)],
    ) as engine:
        alone, accompanied = alone_and_in_company(engine)

    assert np.array_equal(alone.pixels, accompanied.pixels)


def test_each_choice_is_a_fingerprint_of_its_own(checkpoint):
    prints = set()
    for config, spec in (({}, {}), ({"attention": "math"}, {}), ({}, {"channels_last": True})):
        with Engine(
            EngineConfig(max_batch_rows=2, **config),
            [a_spec(checkpoint, sizes=((64, 64),), **spec)],
        ) as engine:
            prints.add(engine.fingerprint("tiny").sha256)

    assert len(prints) == 3


def test_a_recorded_forward_is_for_images_that_wear_no_adapter(checkpoint, tmp_path):
    bare = a_spec(checkpoint, sizes=((64, 64),))
    unet = load_checkpoint(bare, Device("cpu", num_threads=1)).family.networks()["unet"]
    adapter = a_file(tmp_path / "style.safetensors", lora_tensors(unet, prefix="unet", seed=1))
    with Engine(EngineConfig(max_batch_rows=2), [replace(bare, adapters=(adapter,))]) as engine:
        family, replayed = engine._checkpoints["tiny"].family, []

        def replay(rows):
            replayed.append(len(rows["latents"]))
            return family.denoise(rows)

        family.graphs = replay
        engine.submit(a_request("plain", num_steps=2)).result(60)
        engine.submit(a_request("adapted", adapters=(AdapterUse("style"),))).result(60)

    assert replayed == [2, 2]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cuda_graphs": True}, "cuda_graphs"),
        ({"block_cache_threshold": 0.1}, "block_cache_threshold"),
    ],
)
def test_an_option_that_checkpoint_or_device_lacks_stops_the_start_by_name(
    checkpoint, changes, field
):
    engine = Engine(EngineConfig(), [a_spec(checkpoint, **changes)])

    with pytest.raises(UnsupportedRequest) as refused:
        engine.start()
    assert refused.value.field == field


_STARTS = """
import json, sys
from torch._dynamo.utils import counters
from engine_builders import a_spec
from engine.config import EngineConfig
from engine.engine import Engine
with Engine(EngineConfig(max_batch_rows=2), [a_spec(sys.argv[1], compile_blocks=True)]):
    pass
print(json.dumps(counters["inductor"]))
"""


@pytest.mark.slow
def test_a_second_start_finds_all_that_was_compiled(checkpoint, tmp_path):
    places = [str(REPO), str(Path(__file__).parent)]
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(places),
    }
    counted = []
    for _ in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-c", _STARTS, str(checkpoint)],
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
            env=environment,
        )
        counted.append(json.loads(done.stdout.splitlines()[-1]))

    first, second = counted
    assert first["fxgraph_cache_miss"] > 0
    assert "fxgraph_cache_miss" not in second
    assert second["fxgraph_cache_hit"] == first["fxgraph_cache_miss"]


def test_compiled_are_attention_convolutions_and_the_decoder(checkpoint):
    spec = a_spec(checkpoint, compile_blocks=True)
    if not any(map(shutil.which, COMPILERS["cpu"])):
        pytest.skip("no compiler here")

    loaded = load_checkpoint(spec, Device("cpu", num_threads=1))

    unet = loaded.family.networks()["unet"]
    compiled = {
        network: {
            type(module).__name__
            for module in modules.modules()
            if module._compiled_call_impl is not None
        }
        for network, modules in (("unet", unet), ("decoder", loaded.family.decoder))
    }
    assert compiled == {
        "unet": {"BasicTransformerBlock", "ResnetBlock2D"},
        "decoder": {"ResnetBlock2D"},
    }
    assert loaded.facts()["compiled"] == COMPILED
    kernel = loaded.family.decoder.conv_in.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_block_takes_no_adapters(checkpoint, tmp_path):
    adapter = a_file(tmp_path / "adapter.safetensors", {})
    engine = Engine(EngineConfig(), [a_spec(checkpoint, compile_blocks=True, adapters=(adapter,))])

    with pytest.raises(UnsupportedRequest) as refused:
        engine.start()
    assert refused.value.field == "compile_blocks"


def test_compiled_blocks_without_a_compiler_stop_the_start_by_name(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = Engine(EngineConfig(), [a_spec(checkpoint, compile_blocks=True)])

    with pytest.raises(
        UnsupportedRequest, match="none of g\\+\\+, clang\\+\\+ is in PATH"
    ) as refused:
        engine.start()
    assert refused.value.field == "compile_blocks"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """Give an SDXL checkpoint in half precision, whose VAE is upcast."""
    path = save_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "checkpoint", EulerDiscreteScheduler())
    return a_spec(path, family="sdxl", samplers=("euler",), precision="bf16")


@pytest.mark.parametrize("is_allowed", [True, False])
def test_a_vae_that_is_upcast_may_use_tf32_while_it_computes_alone(sdxl, is_allowed, monkeypatch):
    family = load_checkpoint(sdxl, Device("cpu", num_threads=1)).family
    family._vae_tf32 = is_allowed
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as a GPU is prepared
    seen = {}
    for name in ("encoder", "decoder"):
        getattr(family._vae, name).register_forward_pre_hook(
            lambda *_, name=name: seen.update({name: torch.backends.cudnn.allow_tf32})
        )

    with torch.inference_mode():
        image = stepped(family, a_request(sampler="euler", num_steps=2, init_image=a_picture()))
        decoded(family, image)

    assert seen == dict.fromkeys(("encoder", "decoder"), is_allowed)
    assert torch.backends.cudnn.allow_tf32 is False
    assert ("vae_tf32" in family.facts()) is is_allowed


@pytest.mark.parametrize(
    ("changes", "dtype", "device", "takes"),
    [
        ({}, torch.float16, "cuda:0", True),
        ({}, torch.bfloat16, "cuda:0", True),
        ({}, torch.float32, "cuda:0", False),
        ({}, torch.float16, "cpu", False),
        ({"vae_tf32": False}, torch.float16, "cuda:0", False),
    ],
)
def test_tf32_is_for_half_precision_on_a_gpu_unless_refused(changes, dtype, device, takes):
    spec = a_spec("nowhere", **changes)

    assert takes_tf32(spec, dtype, torch.device(device)) is takes


def test_an_attention_kernel_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="none of auto, flash"):
        Device("cpu", num_threads=1, attention="fastest")
