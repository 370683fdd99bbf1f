"""Weights from S3: fetched once, verified, resumed, and kept within a budget."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from edges.weightcache import WeightCache, folder_in
from edges.weightroom import CacheFull
from edges.weightsources import DigestWrong, SourceRefused
from settings import REPO
from tests.buckets import Bucket, an_object_store
from tests.builders import until


@pytest.fixture(scope="module")
def shared_bucket(tmp_path_factory):
    with an_object_store(tmp_path_factory.mktemp("objects")) as store:
        bucket = Bucket(store)
        yield bucket
        bucket.close()


@pytest.fixture
def bucket(shared_bucket):
    for told in ("gets", "ranges", "breaks_after", "stops_after"):
        getattr(shared_bucket, told).clear()
    shared_bucket.door.clear()
    yield shared_bucket
    shared_bucket.door.set()


@pytest.fixture
def cache(tmp_path):
    cache = WeightCache(tmp_path / "cache", budget_gb=1)
    yield cache
    cache.hold_only(set())


def names_in(cache, kind) -> set[str]:
    return {file.name for file in (cache.folder / kind).iterdir()}


def test_version_is_fetched_once_and_stands_under_its_own_names(bucket, cache):
    digests = {
        "model_index.json": bucket.put("model_index.json", b"{}"),
        "unet/w.safetensors": bucket.put("unet/w.safetensors", b"weights"),
    }

    folder = cache.bring(bucket.folder(), digests)
    again = cache.bring(bucket.folder(), digests)

    assert folder == again
    assert (folder / "unet/w.safetensors").read_bytes() == b"weights"
    assert bucket.gets == {"model_index.json": 1, "w.safetensors": 1}


def test_equal_files_of_two_versions_are_kept_once(bucket, cache):
    vae = bucket.put("vae.safetensors", os.urandom(50_000))
    first = cache.bring(bucket.folder(), {"vae.safetensors": vae})

    second = cache.bring(
        bucket.folder(), {"vae.safetensors": vae, "one.json": bucket.put("one.json", b"1")}
    )

    assert first != second
    assert bucket.gets["vae.safetensors"] == 1


def test_file_with_another_digest_is_refused_and_deleted(bucket, cache):
    bucket.put("wrong.safetensors", b"something else")

    with pytest.raises(DigestWrong, match=r"wrong.safetensors: has sha256 \w{64}, not 00"):
        cache.bring(bucket.folder(), {"wrong.safetensors": "0" * 64})

    assert names_in(cache, "blobs") == names_in(cache, "partial") == set()


def test_download_that_breaks_off_goes_on_where_it_was(bucket, cache):
    content = os.urandom(500_000)
    digest = bucket.put("broken.safetensors", content)
    bucket.breaks_after["broken.safetensors"] = 200_000

    folder = cache.bring(bucket.folder(), {"broken.safetensors": digest})

    assert (folder / "broken.safetensors").read_bytes() == content
    assert bucket.ranges[0] == 0
    assert 0 < bucket.ranges[1] < 500_000


def test_damaged_part_of_an_earlier_try_is_fetched_anew(bucket, cache):
    content = os.urandom(100_000)
    digest = bucket.put("damaged.safetensors", content)
    (cache.folder / "partial").mkdir(parents=True)
    (cache.folder / "partial" / digest).write_bytes(bytes(40_000))

    folder = cache.bring(bucket.folder(), {"damaged.safetensors": digest})

    assert (folder / "damaged.safetensors").read_bytes() == content
    assert bucket.ranges == [40_000, 0]


def test_damaged_file_of_the_cache_is_removed_and_a_sound_one_stays(bucket, cache):
    digests = {name: bucket.put(name, name.encode()) for name in ("sound.json", "hurt.json")}
    folder = cache.bring(bucket.folder(), digests)
    hurt = (folder / "hurt.json").resolve()
    hurt.chmod(0o644)
    hurt.write_bytes(b"something else")

    assert cache.remove_damaged(digests["hurt.json"])
    assert not cache.remove_damaged(digests["sound.json"])
    assert names_in(cache, "blobs") == {digests["sound.json"]}


def test_digest_of_an_unlisted_file_is_taken_while_it_is_fetched(bucket, cache):
    digest = bucket.put("unlisted.safetensors", b"weights of a new model")

    assert cache.fetch_unlisted(bucket.folder(), "unlisted.safetensors") == digest
    assert cache.has(digest)
    assert names_in(cache, "partial") == set()


def test_file_that_is_not_there_is_told_by_its_place(bucket, cache):
    with pytest.raises(SourceRefused, match=rf"s3://{bucket.name}/model/no.json: is not there"):
        cache.bring(bucket.folder(), {"no.json": "0" * 64})


def test_keys_that_may_not_read_are_told_by_their_variables(bucket, cache):
    folder = bucket.folder(model_s3_secret_access_key="another")

    with pytest.raises(SourceRefused, match="MODEL_S3_SECRET_ACCESS_KEY"):
        cache.bring(folder, {"no.json": "0" * 64})


def test_too_little_room_is_told_before_a_byte_is_fetched_and_nothing_is_removed(bucket, tmp_path):
    small = WeightCache(tmp_path, budget_gb=0.0001)  # 100 kB
    old = {"old.safetensors": bucket.put("old.safetensors", os.urandom(60_000))}
    small.bring(bucket.folder(), old)
    small.hold_only(set())
    digests = {
        name: bucket.put(name, os.urandom(70_000)) for name in ("a.safetensors", "b.safetensors")
    }

    with pytest.raises(CacheFull, match=r"have no room in .*MODEL_CACHE_GB 0.0001"):
        small.bring(bucket.folder(), digests)

    assert bucket.gets == {"old.safetensors": 1}
    assert names_in(small, "blobs") == set(old.values())


def test_eviction_takes_the_longest_unused_and_spares_what_another_process_holds(bucket, tmp_path):
    holder = WeightCache(tmp_path, budget_gb=0.0001)
    user = WeightCache(tmp_path, budget_gb=0.0001)
    digests = {}
    for nth, name in enumerate(("held", "older", "newer")):
        digests[name] = bucket.put(f"{name}.safetensors", os.urandom(30_000))
        one = holder if name == "held" else user
        one.bring(bucket.folder(), {f"{name}.safetensors": digests[name]})
        os.utime(tmp_path / "blobs" / digests[name], (1000 + nth, 1000 + nth))
    user.hold_only(set())

    new = bucket.put("new.safetensors", os.urandom(30_000))
    user.bring(bucket.folder(), {"new.safetensors": new})

    assert names_in(user, "blobs") == {digests["held"], digests["newer"], new}
    holder.hold_only(set())
    user.hold_only(set())


_BRING = """
import json, sys
from pathlib import Path
from edges.weightcache import WeightCache
from edges.weightsources import open_folder
from policy.sources import remote_source
from settings import DeviceSettings, load

