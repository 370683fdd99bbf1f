"""What is told of checkpoints of every family before anything is loaded, and of adapters."""

import json
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from adapter_builders import SUBJECTS, a_file, in_kohya_words, lora_tensors
from engine_builders import a_spec
from safetensors.torch import save_file
from test_variants import in_shards, only_as_variants
from tiny_checkpoints import a_family, save_repainting, save_tiny_sdxl
from tiny_flow_checkpoints import SCHNELL_SCHEDULER, save_tiny_flux, save_tiny_sd3
from tiny_pipelines import OTHERS, PIPELINES, save_tiny_pipeline

from engine.errors import CheckpointCorrupt
from engine.families import family_named
from engine.headers import read_header
from engine.inspection import inspect


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("inspected")


@pytest.fixture(scope="module")
def built(place, checkpoint, epsilon_checkpoint):
    """One of each kind that a native family serves."""
    euler = diffusers.EulerDiscreteScheduler()
    turbo = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    return {
        "v": checkpoint,
        "sd": epsilon_checkpoint,
        "inpaint": save_repainting(place / "inpaint", epsilon_checkpoint),
        "sdxl": save_tiny_sdxl(place / "sdxl", euler),
        "turbo": save_tiny_sdxl(place / "turbo", turbo),
        "sd3": save_tiny_sd3(place / "sd3"),
        "no-t5": save_tiny_sd3(place / "no-t5", with_t5=False),
        "dev": save_tiny_flux(place / "dev"),
        "schnell": save_tiny_flux(
            place / "schnell", scheduler=SCHNELL_SCHEDULER, guidance_embeds=False
        ),
        "fill": save_tiny_flux(place / "fill", context_channels=4 + 64),
    }


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("v", {"family": "sd", "prediction": "v_prediction", "zero_snr": True}),
        ("sd", {"family": "sd", "prediction": "epsilon", "scheduler": "PNDMScheduler"}),
        ("inpaint", {"family": "sd", "only_repaints": True}),
        ("sdxl", {"family": "sdxl", "title": "SDXL", "few_steps": False, "native_side_px": 64}),
        ("turbo", {"family": "sdxl", "few_steps": True}),
        ("sd3", {"family": "sd3", "title": "Stable Diffusion 3.5", "prediction": "flow"}),
        ("no-t5", {"family": "sd3", "missing": ()}),
        ("dev", {"family": "flux", "title": "FLUX.1 dev", "guidance_distilled": True}),
        ("schnell", {"title": "FLUX.1 schnell", "guidance_distilled": False, "few_steps": True}),
        ("fill", {"title": "FLUX.1 Fill", "only_repaints": True}),
    ],
)
def test_a_folder_is_known_by_its_configurations(built, kind, told):
    found = inspect(built[kind])

    assert {name: getattr(found, name) for name in told} == told
    assert found.missing == ()


@pytest.mark.parametrize("name", [*PIPELINES, *OTHERS])
def test_a_pipeline_s_folder_is_known_by_its_index(tmp_path, name):
    found = inspect(save_tiny_pipeline(name, tmp_path / "pipeline"))

    is_native = name in ("sd", "sd-img2img", "sd-inpaint", "sdxl", "sd3", "flux")
    assert (found.family != "pipeline") == is_native
    assert found.missing == ()
    folders = family_named(found.family).folders(found.path)
    assert tuple(part.name for part in found.parts) == folders


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "dev"])
def test_the_weights_told_are_those_that_are_loaded(built, kind):
    found = inspect(built[kind])
    samplers = ("flow_euler",) if found.family in ("sd3", "flux") else ("ddim",)

    family = a_family(a_spec(built[kind], family=found.family, samplers=samplers))

    networks = [*family.networks().values(), family._vae]
    loaded_bytes = sum(tensor.nbytes for each in networks for tensor in each.parameters())
    # a position embedding that is computed, not learnt, is a buffer in the file
    assert loaded_bytes <= found.weights_bytes("fp32") <= 1.05 * loaded_bytes
    assert found.stored_as == ("fp32",)


def test_variants_and_shards_are_told(built, tmp_path):
    renamed = only_as_variants(built["sd"], tmp_path / "fp16")
    sharded = in_shards(built["sd"], tmp_path / "shards", "fp16")
    shutil.copy(
        built["sd"] / "unet/diffusion_pytorch_model.safetensors",
        sharded / "unet/diffusion_pytorch_model.bin",
    )

    parts = {part.name: part for part in inspect(renamed).parts}
    of_shards = {part.name: part for part in inspect(sharded).parts}

    assert (parts["unet"].variant, parts["unet"].num_shards) == ("fp16", 1)
    assert of_shards["unet"].num_shards > 1
    assert of_shards["unet"].unread == ("diffusion_pytorch_model.bin",)
    assert of_shards["unet"].num_values == parts["unet"].num_values


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("unet", "unet: is missing or empty"),
        ("unet/config.json", "unet/config.json: is missing"),
        ("vae/diffusion_pytorch_model.safetensors", "vae: holds no weights (*.safetensors)"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json: is missing"),
        ("tokenizer/tokenizer.json", "tokenizer: holds no vocabulary"),
    ],
)
def test_what_is_missing_is_told(built, tmp_path, lost, told):
    folder = shutil.copytree(built["sd"], tmp_path / "lacking")
    for path in [folder / lost, *([folder / "tokenizer/vocab.json"] if "token" in lost else [])]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if lost.startswith("scheduler"):
        (folder / "scheduler/other.json").write_text("{}")

    [sentence, *_] = inspect(folder).missing

    assert sentence.startswith(told)


