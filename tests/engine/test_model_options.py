"""Options of a model in fleet.toml, where its family is native: seen in the image, or refused."""

import pytest
import torch
from engine_builders import a_request, a_spec
from tiny_checkpoints import a_family, decoded, denoise, started
from tiny_flow_checkpoints import save_tiny_flux, save_tiny_sd3

from engine.errors import UnsupportedRequest

NEGATIVE = {"prompt": "a red circle", "negative_prompt": "a blue star", "guidance": 1.0}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    return {
        "dev": save_tiny_flux(folder / "dev"),
        "schnell": save_tiny_flux(folder / "schnell", guidance_embeds=False),
        "fill": save_tiny_flux(folder / "fill", context_channels=4 + 64),
        "sd3": save_tiny_sd3(folder / "sd3"),
    }


@pytest.fixture(scope="module")
def pixels(paths):
    def pixels(name, options, **changes):
        family = load(paths, name, options)
        request = a_request(sampler="flow_euler", num_steps=3, **changes)
        return decoded(family, denoise(family, started(family, request)))

    return pixels


def load(paths, name, options):
    family = "sd3" if name == "sd3" else "flux"
    return a_family(a_spec(paths[name], family=family, samplers=("flow_euler",), options=options))


def test_true_cfg_scale_guides_a_distilled_network_away_from_the_negative_prompt(paths, pixels):
    guided = {"true_cfg_scale": 4.0}
    other = NEGATIVE | {"negative_prompt": "a green square"}

    assert torch.equal(pixels("dev", {}, **NEGATIVE), pixels("dev", {}, **other))
    assert not torch.equal(pixels("dev", guided, **NEGATIVE), pixels("dev", {}, **NEGATIVE))
    assert not torch.equal(pixels("dev", guided, **NEGATIVE), pixels("dev", guided, **other))
    assert load(paths, "dev", guided).capabilities.negative_prompt == "used"
    assert load(paths, "dev", {}).capabilities.negative_prompt == "ignored"


@pytest.mark.parametrize("name", ["dev", "sd3"])
def test_max_sequence_length_is_how_much_of_a_prompt_t5_reads(paths, pixels, name):
    short = {"max_sequence_length": 8}
    long = {"max_sequence_length": 64}

    assert not torch.equal(pixels(name, short), pixels(name, long))
    tokens = load(paths, name, short).capabilities.prompt_tokens
    assert min(tokens.values()) == 7


def test_options_are_part_of_the_facts_of_a_fingerprint(paths):
    options = {"max_sequence_length": 64}

    assert load(paths, "dev", options).facts()["options"] == options
    assert "options" not in load(paths, "dev", {}).facts()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dev", {"max_sequence_length": 513}),
        ("dev", {"true_cfg_scale": "much"}),
        ("schnell", {"true_cfg_scale": 2.0}),
        ("fill", {"true_cfg_scale": 2.0}),
        ("sd3", {"true_cfg_scale": 2.0}),
        ("sd3", {"sigmas": 3}),
    ],
)
def test_an_option_that_the_checkpoint_does_not_take_stops_the_load(paths, name, options):
    with pytest.raises(UnsupportedRequest) as refused:
        load(paths, name, options)

    assert refused.value.field == "options"
