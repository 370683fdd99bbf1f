"""What the gateway knows of samplers and adapters is what the engine says of them."""

from uuid import UUID

import pytest

from engine.samplers import FLOW_SAMPLERS
from policy.catalog import FLOW_FAMILIES, NOISE_ONLY_SAMPLERS
from policy.params import RequestedAdapter
from policy.refusals import InvalidParam
from tests.builders import a_fleet, resolved

PICTURE = {"init_image": UUID(int=1)}
ADAPTERS = {
    f"models.pocket.adapters.{name}": {"source": f"{name}.safetensors", "sha256": "0" * 64}
    for name in ("ink", "gold")
}


def of_flow(family, samplers):
    changes = {"family": family, "samplers": samplers, "default_sampler": samplers[0]}
    return a_fleet({f"models.pocket.{key}": value for key, value in changes.items()})


def test_samplers_that_start_from_noise_only_are_those_of_the_engine():
    found = {name for name, recipe in FLOW_SAMPLERS.items() if recipe.starts_from_noise_only}

    assert found == set(NOISE_ONLY_SAMPLERS)


@pytest.mark.parametrize("family", FLOW_FAMILIES)
@pytest.mark.parametrize("sampler", NOISE_ONLY_SAMPLERS)
def test_a_picture_is_refused_with_a_sampler_that_starts_from_noise_only(family, sampler):
    fleet = of_flow(family, ["flow_euler", sampler])

    assert resolved(fleet, sampler=sampler).sampler == sampler
    assert resolved(fleet, **PICTURE).sampler == "flow_euler"
    with pytest.raises(InvalidParam) as refusal:
        resolved(fleet, sampler=sampler, **PICTURE)
    assert (refusal.value.field, refusal.value.accepted) == ("sampler", ["flow_euler"])


def test_an_adapter_that_is_named_twice_is_refused_where_it_is_named_again():
    fleet = a_fleet(ADAPTERS)
    once = (RequestedAdapter("ink"), RequestedAdapter("gold"))

    assert len(resolved(fleet, adapters=once).adapters) == 2
    with pytest.raises(InvalidParam) as refusal:
        resolved(fleet, adapters=(RequestedAdapter("ink"), RequestedAdapter("ink", 0.5)))
    assert (refusal.value.field, refusal.value.accepted) == ("adapters/1/name", ["gold"])
