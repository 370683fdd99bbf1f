"""`darkroom models import` and `add`: from a file or folder to a model of fleet.toml."""

import contextlib
import importlib
import io
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from cli import adding, trying
from cli.main import darkroom
from edges.weightsources import S3Folder
from policy.fleet import parse_fleet
from settings import REPO
from tests.buckets import an_object_store

POCKET = REPO / "pocket" / "checkpoint"


def builders(module: str):
    """A module of tests/engine: its builders of tiny checkpoints."""
    folder = str(REPO / "tests" / "engine")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(module)


class Place:
    """An operator's folders: a fleet file, weights, a data folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "weights"
        self.data = folder / "data"
        self.fleet_file = folder / "my-fleet.toml"
        self.root.mkdir()
        shutil.copy(REPO / "fleet.toml", self.fleet_file)
        shutil.copytree(POCKET, self.root / "pocket" / "checkpoint")

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.fleet_file.parent.iterdir())

    def run(self, *arguments: object):
        given = ["--data-dir", self.data, "--fleet-file", self.fleet_file, "models", *arguments]
        return CliRunner().invoke(darkroom, [str(each) for each in given], catch_exceptions=False)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    place = Place(tmp_path)
    monkeypatch.setenv("CHECKPOINT_ROOT", str(place.root))
    monkeypatch.setenv("DEVICE", "cpu")
    return place


@pytest.fixture
def trials_here(monkeypatch) -> None:
    """Make trials in this process, which has torch already; a new one would load it each time."""
    run = subprocess.run

    def run_here(command, **given):
        if command[-1] != "cli.trial":
            return run(command, **given)
        told = io.StringIO()
        with monkeypatch.context() as here, contextlib.redirect_stdout(told):
            for name, value in given["env"].items():
                here.setenv(name, value)
            here.setattr(sys, "stdin", io.StringIO(given["input"]))
            code = importlib.import_module("cli.trial").main()
        return subprocess.CompletedProcess(command, code, told.getvalue(), "")

    monkeypatch.setattr(trying.subprocess, "run", run_here)


def test_a_folder_becomes_a_model_with_pictures_a_curve_and_a_copy_of_the_file(place):
    shutil.copytree(POCKET, place.root / "other")
    before = place.fleet_file.read_text()

    done = place.run("add", "other-1.5", place.root / "other", "--licence", "Apache-2.0")

    assert done.exit_code == 0, done.output
    fleet = parse_fleet(place.fleet_file.read_text())
    model = fleet.models["other-1.5"]
    assert (model.family, model.precision, model.licence) == ("sd", "fp32", "Apache-2.0")
    assert model.versions[0].source == "other"
    assert len(model.versions[0].sha256) == 9
    assert place.fleet_file.read_text().startswith(
        before.replace('["pocket"]', '["pocket", "other-1.5"]').rstrip()
    )
    [copy] = [name for name in place.files if name.startswith("my-fleet.toml.")]
    assert (place.fleet_file.parent / copy).read_text() == before
    pictures = sorted((place.data / "trials" / "other-1.5").iterdir())
    assert [Image.open(picture).size for picture in pictures] == [(128, 128), (128, 128)]
    assert len(list((place.data / "curves").glob("other-1.5-1-*.json"))) == 1
    assert place.run("verify", "other-1.5").exit_code == 0


def test_print_shows_the_table_and_does_nothing(place):
    before = place.fleet_file.read_bytes()

    said = ("--size", "64x64", "--size", "32x64", "--quantize", "int8")
    done = place.run("add", "sd1.5", POCKET, "--print", *said)

    table = tomllib.loads(done.stdout)["models"]["sd1.5"]
    assert table["sizes"] == ["64x64", "32x64"] == list(table["tiers"]["quality"]["bucket_rows"])
    assert table["versions"][0]["source"] == str(POCKET)
    assert table["versions"][0]["quantize"] == "int8"
    assert place.fleet_file.read_bytes() == before
    assert place.files == ["my-fleet.toml", "weights"]


def test_weights_in_s3_are_added_pulled_and_verified(place, tmp_path, monkeypatch):
    with an_object_store(POCKET.parent) as store:
        for name, value in store.items():
            monkeypatch.setenv(name, value)
        added = place.run("add", "far", "s3://checkpoint", "--print")
        text = place.fleet_file.read_text().replace('["pocket"]', '["pocket", "far"]')
        place.fleet_file.write_text(f"{text}\n{added.stdout}")
        shutil.rmtree(place.data / "weights")

        before = place.run("list")
        pulled = place.run("pull", "far")
        after = place.run("list")
        [damaged] = (place.data / "weights").glob("folders/*/model_index.json")
        damaged.resolve().chmod(0o644)
        damaged.write_text("{}")
        verified = place.run("verify", "far")
        place.run("pull")

    [version] = tomllib.loads(added.stdout)["models"]["far"]["versions"]
    assert version["source"] == "s3://checkpoint"
    assert "0 of 10 files are fetched" in before.stdout
    assert (pulled.exit_code, pulled.stdout) == (0, "far@1: is here\n")
    assert "are fetched" not in after.stdout
    assert verified.exit_code == 1
    assert "far@1: model_index.json: is damaged" in " ".join(verified.stderr.split())
    assert place.run("verify", "far").exit_code == 0


@pytest.mark.parametrize(
    ("names", "index", "told"),
    [
        (["unet/a.json", "unet/a.json/b.json"], {}, "unet/a.json"),
        ([f"unet/{'a' * 300}.json"], {}, "File name too long"),
        ([], {"../outside": ["diffusers", "UNet2DConditionModel"]}, "names a part '../outside'"),
    ],
)
def test_names_that_no_folder_can_have_are_told_in_a_sentence(
    place, monkeypatch, names, index, told
):
    listed = ["model_index.json", *names]
    monkeypatch.setattr(S3Folder, "names", lambda self: listed)
    bucket = place.data.parent / "buckets" / "hostile"
    bucket.mkdir(parents=True)
    (bucket / "model_index.json").write_text(json.dumps(index))
    with an_object_store(bucket.parent) as store:
        for name, value in store.items():
            monkeypatch.setenv(name, value)
        added = place.run("add", "far", "s3://hostile", "--print")

    assert isinstance(added.exception, SystemExit), added.exception
    assert added.exit_code == 1
    assert told in " ".join(added.stderr.split())


@pytest.mark.parametrize(
    ("build", "name", "notes"),
    [
        ("fill", "FLUX.1-Fill", "jobs have to bring that"),
        ("sd-controlnet", "canny", "a control picture"),
    ],
)
@pytest.mark.usefixtures("trials_here")
def test_every_kind_of_checkpoint_is_tried_with_what_it_needs(place, build, name, notes):
    folder = place.root / "new"
    if build == "fill":
        builders("tiny_flow_checkpoints").save_tiny_flux(folder, context_channels=4 + 64)
        config = folder / "transformer" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 8}))
    else:
        builders("tiny_pipelines").save_tiny_pipeline(build, folder)

    done = place.run("add", name, folder, "--prompt", "a red circle")

    assert done.exit_code == 0, done.output
    assert notes in " ".join(done.stderr.split())
    assert name in parse_fleet(place.fleet_file.read_text()).models


@pytest.mark.usefixtures("trials_here")
def test_a_single_file_is_made_a_folder_and_added(place):
    epsilon = builders("engine_builders").save_tiny_checkpoint(
        place.root / "source", importlib.import_module("diffusers").DDIMScheduler()
    )
    file = builders("single_files").save_single_file(epsilon, place.root / "civitai.safetensors")

    done = place.run("import", file, "mine", "--like", epsilon)

    assert done.exit_code == 0, done.output
    assert place.run("inspect", place.root / "mine").exit_code == 0
    again = place.run("import", file, "mine", "--like", epsilon)
    assert (again.exit_code, "is there already" in again.stderr) == (1, True)
    told = ("--like", epsilon, "--prediction", "v_prediction", "--prompt", "a cat")
    assert place.run("add", "yours", file, *told).exit_code == 0
    config = json.loads((place.root / "yours/scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"


def spoil_weights(folder: Path) -> None:
    """Weights that a header does not tell from sound ones: not a number in them."""
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"].fill_(float("nan"))
    save_file(tensors, file)


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, file)


def lose_a_file(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lose_a_file, "tokenizer: holds no vocabulary"),
        (lose_a_tensor, "bad@1: vae: lacks 1 tensors, such as ['decoder.conv_in.weight']"),
        (spoil_weights, "NaN"),
    ],
)
@pytest.mark.usefixtures("trials_here")
def test_a_checkpoint_that_cannot_be_served_leaves_the_file_as_it_was(place, spoil, told):
    folder = shutil.copytree(POCKET, place.root / "bad")
    spoil(folder)
    before = place.fleet_file.read_bytes()

    done = place.run("add", "bad", folder)

    assert done.exit_code == 1
    assert told in done.stderr
    assert place.fleet_file.read_bytes() == before
    assert [name for name in place.files if name.startswith("my-fleet.toml.")] == []


def test_a_trial_that_is_killed_leaves_the_file_as_it_was(place, monkeypatch):
    before = place.fleet_file.read_bytes()
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    killed = [sys.executable, "-c", program]
    run = trying.subprocess.run
    monkeypatch.setattr(trying.subprocess, "run", lambda _, **told: run(killed, **told))

    done = place.run("add", "killed", POCKET)

    assert done.exit_code == 1
    assert "killed@1: its trial was ended by SIGKILL, perhaps for want of memory" in done.stderr
    assert place.fleet_file.read_bytes() == before


def test_a_file_that_somebody_edits_meanwhile_is_not_overwritten(place, monkeypatch):
    edited = place.fleet_file.read_text() + "# meanwhile\n"

    def trial(*_):
        place.fleet_file.write_text(edited)
        told = {"checkpoint": "other@1", "load_s": 0.0, "device": "cpu", "curves": ""}
        return {**told, "pictures": [], "notes": []}

    monkeypatch.setattr(adding, "trial", trial)

    done = place.run("add", "other", POCKET)

    assert done.exit_code == 1
    assert "was changed meanwhile" in done.stderr
    assert place.fleet_file.read_text() == edited


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pocket", POCKET], "'pocket' is taken"),
        (["dall-e-3", POCKET], "'dall-e-3' is taken"),
        (["org/model", POCKET], "a name has letters, digits"),
        (["new", POCKET, "--pool", "gpu"], "'gpu' is none of local"),
        (["new", "hf:org/repo@main"], "with all 40 hex digits of the commit"),
        (["new", POCKET, "--size", "60x64"], "'60x64': both sides must be multiples of 8"),
    ],
)
def test_what_cannot_be_added_is_told_before_anything_is_loaded(place, arguments, told):
    done = place.run("add", *arguments)

    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())


@pytest.mark.usefixtures("trials_here")
def test_try_names_the_model_that_fails_and_goes_on_with_the_others(place):
    text = place.fleet_file.read_text()
    folder = shutil.copytree(POCKET, place.root / "bad")
    lose_a_tensor(folder)
    bad = text.partition("[models.pocket]")[2].partition("[models.pocket.versions.sha256]")[0]
    bad = f"[models.bad]{bad}".replace("models.pocket", "models.bad").replace('"pocket/', '"')
    bad = bad.replace('"checkpoint"', '"bad"').replace('"gpt-image', '"x').replace('"dall-e', '"y')
    listed = text.replace('models = ["pocket"]', 'models = ["bad", "pocket"]')
    place.fleet_file.write_text(listed.replace("[models.pocket]", f"{bad}\n[models.pocket]"))

    done = place.run("try")

    assert done.exit_code == 1
    assert "bad@1: vae: lacks 1 tensors" in done.stderr
    assert "pocket@1, loaded in" in done.stdout
    assert [path.name for path in (place.data / "trials" / "pocket@1").iterdir()] == ["1.png"]


def test_a_picture_of_another_size_than_was_asked_for_is_told():
    from cli.trial import _notes

    found = {
        "from": "",
        "size": "1024x1024",
        "asked_size": "64x64",
        "is_flat": True,
        "file": "1.png",
    }

    assert _notes([found]) == [
        "it made 1024x1024 where 64x64 was asked for: set `sizes` or `options`",
        "1.png: is of one colour; something is wrong",
    ]


def test_a_setting_that_is_wrong_is_one_sentence(place, monkeypatch):
    monkeypatch.setenv("DEVICE", "tpu")

    done = place.run("list")

    assert done.exit_code == 1
    assert "DEVICE" in done.stderr
    assert "Traceback" not in done.stderr
