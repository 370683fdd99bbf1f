"""fleet.toml's models as the engine is told of them."""

from pathlib import Path

from tasks.engines import checkpoint_specs
from tests.builders import a_fleet


def test_what_a_model_says_of_its_adapters_reaches_the_engine():
    fleet = a_fleet(
        {
            "models.pocket.adapters": {"ink": {"source": "ink.safetensors", "sha256": "0" * 64}},
            "models.pocket.max_adapter_rank": 128,
            "models.pocket.adapter_slots": 12,
        }
    )

    [spec] = checkpoint_specs(fleet, ["pocket"], Path("/srv"))

    assert (spec.max_adapter_rank, spec.adapter_slots) == (128, 12)
    assert [adapter.path for adapter in spec.adapters] == ["/srv/ink.safetensors"]


def test_a_dotted_model_and_version_name_one_checkpoint():
    text = {"models.pocket.versions.0.id": "3.5"}

    [spec] = checkpoint_specs(a_fleet(text), ["pocket"], Path("/srv"))

    assert spec.name == "pocket@3.5"


def test_version_is_loaded_as_it_says_that_its_weights_are_quantised():
    small = {"id": "small", "source": "a", "quantize": "int8"}
    text = {"models.pocket.versions": [{"id": "1", "source": "a"}, small]}

    specs = checkpoint_specs(a_fleet(text), ["pocket"], Path("/srv"))

    assert [(spec.name, spec.quantize) for spec in specs] == [
        ("pocket@1", None),
        ("pocket@small", "int8"),
    ]
