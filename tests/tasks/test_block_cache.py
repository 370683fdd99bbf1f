"""`block_cache_threshold` of a model and `block_cache` of its tiers, from fleet.toml to the pixels:
a worker's renderer with Postgres and Redis around it, and a tiny FLUX.
"""

import sys

import numpy as np
import pytest

from engine.engine import Engine
from settings import REPO
from tasks.engines import checkpoint_specs, engine_config
from tests.builders import a_fleet
from tests.tasks.conftest import a_worker

sys.path.append(str(REPO / "tests" / "engine"))
from tiny_flow_checkpoints import save_tiny_flux

JOB = {
    "model": "tiny-flux",
    "width_px": 64,
    "height_px": 64,
    "num_steps": 8,
    "guidance": 1.0,
    "sampler": "flow_euler",
}


@pytest.fixture(scope="module")
def flux_fleet(tmp_path_factory):
    path = save_tiny_flux(tmp_path_factory.mktemp("block-cache") / "flux")
    model = {
        "title": "Tiny",
        "family": "flux",
        "precision": "fp32",
        "sizes": ["64x64"],
        "samplers": ["flow_euler"],
        "default_sampler": "flow_euler",
        "default_guidance": 1.0,
        "max_guidance": 9.0,
        "block_cache_threshold": 0.9,
        "tiers": {
            "quality": {"bucket_rows": {"64x64": 2}},
            "fast": {"block_cache": False},
        },
        "versions": [{"id": "1", "source": str(path)}],
    }
    return a_fleet({"models.tiny-flux": model, "pools.local.models": ["pocket", "tiny-flux"]})


@pytest.fixture(scope="module")
def flux_worker(flux_fleet, settings_here, database_here):
    specs = checkpoint_specs(flux_fleet, ["tiny-flux"], REPO)
    config = engine_config(settings_here, flux_fleet, flux_fleet.pools["local"])
    with (
        Engine(config, specs) as engine,
        a_worker(flux_fleet, settings_here, engine, name="cpu0@flux") as worker,
    ):
        yield worker


def rendered(worker, **params):
    """The pixels of a job's image, and the rows whose later blocks were skipped for it."""
    before = worker.engine.stats()["block_cache_rows_skipped"]
    job = worker.accept(**JOB, **params)
    thread = worker.render(job)
    thread.join(timeout=60)
    assert not thread.is_alive()
    skipped = worker.engine.stats()["block_cache_rows_skipped"] - before
    return worker.renderer.handoff.get(job.id, 0, 1), skipped


def test_block_cache_skips_blocks_in_the_tiers_that_allow_it_and_changes_pixels(flux_worker):
    cached, skipped = rendered(flux_worker, tier="batch")
    whole, skipped_where_forbidden = rendered(flux_worker, tier="fast")

    assert skipped > 0
    assert skipped_where_forbidden == 0
    assert not np.array_equal(cached.array, whole.array)
