"""fleet.toml's models as the engine is told of them."""

from dataclasses import replace
from pathlib import Path

from engine.errors import LoadFailure, LoadProblem
from tasks.engines import checkpoint_specs, failure_sentence
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


def test_failed_load_of_a_version_that_a_newer_fleet_lacks_is_told_by_its_name():
    failure = LoadFailure("old@7", LoadProblem.FILES, "unet/config.json is missing")

    sentence = failure_sentence(a_fleet(), failure, Path("/srv"))

    assert sentence.startswith("model 'old@7' cannot be loaded: unet/config.json is missing;")


def test_checkpoint_knows_the_rows_that_reproducible_tiers_pin():
    of_tiers = {
        "quality": {"bucket_rows": {"128x128": 6, "128x192": 4}},
        "fast": {"bucket_rows": {"128x128": 3}},  # a tier of best effort: nothing goes by it
    }

    [spec] = checkpoint_specs(a_fleet({"models.pocket.tiers": of_tiers}), ["pocket"], Path("/srv"))

    assert spec.pinned_rows == {(128, 128): (6,), (128, 192): (4,)}
    assert spec == replace(spec, pinned_rows={})  # another bucket is no reason to load it anew
