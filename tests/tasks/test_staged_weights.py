"""Weights that are kept elsewhere, as a worker is told of them and has them brought here."""

import hashlib
import os
import tomllib
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import LoadFailure, LoadProblem
from policy.current import CurrentFleet
from policy.sources import is_fetched
from settings import REPO, DeviceSettings
from tasks.engines import engine_config, failure_sentence, staged_specs
from tasks.weights import (
    NO_CACHE,
    BackgroundStaging,
    Places,
    Weights,
    digests_in,
    wanted_of,
)
from tests.buckets import Bucket, an_object_store
from tests.builders import a_fleet, fleet_text, until
from tests.tasks.conftest import a_worker

DIGEST = "0" * 64
OF_WEIGHTS = (
    "model_cache_dir",
    "model_s3_endpoint_url",
    "model_s3_access_key_id",
    "model_s3_secret_access_key",
)
POCKET = REPO / "pocket" / "checkpoint"


def a_fleet_with_a_remote_model(source="s3://weights/x", sha256=None):
    pocket = tomllib.loads(fleet_text())["models"]["pocket"]
    version = {"id": "1", "source": source, "sha256": sha256 or {"unet/a.json": DIGEST}}
    return a_fleet(
        {
            "models.far": pocket | {"versions": [version]},
            "pools.local.models": ["pocket", "far"],
        }
    )


def wanted_from(bucket, name):
    """What a model with one file, so named, needs."""
    digests = {name: bucket.put(name, os.urandom(200_000))}
    return wanted_of(a_fleet_with_a_remote_model(bucket.source, digests), ["far@1"])


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with an_object_store(tmp_path_factory.mktemp("objects")) as store:
        bucket = Bucket(store)
        yield bucket
        bucket.close()


@pytest.fixture
def weights(bucket, tmp_path):
    weights = Weights(bucket.settings(model_cache_dir=tmp_path))
    yield weights
    bucket.door.set()
    weights.keep_only({})


def test_without_a_cache_a_remote_model_is_absent_and_the_others_are_served():
    fleet = a_fleet_with_a_remote_model()
    settings = DeviceSettings(device="cpu")

    near, far = staged_specs(fleet, ["pocket", "far"], settings, Weights(settings))
    config = engine_config(settings, fleet, fleet.pools["local"], may_lack_checkpoints=True)
    with Engine(config, [near, far]) as engine:
        assert engine.checkpoints == ("pocket@1",)
        assert engine.failures == (LoadFailure("far@1", LoadProblem.ABSENT, NO_CACHE),)


def test_model_that_cannot_be_fetched_is_told_with_its_place_and_the_way_out():
    fleet = a_fleet_with_a_remote_model()
    failure = LoadFailure("far@1", LoadProblem.ABSENT, "unet/a.json: is not there")

    assert failure_sentence(fleet, failure, Path("/srv")) == (
        "model 'far', version '1' (s3://weights/x) cannot be loaded: unet/a.json: is not there;"
        " mend that, or correct source and sha256 of this version, then start the worker again"
    )


def test_adapter_that_is_kept_elsewhere_gets_a_place_in_the_cache(tmp_path):
    source = "s3://weights/loras/ink.safetensors"
    fleet = a_fleet({"models.pocket.adapters": {"ink": {"source": source, "sha256": DIGEST}}})

    file = Places(REPO, tmp_path).file_of(fleet.models["pocket"].adapters["ink"])

    assert file.name == "ink.safetensors"
    assert file.is_relative_to(tmp_path / "folders")


def test_staging_for_an_older_revision_is_given_up(bucket, weights):
    staging = BackgroundStaging(weights)
    old, new = (wanted_from(bucket, f"{name}.safetensors") for name in ("old", "new"))
    bucket.stops_after["old.safetensors"] = 100_000
    bucket.door.clear()
    assert staging.stage(old) is None

    staging.stage(new)
    bucket.door.set()
    until(lambda: staging.stage(new) is not None, what="the newer one")

    assert staging.stage(new) == {}
    assert all(weights.cache.has(digest) for digest in digests_in(new))
    assert not any(weights.cache.has(digest) for digest in digests_in(old))


