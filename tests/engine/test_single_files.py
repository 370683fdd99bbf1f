"""A single file becomes a folder with the bits of the folder that it was made of."""

import json
import shutil

import diffusers
import pytest
import torch
from engine_builders import a_request, a_spec, save_tiny_checkpoint
from safetensors.torch import load_file
from single_files import save_single_file
from tiny_checkpoints import TINY_VAE, a_family, decoded, save_repainting, save_tiny_sdxl, stepped

from engine.errors import CheckpointCorrupt
from engine.inspection import inspect
from engine.singlefile import _NETWORKS, ORIGINALS, _write_tokenizer, import_file

PUBLISHED = {  # parameters of the published networks
    ("sd1", "unet"): 859_520_964,
    ("sd1", "vae"): 83_653_863,
    ("sd1", "text_encoder"): 123_060_480,
    ("sd2", "unet"): 865_910_724,
    ("sd2", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, epsilon_checkpoint):
    place = tmp_path_factory.mktemp("originals")
    v_prediction = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    euler = diffusers.EulerDiscreteScheduler()
    with_attention = {**TINY_VAE, "mid_block_add_attention": True}
    return {
        "sd1": epsilon_checkpoint,
        "sd2": save_tiny_checkpoint(place / "sd2", v_prediction),
        "inpaint": save_repainting(place / "inpaint", epsilon_checkpoint),
        "sdxl": save_tiny_sdxl(place / "sdxl", euler, vae=with_attention, projection=48),
    }


def weights_of(folder) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def bits(folder, family: str) -> torch.Tensor:
    loaded = a_family(a_spec(folder, family=family))
    return decoded(loaded, stepped(loaded, a_request(num_steps=3)))


@pytest.mark.parametrize(
    ("kind", "title"),
    [("sd1", "Stable Diffusion 1.x"), ("sd2", "Stable Diffusion 2.x"), ("sdxl", "SDXL")],
)
def test_an_imported_file_renders_the_bits_of_its_folder(folders, tmp_path, kind, title):
    source = folders[kind]
    file = save_single_file(source, tmp_path / "one.safetensors", open_clip=kind == "sd2")
    assert inspect(file).title == title

    found = import_file(file, tmp_path / "imported", like=source)

    assert found.missing == ()
    assert found.family == inspect(source).family
    imported = weights_of(tmp_path / "imported")
    original = weights_of(source)
    assert imported.keys() == original.keys()
    assert all(torch.equal(imported[name], original[name]) for name in original)
    assert torch.equal(bits(tmp_path / "imported", found.family), bits(source, found.family))


def test_an_inpainting_file_becomes_a_folder_that_repaints(folders, tmp_path):
    file = save_single_file(folders["inpaint"], tmp_path / "one.safetensors")
    assert inspect(file).only_repaints

    found = import_file(file, tmp_path / "imported", like=folders["sd1"])

    assert found.only_repaints
    assert found.pipeline_class == "StableDiffusionInpaintPipeline"


def test_half_precision_stays_half(folders, tmp_path):
    source = shutil.copytree(folders["sd1"], tmp_path / "half")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(source, torch_dtype=torch.float16)
    pipe.save_pretrained(source)
    file = save_single_file(source, tmp_path / "one.safetensors")

    assert import_file(file, tmp_path / "imported", like=source).stored_as == ("fp16",)


def test_parts_that_the_file_lacks_come_from_the_folder_that_is_named(folders, tmp_path):
    file = save_single_file(folders["sd1"], tmp_path / "whole.safetensors")
    from safetensors.torch import save_file

    kept = {name: t for name, t in load_file(file).items() if not name.startswith("first_stage")}
    save_file(kept, tmp_path / "no-vae.safetensors")

    with pytest.raises(CheckpointCorrupt, match="vae: is not in the file"):
        import_file(tmp_path / "no-vae.safetensors", tmp_path / "imported")
    import_file(tmp_path / "no-vae.safetensors", tmp_path / "imported", like=folders["sd1"])

    assert torch.equal(bits(tmp_path / "imported", "sd"), bits(folders["sd1"], "sd"))


@pytest.mark.parametrize(
    ("open_clip", "metadata", "extra", "told"),
    [
        (False, None, None, ("epsilon", False)),
        (True, None, None, ("v_prediction", False)),
        (True, {"modelspec.prediction_type": "epsilon"}, None, ("epsilon", False)),
        (False, None, {"v_pred": torch.zeros(0)}, ("v_prediction", False)),
        (False, None, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, ("v_prediction", True)),
    ],
)
def test_what_a_file_predicts_is_read_from_it(folders, tmp_path, open_clip, metadata, extra, told):
    file = save_single_file(
        folders["sd1"],
        tmp_path / "one.safetensors",
        open_clip=open_clip,
        metadata=metadata,
        extra=extra,
    )

    found = inspect(file)

    assert (found.prediction, found.zero_snr) == told


def test_a_network_of_another_shape_is_refused_and_leaves_no_folder(folders, tmp_path):
    file = save_single_file(folders["sd1"], tmp_path / "tiny.safetensors")

    with pytest.raises(CheckpointCorrupt, match=r"tiny\.safetensors: .*--like"):
        import_file(file, tmp_path / "imported")

    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]


@pytest.mark.parametrize(("kind", "part"), PUBLISHED)
def test_configurations_are_those_of_the_published_networks(kind, part):
    from accelerate import init_empty_weights

    config = json.loads((ORIGINALS / f"{kind}.json").read_text())[part]

    with init_empty_weights():
        network = _NETWORKS[part](config)

    assert sum(each.numel() for each in network.parameters()) == PUBLISHED[kind, part]


def test_the_vocabulary_is_clip_s(tmp_path):
    from transformers import CLIPTokenizer

    for kind, part, padding in (("sd1", "tokenizer", 49407), ("sdxl", "tokenizer_2", 0)):
        config = json.loads((ORIGINALS / f"{kind}.json").read_text())[part]
        _write_tokenizer(tmp_path / kind, config)

        tokens = CLIPTokenizer.from_pretrained(tmp_path / kind)(
            "A photo of a cat", padding="max_length", max_length=77
        )["input_ids"]

        assert tokens[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert set(tokens[7:]) == {padding}


def test_a_file_of_another_family_is_refused_with_the_reason(tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)}, tmp_path / "f.safetensors"
    )

    with pytest.raises(CheckpointCorrupt, match="single files of family flux are not imported"):
        import_file(tmp_path / "f.safetensors", tmp_path / "imported")