def test_a_file_that_is_cut_off_is_told_with_its_bytes(built, tmp_path):
    folder = shutil.copytree(built["sd"], tmp_path / "cut")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    whole_bytes = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])

    assert inspect(folder).missing == (
        f"unet/{file.name}: has {whole_bytes - 100} bytes of {whole_bytes}: it is cut off; "
        "fetch it again",
    )


def test_a_network_of_another_task_goes_to_family_pipeline_with_the_reason(built, tmp_path):
    folder = shutil.copytree(built["sd"], tmp_path / "ip2p")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "in_channels": 8}))

    found = inspect(folder)

    assert found.family == "pipeline"
    assert found.notes == ("family sd does not serve it: its UNet takes 8 channels",)


def test_a_folder_without_an_index_is_known_by_its_parts(built, tmp_path):
    for kind, family in (("sd", "sd"), ("sdxl", "sdxl"), ("sd3", "sd3"), ("dev", "flux")):
        folder = shutil.copytree(built[kind], tmp_path / kind)
        (folder / "model_index.json").unlink()

        assert inspect(folder).family == family


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ("a.safetensors", b"", "is no safetensors file"),
        ("a.safetensors", b"\xff" * 64, "is no safetensors file"),
        ("a.ckpt", b"pickle", "pickles are never read"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(CheckpointCorrupt, match=told):
        inspect(tmp_path / name)


@pytest.mark.parametrize("part", ["../unet", "/etc", "unet/..", "..", ".", "", "a\\b", "a\0b"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, part):
    index = {"_class_name": "AnyPipeline", part: ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointCorrupt, match=r"model_index\.json: names a part"):
        inspect(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointCorrupt, match="no checkpoint of diffusers"):
        inspect(tmp_path)


# --- adapters ---


@pytest.mark.parametrize(
    ("subject", "family"), [("sd3", "sd3"), ("flux", "flux")], ids=["sd3", "flux"]
)
def test_an_adapter_is_known_by_its_layers(tmp_path, subject, family):
    network = SUBJECTS[subject].build()
    tensors = lora_tensors(network, prefix="transformer", seed=0, rank=6)
    a_file(tmp_path / "ink.safetensors", tensors)

    found = inspect(tmp_path / "ink.safetensors")

    assert (found.kind, found.family, found.rank) == ("adapter", family, 6)
    assert found.num_layers == len(tensors) // 2


@pytest.mark.parametrize(
    ("width", "base"), [(768, "1.x"), (1024, "2.x"), (2048, "SDXL")], ids=["sd1", "sd2", "sdxl"]
)
def test_an_adapter_of_a_unet_is_known_by_the_width_of_its_text(tmp_path, width, base):
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    down = {f"{stem}.lora_down.weight": torch.zeros(4, width)}
    save_file(down | {f"{stem}.lora_up.weight": torch.zeros(8, 4)}, tmp_path / "a.safetensors")

    assert base in inspect(tmp_path / "a.safetensors").title


def test_the_trainer_s_notes_win_and_tell_the_trigger_words(tmp_path):
    tensors = lora_tensors(SUBJECTS["sd"].build(), prefix="unet", seed=0, rank=4)
    notes = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_tag_frequency": json.dumps({"10_ink": {"ink style": 20, "a cat": 3}, "5_x": {"": 9}}),
    }
    a_file(tmp_path / "ink.safetensors", in_kohya_words(tensors, alpha=4), notes)

    found = inspect(tmp_path / "ink.safetensors")

    assert (found.family, found.trigger_words) == ("sdxl", ("ink style", "a cat"))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("lora_unet_x.dora_scale", "DoRA"),
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("emb_params", "textual inversion"),
    ],
)
def test_an_adapter_that_is_not_read_says_of_which_kind_it_is(tmp_path, key, told):
    save_file({key: torch.zeros(2, 2)}, tmp_path / "a.safetensors")

    assert inspect(tmp_path / "a.safetensors").missing == (
        f"it is a {told}, and those are not read",
    )


def test_headers_are_read_without_torch_or_tensors(built):
    program = (
        "import sys\nfrom pathlib import Path\nfrom engine.inspection import inspect\n"
        "assert inspect(Path(sys.argv[1])).num_values\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(built["dev"])], check=True, timeout=60)


def test_a_header_tells_every_tensor(tmp_path):
    tensors = {"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.zeros(())}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"note": "1"})

    header = read_header(tmp_path / "x.safetensors")

    assert {name: (t.dtype, t.shape, t.num_bytes) for name, t in header.tensors.items()} == {
        "a": ("F16", (2, 3), 12),
        "b": ("F32", (), 4),
    }
    assert header.metadata == {"note": "1"}