def test_staging_that_was_given_up_and_is_wanted_again_is_not_told_as_done(bucket, weights):
    staging = BackgroundStaging(weights)
    old, new = (wanted_from(bucket, f"{name}-again.safetensors") for name in ("old", "new"))
    bucket.stops_after["old-again.safetensors"] = 100_000
    bucket.door.clear()
    assert staging.stage(old) is None
    until(lambda: bucket.gets["old-again.safetensors"], what="the download")
    assert staging.stage(new) is None, "it is given up at the next piece, which does not come"

    bucket.door.set()
    until(lambda: staging.stage(old) is not None, what="the older one")

    assert staging.stage(old) == {}
    assert all(weights.cache.has(digest) for digest in digests_in(old))


def test_worker_serves_its_weights_until_those_of_a_changed_version_are_here(
    bucket, fleet_here, settings_here, engine_here, tmp_path
):
    digests = {
        name: bucket.put(name, (POCKET / name).read_bytes())
        for name in ("model_index.json", "unet/config.json")
    }
    version = {"id": "1", "source": bucket.source, "sha256": digests}
    changes = {"tiers.quality.checkpoint_every_steps": 2, "models.pocket.versions": [version]}
    new = a_fleet(changes)
    bucket.stops_after["config.json"] = 0
    bucket.door.clear()
    own = bucket.settings(model_cache_dir=tmp_path)
    # A TTL that fits the fleet: a worker whose successor would end at once does not leave.
    changed = {name: getattr(own, name) for name in OF_WEIGHTS} | {"handoff_ttl_s": 86_400}
    settings = settings_here.model_copy(update=changed)
    with a_worker(CurrentFleet(fleet_here, 1), settings, engine_here, name="cpu8@here") as worker:
        go_by, keeper = worker.parts.revisions.go_by, worker.parts.keeper

        def is_fetched() -> bool:
            assert go_by(new) is False
            return "fetches unet/config.json" in keeper.identity.facts["doing"]

        until(is_fetched, what="the download")
        assert not keeper.leaving
        bucket.door.set()
        until(lambda: go_by(new), what="the worker's turn")

        assert keeper.leaving
        assert keeper.identity.facts["doing"] == ""


def test_fetch_that_failed_is_tried_again_after_a_pause_and_the_model_is_served_then(
    bucket, fleet_here, settings_here, engine_here, tmp_path, monkeypatch
):
    monkeypatch.setattr("tasks.weights.FIRST_RETRY_S", 0.0)
    files = {
        str(file.relative_to(POCKET)): file.read_bytes()
        for file in POCKET.rglob("*")
        if file.is_file() and is_fetched(str(file.relative_to(POCKET)))
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    far = fleet_here.models["pocket"].model_dump() | {"aliases": ()}
    far["versions"] = [{"id": "1", "source": f"{bucket.source}/late", "sha256": digests}]
    model = type(fleet_here.models["pocket"]).model_validate(far)
    local = fleet_here.pools["local"].model_copy(update={"models": ("pocket", "far")})
    new = fleet_here.model_copy(
        update={
            "models": {**fleet_here.models, "far": model},
            "pools": {**fleet_here.pools, "local": local},
        }
    )
    own = bucket.settings(model_cache_dir=tmp_path)
    changed = {name: getattr(own, name) for name in OF_WEIGHTS}
    settings = settings_here.model_copy(update=changed)
    with a_worker(CurrentFleet(fleet_here, 1), settings, engine_here, name="cpu9@here") as worker:
        worker.parts.revisions._current.replace(new, 2)
        go_by = worker.parts.revisions.go_by
        until(lambda: go_by(new), what="the revision")
        assert "far@1" in worker.parts.revisions.lacking()

        for name, content in files.items():
            bucket.put(f"late/{name}", content)
        until(worker.parts.revisions.is_to_fetch_again, what="the next try")
        until(lambda: go_by(new), what="the weights")

        assert "far@1" not in worker.parts.revisions.lacking()
        go_by(fleet_here)