order = json.loads(sys.argv[1])
cache = WeightCache(Path(order["cache"]), budget_gb=1, tell=lambda text: print(text, flush=True))
folder = open_folder(remote_source(order["source"]), load(DeviceSettings))
print(cache.bring(folder, order["sha256"]), flush=True)
"""


def a_process(bucket, folder, digests) -> subprocess.Popen:
    order = {"cache": str(folder), "source": bucket.source, "sha256": digests}
    return subprocess.Popen(
        [sys.executable, "-c", _BRING, json.dumps(order)],
        cwd=REPO,
        env=os.environ | bucket.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def waits(process) -> bool:
    return "waits for another" in process.stdout.readline()


def test_of_two_processes_one_downloads_and_when_it_is_killed_the_other_goes_on(bucket, cache):
    content = os.urandom(4_000_000)
    digest = bucket.put("large.safetensors", content)
    bucket.stops_after["large.safetensors"] = 2_500_000
    partial = cache.folder / "partial" / digest
    first = a_process(bucket, cache.folder, {"large.safetensors": digest})
    until(lambda: partial.exists() and partial.stat().st_size >= 2_000_000, what="half of it")
    second = a_process(bucket, cache.folder, {"large.safetensors": digest})
    until(lambda: waits(second), what="that the second waits")

    first.kill()
    first.communicate()
    bucket.door.set()
    second.communicate(timeout=60)

    assert second.returncode == 0
    assert (cache.folder / "blobs" / digest).read_bytes() == content
    assert bucket.gets == {"large.safetensors": 2}
    assert bucket.ranges[1] >= 2_000_000
    assert names_in(cache, "partial") == set()


def test_two_that_want_a_file_at_once_make_one_download(bucket, cache):
    digests = {"once.safetensors": bucket.put("once.safetensors", os.urandom(200_000))}
    bucket.stops_after["once.safetensors"] = 100_000
    told = []
    other = WeightCache(cache.folder, budget_gb=1, tell=told.append)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.bring, bucket.folder(), digests)
        until(lambda: bucket.gets, what="the download")
        second = threads.submit(other.bring, bucket.folder(), digests)
        until(lambda: told, what="that the second waits")
        bucket.door.set()

    assert told[0].startswith("waits for another process that fetches once.safetensors")
    assert first.result() == second.result() == folder_in(cache.folder, digests)
    assert bucket.gets == {"once.safetensors": 1}
    other.hold_only(set())


def test_file_is_let_go_when_it_is_held_no_more(bucket, tmp_path):
    cache = WeightCache(tmp_path, budget_gb=0.0001)
    names = ("kept.safetensors", "left.safetensors", "new.safetensors")
    digests = {name: bucket.put(name, os.urandom(40_000)) for name in names}
    for name in names[:2]:
        cache.bring(bucket.folder(), {name: digests[name]})

    with pytest.raises(CacheFull):
        cache.bring(bucket.folder(), {names[2]: digests[names[2]]})
    cache.hold_only({digests["kept.safetensors"]})
    cache.bring(bucket.folder(), {names[2]: digests[names[2]]})

    assert names_in(cache, "blobs") == {digests["kept.safetensors"], digests["new.safetensors"]}
    cache.hold_only(set())


class ArrivesMeanwhile:
    """A folder whose file another process has brought by the time that its size is told."""

    def __init__(self, folder, other: WeightCache, digests) -> None:
        self._folder = folder
        self._other = other
        self._digests = digests

    def size_bytes(self, name: str) -> int:
        self._other.bring(self._folder, self._digests)
        return self._folder.size_bytes(name)


def test_file_that_another_process_has_just_brought_needs_no_second_room(bucket, tmp_path):
    one = WeightCache(tmp_path, budget_gb=0.0001)
    other = WeightCache(tmp_path, budget_gb=0.0001)
    digests = {"large.safetensors": bucket.put("large.safetensors", os.urandom(70_000))}

    folder = one.bring(ArrivesMeanwhile(bucket.folder(), other, digests), digests)

    assert (folder / "large.safetensors").stat().st_size == 70_000
    assert bucket.gets == {"large.safetensors": 1}
    other.hold_only(set())
    one.hold_only(set())
