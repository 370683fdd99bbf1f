"""`block_cache_threshold` of fleet.toml has an effect on best-effort images of that model alone."""

import numpy as np
import pytest
from engine_builders import a_request, reproducible
from tiny_flow_checkpoints import save_tiny_flux

from engine.config import EngineConfig
from engine.engine import Engine
from settings import REPO
from tasks.engines import checkpoint_specs
from tests.builders import a_fleet

OF_FLUX = {
    "checkpoint": "large@1",
    "sampler": "flow_euler",
    "num_steps": 8,
    "guidance": 1.0,
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return save_tiny_flux(tmp_path_factory.mktemp("block-cache") / "flux")


def rendered(path, threshold: float, request):
    """What an engine makes of the request that is set up as fleet.toml says; rows it skipped."""
    model = {
        "family": "flux",
        "precision": "fp32",
        "sizes": ["64x64"],
        "samplers": ["flow_euler"],
        "default_sampler": "flow_euler",
        "versions": [{"id": "1", "source": str(path)}],
        "block_cache_threshold": threshold,
        "tiers": {"quality": {"bucket_rows": {"64x64": 4}}},
    }
    fleet = a_fleet({f"models.large.{key}": value for key, value in model.items()})
    specs = checkpoint_specs(fleet, ["large"], REPO)
    with Engine(EngineConfig(max_batch_rows=4), specs) as engine:
        image = engine.submit(request).result(60)
        return image, engine.stats()["block_cache_rows_skipped"]


def test_block_cache_key_lets_a_best_effort_image_skip_blocks_and_says_so(flux):
    request = a_request("image", **OF_FLUX)

    with_it, skipped = rendered(flux, 0.9, request)
    without, skipped_without = rendered(flux, 0.0, request)

    assert skipped > 0
    assert skipped_without == 0
    assert not np.array_equal(with_it.pixels, without.pixels)
    assert with_it.record.fingerprint_facts["block_cache"]["threshold"] == 0.9
    assert without.record.fingerprint_facts["block_cache"] is None


def test_block_cache_key_changes_no_bit_of_a_reproducible_image(flux):
    request = reproducible("image", bucket_rows=4, **OF_FLUX)

    with_it, skipped = rendered(flux, 0.9, request)
    without, _ = rendered(flux, 0.0, request)

    assert skipped == 0
    assert np.array_equal(with_it.pixels, without.pixels)
    assert with_it.record.fingerprint == without.record.fingerprint
