"""What policy says of an image's steps and rows is what the engine's families do."""

import pytest
from diffusers import EulerDiscreteScheduler
from engine_builders import ALWAYS, NATIVE_FAMILIES, a_request, a_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import a_picture, save_tiny_sdxl
from tiny_flow_checkpoints import save_tiny_flux, save_tiny_sd3

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import UnsupportedRequest
from engine.families import flow, sd
from policy.steps import rows_taken, steps_made
from tests.builders import a_fleet

SIZES = {"sizes": ((64, 64),)}
FAMILY_OF = {"sd": "sd", "sdxl": "sdxl", "sd3": "sd3", "dev": "flux", "schnell": "flux"}


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory):
    """One engine with a checkpoint of every native family."""
    folder = tmp_path_factory.mktemp("steps")
    sdxl = save_tiny_sdxl(folder / "sdxl", EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    schnell = save_tiny_flux(folder / "schnell", guidance_embeds=False)
    noise, velocity = {"samplers": ("euler",), **SIZES}, {"samplers": ("flow_euler",), **SIZES}
    specs = [
        a_spec(checkpoint, name="sd", **noise),
        a_spec(sdxl, name="sdxl", family="sdxl", **noise),
        a_spec(save_tiny_sd3(folder / "sd3"), name="sd3", family="sd3", **velocity),
        a_spec(save_tiny_flux(folder / "dev"), name="dev", family="flux", **velocity),
        a_spec(schnell, name="schnell", family="flux", **velocity),
    ]
    with Engine(EngineConfig(growth_ceiling=ALWAYS, max_batch_rows=8), specs) as engine:
        yield engine


def asked(checkpoint, **changes):
    sampler = "euler" if checkpoint in ("sd", "sdxl") else "flow_euler"
    return a_request(f"{checkpoint} {changes}", checkpoint=checkpoint, sampler=sampler, **changes)


def test_steps_and_rows_are_asked_of_every_native_family():
    assert set(FAMILY_OF.values()) == set(NATIVE_FAMILIES)


@pytest.mark.parametrize("checkpoint_name", list(FAMILY_OF))
@pytest.mark.parametrize(("num_steps", "strength"), [(5, 0.5), (7, 0.3), (4, 0.75), (3, 1.0)])
def test_steps_are_as_policy_says(engine, checkpoint_name, num_steps, strength):
    request = asked(
        checkpoint_name,
        num_steps=num_steps,
        strength=strength,
        init_image=a_picture(seed=3),
        guidance=1.0,
    )

    made = engine.submit(request).result(60).record.num_steps

    assert made == steps_made(FAMILY_OF[checkpoint_name], num_steps=num_steps, strength=strength)


@given(num_steps=st.integers(1, 200), strength=st.floats(0.0001, 1.0))
@settings(max_examples=500, deadline=None)
def test_steps_are_as_policy_says_for_any_strength_that_leaves_one(num_steps, strength):
    request = a_request(num_steps=num_steps, strength=strength)

    for family, skipped in (
        ("sd", sd._skipped_steps(request)),
        ("sd3", flow._skipped_steps(request)),
    ):
        if skipped < num_steps:  # else the family refuses it
            assert num_steps - skipped == steps_made(family, num_steps=num_steps, strength=strength)


@pytest.mark.parametrize("negative_prompt", ["", "a blue square"])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("checkpoint_name", list(FAMILY_OF))
def test_rows_are_as_policy_says(engine, checkpoint_name, guidance, negative_prompt):
    own = {"guidance_distilled": False} if checkpoint_name == "schnell" else {}
    changes = {f"models.pocket.{key}": value for key, value in own.items()} | {
        "models.pocket.family": FAMILY_OF[checkpoint_name]
    }
    model = a_fleet(changes).models["pocket"]
    request = asked(
        checkpoint_name, num_steps=2, guidance=guidance, negative_prompt=negative_prompt
    )

    taken = engine.submit(request).result(60).record.max_rows

    assert taken == rows_taken(model, guidance=guidance, negative_prompt=negative_prompt)


@pytest.mark.parametrize("embeds", [True, False])
def test_a_flux_network_that_takes_guidance_otherwise_than_declared_stops_the_start(
    tmp_path, embeds
):
    folder = save_tiny_flux(tmp_path / "flux", guidance_embeds=embeds)
    spec = a_spec(
        folder,
        name="flux",
        family="flux",
        samplers=("flow_euler",),
        guidance_distilled=not embeds,
        **SIZES,
    )

    with pytest.raises(UnsupportedRequest, match="guidance_distilled: "):
        Engine(EngineConfig(), [spec]).start()
