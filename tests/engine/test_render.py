"""`python -m engine.render`: one image without the rest of the house."""

import json

import numpy as np
from engine_builders import a_request
from PIL import Image

from engine.render import main


def test_a_prompt_on_the_command_line_becomes_a_png(checkpoint, engine, tmp_path, capsys):
    out = tmp_path / "out.png"

    wish = ["a red circle on the blue background", "--steps", "4", "--guidance", "4", "--seed", "7"]
    status = main([*wish, "--checkpoint", str(checkpoint), "--out", str(out)])

    assert status == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 4
    expected = engine.submit(a_request("same", num_steps=4, guidance=4.0, seed=7)).result(60)
    assert np.array_equal(np.asarray(Image.open(out)), expected.pixels)


def test_a_folder_that_is_no_checkpoint_is_an_error_message_and_a_status(tmp_path, capsys):
    assert main(["a red circle", "--checkpoint", str(tmp_path)]) == 1
    assert "render:" in capsys.readouterr().err


def test_a_picture_and_a_mask_on_the_command_line_are_repainted(checkpoint, tmp_path, capsys):
    picture, mask, out = tmp_path / "in.png", tmp_path / "mask.png", tmp_path / "out.png"
    Image.new("RGB", (64, 64), (200, 40, 40)).save(picture)
    black_but_for_a_corner = np.zeros((64, 64), np.uint8)
    black_but_for_a_corner[:16, :16] = 255
    Image.fromarray(black_but_for_a_corner).save(mask)
    wish = [
        "a green star",
        "--checkpoint",
        str(checkpoint),
        "--steps",
        "4",
        "--init-image",
        str(picture),
    ]

    statuses = [
        main([*wish, "--strength", "0.5", "--out", str(tmp_path / "whole.png")]),
        main([*wish, "--mask", str(mask), "--out", str(out)]),
    ]

    whole, corner = (
        np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "whole.png", out)
    )
    assert statuses == [0, 0]
    # half of the steps are skipped
    assert json.loads(capsys.readouterr().out.splitlines()[0])["num_steps"] == 2
    assert np.abs(whole - corner).max() > 8
