"""Folders as people have them: precision variants alone, in shards, pickles, packages that lack."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import diffusers
import pytest
import torch
import transformers
from engine_builders import a_request, a_spec
from tiny_checkpoints import a_family, decoded, save_tiny_sdxl, stepped
from tiny_flow_checkpoints import save_tiny_flux, save_tiny_sd3
from tiny_pipelines import save_tiny_pipeline

from engine.device import Device
from engine.errors import CheckpointCorrupt, PackageMissing
from engine.families import family_named
from engine.families.latent import not_loadable
from engine.folders import (
    files_read,
    hash_files,
    part_names,
    unread_files,
    variant_of,
)
from engine.loading import load_checkpoint

CPU = Device("cpu", num_threads=1)
SAMPLER = {"sd": "ddim", "sdxl": "ddim", "sd3": "flow_euler", "flux": "flow_euler"}
NETWORKS = ("unet", "vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoint):
    """One tiny checkpoint of each native family, and one that only a pipeline serves."""
    place = tmp_path_factory.mktemp("families")
    scheduler = diffusers.EulerDiscreteScheduler()
    return {
        "sd": checkpoint,
        "sdxl": save_tiny_sdxl(place / "sdxl", scheduler),
        "sd3": save_tiny_sd3(place / "sd3"),
        "flux": save_tiny_flux(place / "flux"),
        "pipeline": save_tiny_pipeline("sd-controlnet", place / "pipeline"),
    }


def only_as_variants(source, folder, variant: str = "fp16"):
    """The checkpoint with every file of weights renamed as a variant of itself."""
    shutil.copytree(source, folder)
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
    return folder


def in_shards(source, folder, variant: str | None):
    """The checkpoint with its networks saved again, in pieces of some ten kilobytes."""
    shutil.copytree(source, folder)
    for part in folder.iterdir():
        if part.name not in NETWORKS:
            continue
        index = (source / "model_index.json").read_text()
        library = diffusers if f'"{part.name}": [\n    "diffusers"' in index else transformers
        name = index.partition(f'"{part.name}": [')[2].split('"')[3]
        network = getattr(library, name).from_pretrained(source / part.name)
        for file in part.glob("*.safetensors"):
            file.unlink()
        network.save_pretrained(part, variant=variant, max_shard_size="60KB")
    return folder


def bits(family: str, path) -> torch.Tensor:
    loaded = a_family(a_spec(path, family=family, samplers=(SAMPLER[family],)))
    request = a_request(sampler=SAMPLER[family], num_steps=2)
    return decoded(loaded, stepped(loaded, request))


@pytest.mark.parametrize("family", SAMPLER)
def test_a_folder_of_variants_alone_renders_as_the_plain_one(folders, tmp_path, family):
    renamed = only_as_variants(folders[family], tmp_path / "fp16")

    assert torch.equal(bits(family, renamed), bits(family, folders[family]))


@pytest.mark.parametrize("family", SAMPLER)
def test_a_folder_of_sharded_variants_alone_renders_as_the_plain_one(folders, tmp_path, family):
    sharded = in_shards(folders[family], tmp_path / "shards", "fp16")

    assert len(list(sharded.glob("*/*.fp16-00002-of-*.safetensors"))) >= 1
    assert torch.equal(bits(family, sharded), bits(family, folders[family]))


def test_shards_beside_variants_are_read_plain(folders, tmp_path):
    sharded = in_shards(folders["sd"], tmp_path / "shards", None)
    (sharded / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"no weights")

    assert torch.equal(bits("sd", sharded), bits("sd", folders["sd"]))


def test_a_pipeline_of_variants_alone_is_loaded(folders, tmp_path):
    renamed = only_as_variants(folders["pipeline"], tmp_path / "fp16")
    spec = a_spec(renamed, family="pipeline", sizes=((32, 32),), samplers=("default",))

    loaded = load_checkpoint(spec, CPU)

    assert {"unet", "controlnet"} <= set(loaded.family.networks())


def test_what_is_hashed_is_what_is_read(folders, tmp_path):
    folder = shutil.copytree(folders["sd"], tmp_path / "mixed")
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant")
    (unet / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (unet / "preview.png").write_bytes(b"a picture")

    read = files_read(folder, part_names("sd", folder))

    assert [name for name in read if name.startswith("unet/")] == [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert sorted(file.name for file in unread_files(unet)) == [
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "preview.png",
    ]
    assert set(hash_files(folder, part_names("sd", folder))) == set(read)


def test_of_several_variants_the_smaller_usual_one_is_read(folders, tmp_path):
    folder = only_as_variants(folders["sd"], tmp_path / "several", "bf16")
    shutil.copy(
        folder / "unet" / "diffusion_pytorch_model.bf16.safetensors",
        folder / "unet" / "diffusion_pytorch_model.fp16.safetensors",
    )

    assert (variant_of(folder / "unet"), variant_of(folder / "vae")) == ("fp16", "bf16")


def test_variants_of_which_none_is_usual_are_refused_by_name(folders, tmp_path):
    folder = only_as_variants(folders["sd"], tmp_path / "odd", "ema")
    (folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"")

    with pytest.raises(CheckpointCorrupt, match=r"unet: holds .* ema, non_ema"):
        load_checkpoint(a_spec(folder), CPU)


def test_a_missing_shard_is_named(folders, tmp_path):
    sharded = in_shards(folders["sd"], tmp_path / "shards", None)
    lost = sorted((sharded / "unet").glob("*-00002-of-*.safetensors"))[0]
    lost.unlink()

    with pytest.raises(CheckpointCorrupt, match=f"unet/{lost.name}: is missing, and .* lists it"):
        load_checkpoint(a_spec(sharded), CPU)


def test_a_git_lfs_pointer_is_named_as_one(folders, tmp_path):
    folder = shutil.copytree(folders["sd"], tmp_path / "lfs")
    pointer = folder / "unet" / "diffusion_pytorch_model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")

    with pytest.raises(CheckpointCorrupt, match=r"unet/.*: is a git-lfs pointer.*git lfs pull"):
        load_checkpoint(a_spec(folder), CPU)


def test_pickles_are_refused_with_the_command_that_converts_them(folders, tmp_path):
    """The command is run as it is told."""
    folder = shutil.copytree(folders["sd"], tmp_path / "pickles")
    for part, kind in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = folder / part / f"{kind}.safetensors"
        from safetensors.torch import load_file

        name = kind if part == "unet" else "pytorch_model"
        torch.save(load_file(file), folder / part / f"{name}.bin")
        file.unlink()

    with pytest.raises(CheckpointCorrupt, match=r"_model\.bin: is a pickle") as refused:
        load_checkpoint(a_spec(folder), CPU)

    assert refused.value.file == "text_encoder/pytorch_model.bin"
    command = str(refused.value).rpartition(": ")[2]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, shell=True, check=True, env=environment, timeout=120)
    converted = tmp_path / "pickles-safetensors"
    assert torch.equal(bits("sd", converted), bits("sd", folders["sd"]))


def test_a_single_file_is_told_how_to_become_a_folder(tmp_path):
    file = tmp_path / "civitai.safetensors"
    file.write_bytes(b"")

    with pytest.raises(CheckpointCorrupt, match=r"single file.*\./darkroom models import"):
        load_checkpoint(a_spec(file), CPU)


@pytest.mark.parametrize(
    ("problem", "package"),
    [
        (
            ImportError(
                "\nQwen2VLVideoProcessor requires the Torchvision library but it was not found in "
                "your environment. Check out the instructions on the\ninstallation page"
            ),
            "torchvision",
        ),
        (ModuleNotFoundError("No module named 'ftfy.fixes'", name="ftfy.fixes"), "ftfy"),
    ],
)
def test_a_missing_package_is_no_corrupt_checkpoint(problem, package):
    told = not_loadable("processor", "cannot be read", problem)

    assert isinstance(told, PackageMissing)
    assert str(told) == f"processor: needs the package {package}, which is not installed here"


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_an_edit_pipeline_without_its_package_says_which_one(tmp_path):
    folder = save_tiny_pipeline("qwen-image", tmp_path / "qwen")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "QwenImageEditPipeline"
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    processor = shutil.copytree(folder / "tokenizer", folder / "processor")
    for file, kind in (("", "image"), ("video_", "video")):
        told = {f"{kind}_processor_type": f"Qwen2VL{kind.title()}Processor"}
        (processor / f"{file}preprocessor_config.json").write_text(json.dumps(told))
    spec = a_spec(folder, family="pipeline", sizes=((32, 32),), samplers=("default",))

    with pytest.raises(PackageMissing, match="needs the package torchvision"):
        load_checkpoint(spec, CPU)


def test_a_missing_package_is_seen_behind_another_error():
    try:
        try:
            raise ImportError("Foo requires the SentencePiece library but it was not found")
        except ImportError as problem:
            raise ValueError("cannot instantiate") from problem
    except ValueError as problem:
        told = not_loadable("tokenizer", "cannot be read", problem)

    assert isinstance(told, PackageMissing)


def test_parts_are_those_that_the_families_read(folders):
    for family, path in folders.items():
        assert part_names(family, path) == family_named(family).folders(path)


def test_folders_are_looked_at_without_torch(folders):
    program = (
        "import sys\nfrom pathlib import Path\nfrom engine.folders import hash_files, part_names\n"
        "path = Path(sys.argv[1])\nassert hash_files(path, part_names('pipeline', path))\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(folders["pipeline"])], check=True, timeout=60
    )
