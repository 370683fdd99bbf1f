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
