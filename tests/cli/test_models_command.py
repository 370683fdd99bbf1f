"""`darkroom models`: what is told of checkpoints, and what is compared with fleet.toml."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import darkroom
from settings import REPO

POCKET = REPO / "pocket" / "checkpoint"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Where the shipped fleet's checkpoint lies, a copy that a test may spoil."""
    for name in ("FLEET_FILE", "DARKROOM_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CHECKPOINT_ROOT", str(tmp_path))
    shutil.copytree(POCKET, tmp_path / "pocket" / "checkpoint")
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(
        darkroom, ["--data-dir", "/nowhere", "models", *map(str, arguments)], catch_exceptions=False
    )


def test_inspect_tells_people_what_a_folder_is():
    done = run("inspect", POCKET)

    assert done.exit_code == 0
    for told in ("sd", "v_prediction, zero terminal SNR", "UNet2DConditionModel", "as bf16"):
        assert told in done.stdout


def test_inspect_tells_programs_the_same():
    told = json.loads(run("inspect", POCKET, "--json").stdout)

    assert told["family"] == "sd"
    assert told["samplers"][0] == "ddim"
    assert told["weights_bytes"]["fp32"] == 2 * told["weights_bytes"]["fp16"]
    assert [part["name"] for part in told["parts"]][-1] == "vae"


def test_inspect_ends_with_1_where_something_is_missing(root):
    (root / "pocket/checkpoint" / UNET).unlink()

    done = run("inspect", root / "pocket/checkpoint")

    assert done.exit_code == 1
    assert "unet: holds no weights" in done.stderr


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nowhere", "nowhere is not there"),
        ("s3://bucket/sdxl", "`models add` and `models pull` fetch it"),
        ("hf:org/repo@0123", "hf:org/repo@0123 is no path of this machine"),
    ],
)
def test_what_is_no_path_here_is_told_in_one_sentence(path, told):
    done = run("inspect", path)

    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())


def test_digest_prints_the_table_that_verify_compares(root):
    text = run("digest", POCKET, "--name", "sd3.5").stdout

    [version] = [tomllib.loads(text.replace(".versions.", ".v."))["models"]["sd3.5"]["v"]]
    shipped = tomllib.loads((REPO / "fleet.toml").read_text())["models"]["pocket"]["versions"]
    assert version["sha256"] == shipped[0]["sha256"]


def test_digest_of_one_file_is_its_line(tmp_path):
    (tmp_path / "ink.safetensors").write_bytes(b"")

    assert run("digest", tmp_path / "ink.safetensors").stdout.startswith('sha256 = "e3b0c442')


def test_verify_is_content_with_what_is_listed(root):
    done = run("verify")

    assert done.exit_code == 0
    assert done.stdout.strip() == "pocket@1: all 9 files are as listed"


def test_verify_names_a_file_that_changed(root):
    file = root / "pocket/checkpoint" / UNET
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    done = run("verify", "pocket")

    assert done.exit_code == 1
    assert f"pocket@1: {UNET}: has sha256" in done.stderr


def test_verify_names_a_file_that_is_missing_and_one_that_is_not_listed(root):
    folder = root / "pocket/checkpoint"
    (folder / "tokenizer/tokenizer_config.json").unlink()
    (folder / "tokenizer/extra.json").write_text("{}")

    done = run("verify")

    assert done.exit_code == 1
    assert "tokenizer/tokenizer_config.json: is missing" in done.stderr
    assert "tokenizer/extra.json: is read, and not listed" in done.stderr


def test_verify_of_an_unknown_model_says_which_there_are():
    done = run("verify", "sdxl")

    assert done.exit_code == 2
    assert "'sdxl' is none of pocket" in done.stderr


def test_list_tells_every_version_and_its_state(root):
    [row] = json.loads(run("list", "--json").stdout)
    assert (row["name"], row["pool"], row["state"], row["digests"]) == (
        "pocket@1",
        "local",
        "complete",
        9,
    )

    (root / "pocket/checkpoint" / UNET).unlink()

    assert "unet: holds no weights" in run("list").stdout


def test_du_tells_apart_what_is_never_read(root):
    (root / "pocket/checkpoint/unet/diffusion_pytorch_model.bin").write_bytes(bytes(1_000_000))

    [row] = json.loads(run("du", "--json").stdout)

    assert 1_000_000 < row["unread_bytes"] < 1_010_000
    assert row["read_bytes"] > 9_000_000


def test_settings_of_the_stack_s_own_file_count(root, tmp_path, monkeypatch):
    monkeypatch.delenv("CHECKPOINT_ROOT")
    data = tmp_path / "data"
    data.mkdir()
    (data / "env").write_text(f"CHECKPOINT_ROOT={root}\n")

    done = CliRunner().invoke(darkroom, ["--data-dir", str(data), "models", "list", "--json"])

    assert json.loads(done.stdout)[0]["path"] == str(root / "pocket/checkpoint")
