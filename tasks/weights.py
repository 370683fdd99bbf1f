"""Have the weights of models on this machine: find their folders, or fetch them to the cache first.

A place that fails is the fault of its models alone: they are told as not here.
"""

import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import structlog

from edges.weightcache import Tell, WeightCache, folder_in
from edges.weightsources import WeightsError, open_folder
from policy.fleet import Adapter, Fleet, Model, ModelVersion, checkpoint_name
from policy.sources import HubSource, RemoteSource, S3Source, remote_source
from settings import DeviceSettings

log = structlog.get_logger(__name__)

NO_CACHE = "MODEL_CACHE_DIR is not set, so nothing is fetched"
FIRST_RETRY_S = 15.0  # after a fetch that failed; doubles with every failure
LONGEST_RETRY_S = 1800.0
PATIENCE_S = 0.5  # what is here already needs less, so nobody has to ask twice


class Places(NamedTuple):
    """The folders of this machine in which weights lie."""

    root: Path  # where relative paths start
    cache: Path | None = None  # of what was fetched; None: nothing is

    def folder_of(self, version: ModelVersion) -> Path:
        """Return where a version's files lie, or will."""
        if remote_source(version.source) is None:
            return self.root / version.source
        return self._fetched(version.source, version.sha256)

    def file_of(self, adapter: Adapter) -> Path:
        """Return where an adapter lies, or will."""
        remote = remote_source(adapter.source)
        if remote is None:
            return self.root / adapter.source
        name = PurePosixPath(remote.path).name
        return self._fetched(adapter.source, {name: adapter.sha256}) / name

    def _fetched(self, source: str, sha256: Mapping[str, str]) -> Path:
        return Path(source) if self.cache is None else folder_in(self.cache, sha256)


class RemoteFiles(NamedTuple):
    """Files below a folder that is kept elsewhere, with their digests."""

    folder: RemoteSource
    sha256: Mapping[str, str]


Wanted = Mapping[str, list[RemoteFiles]]  # what is fetched for each checkpoint, by its name


def wanted_of(fleet: Fleet, checkpoints: Collection[str]) -> Wanted:
    """List what these checkpoints need from elsewhere; those that need nothing are left out."""
    wanted = {}
    for model_name, model in fleet.models.items():
        for version in model.versions:
            name = checkpoint_name(model_name, version.id)
            if name in checkpoints and (files := list(_files_of(model, version))):
                wanted[name] = files
    return wanted


def digests_in(wanted: Wanted) -> set[str]:
    """Return the digests of all files."""
    return {
        digest for each in wanted.values() for files in each for digest in files.sha256.values()
    }


def _files_of(model: Model, version: ModelVersion) -> Iterator[RemoteFiles]:
    folder = remote_source(version.source)
    if folder is not None:
        yield RemoteFiles(folder, version.sha256)
    for adapter in model.adapters.values():
        file = remote_source(adapter.source)
        if file is not None:
            yield RemoteFiles(_parent(file), {PurePosixPath(file.path).name: adapter.sha256})


def _parent(file: RemoteSource) -> RemoteSource:
    """Return the folder of a file that is kept elsewhere."""
    path = str(PurePosixPath(file.path).parent)
    path = "" if path == "." else path
    if isinstance(file, S3Source):
        return S3Source(file.bucket, path)
    return HubSource(file.repo, file.commit, path)


class Weights:
    """The weights of fleet.toml's models, as one process reads them.

    What it has fetched stays in the cache while the process lives, or until `keep_only`.
    """

    def __init__(self, settings: DeviceSettings, *, tell: Tell = str) -> None:
        """tell: takes a sentence on what is being fetched, with every piece of it."""
        self._settings = settings
        self.tell = tell
        self.absent: Mapping[str, str] = {}  # what `stage` returned last
        self.cache: WeightCache | None = None
        if settings.model_cache_dir is not None:
            self.cache = WeightCache(
                settings.model_cache_dir,
                budget_gb=settings.model_cache_gb,
                tell=lambda doing: self.tell(doing),
            )

    def stage(self, wanted: Wanted) -> Mapping[str, str]:
        """Have all files here, and held; return why some checkpoints lack theirs, by name."""
        if self.cache is None:
            self.absent = dict.fromkeys(wanted, NO_CACHE)
            return self.absent
        self.cache.hold(digests_in(wanted))
        absent = {}
        for name, each in wanted.items():
            try:
                for files in each:
                    self.cache.bring(open_folder(files.folder, self._settings), files.sha256)
            except (WeightsError, OSError) as problem:
                absent[name] = str(problem)
        self.absent = absent
        return absent

    def keep_only(self, wanted: Wanted) -> None:
        """Let the cache remove what is not wanted, should it need room."""
        if self.cache is not None:
            self.cache.hold_only(digests_in(wanted))


class BackgroundStaging:
    """Stage checkpoints in a thread, while whoever asks for them goes on with its work."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._turn: _Turn | None = None
        self._absent = weights.absent
        self._pause_s = FIRST_RETRY_S
        self._again_at = time.monotonic() + FIRST_RETRY_S

    @property
    def doing(self) -> str:
        """Say what is under way; empty if nothing is."""
        turn = self._turn
        return turn.doing if turn is not None and turn.is_alive() else ""

    def stage(self, wanted: Wanted) -> Mapping[str, str] | None:
        """Return what `Weights.stage` does, or None while it is under way: ask again.

        What was begun before is given up if something else is wanted now.
        """
        turn = self._turn
        if turn is not None and (turn.is_given_up or turn.wanted != wanted):
            turn.is_given_up = True
            turn.join(PATIENCE_S)
            if turn.is_alive():
                return None
            self._turn = None
        if not wanted:
            self._absent = {}
            return self._absent
        if self._turn is None:
            self._turn = _Turn(self._weights, wanted)
            self._turn.start()
        self._turn.join(PATIENCE_S)
        if self._turn.is_alive():
            return None
        self._absent = self._turn.absent
        return self._absent

    def is_to_try_again(self) -> bool:
        """Tell whether what could not be fetched is due again; if so, `stage` begins anew."""
        if self._weights.cache is None or not self._absent:
            self._pause_s = FIRST_RETRY_S
            self._again_at = time.monotonic() + self._pause_s
            return False
        if self.doing or time.monotonic() < self._again_at:
            return False
        log.info("weights_tried_again", checkpoints=sorted(self._absent))
        self._turn = None
        self._pause_s = min(LONGEST_RETRY_S, self._pause_s * 2)
        self._again_at = time.monotonic() + self._pause_s
        return True


class _GivenUp(Exception):
    """Something else is wanted now."""


class _Turn(threading.Thread):
    """One run of `Weights.stage`."""

    def __init__(self, weights: Weights, wanted: Wanted) -> None:
        super().__init__(name="weights", daemon=True)
        self._weights = weights
        self.wanted = wanted
        self.doing = ""
        self.is_given_up = False
        self.absent: Mapping[str, str] = {}

    def run(self) -> None:
        """Stage what is wanted."""
        self._weights.tell = self._tell
        try:
            self.absent = self._weights.stage(self.wanted)
        except _GivenUp:
            log.info("weights_given_up", doing=self.doing)
        except Exception as error:
            log.exception("weights_not_staged")
            self.absent = dict.fromkeys(self.wanted, f"{type(error).__name__}: {error}")

    def _tell(self, doing: str) -> None:
        self.doing = doing
        if self.is_given_up:
            raise _GivenUp
