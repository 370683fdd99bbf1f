"""Make room for weights in their folder on the disk, within a budget.

    blobs/SHA256            a whole, verified file; never written again
    partial/SHA256          the part of one that has arrived
    locks/SHA256            shared by who uses the file, held alone by who removes it
    locks/SHA256.partial    held alone by who downloads the file, or removes its part
    promises/SHA256         the size of one that is being downloaded
    folders/DIGEST/         a version's files under their own names: links to blobs

What a live process uses is never removed. The rest goes when room is needed: parts first, then
files, longest unused first.
"""

import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from edges.filelocks import FileLock, locked, try_lock
from edges.weightsources import WeightsError

log = structlog.get_logger(__name__)

GB = 1e9


class CacheFull(WeightsError):
    """There is too little room, and nothing more that may be removed."""


class CacheFiles:
    """The paths of the cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def make_folders(self) -> None:
        """Make the folders that are not there. Raises WeightsError."""
        try:
            for name in ("blobs", "partial", "locks", "promises", "folders"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"MODEL_CACHE_DIR: {self.folder} cannot be written: {error.strerror}"
            raise WeightsError(reason) from error

    def blob(self, digest: str) -> Path:
        """Return the place of a whole file."""
        return self.folder / "blobs" / digest

    def partial(self, digest: str) -> Path:
        """Return the place of a file that is being fetched."""
        return self.folder / "partial" / digest

    def lock(self, digest: str) -> Path:
        """Return the lock file of a whole file."""
        return self.folder / "locks" / digest

    def download_lock(self, digest: str) -> Path:
        """Return the lock file of one that is being fetched."""
        return self.folder / "locks" / f"{digest}.partial"

    def promise(self, digest: str) -> Path:
        """Return the place where the size of a file that is being fetched is noted."""
        return self.folder / "promises" / digest

    def blobs(self) -> list[Path]:
        """List the whole files."""
        return sorted((self.folder / "blobs").glob("*"))

    def partials(self) -> list[Path]:
        """List the files of which a part is here."""
        return sorted((self.folder / "partial").glob("*"))


class Room:
    """The bytes that the cache may have."""

    def __init__(self, files: CacheFiles, budget_bytes: int) -> None:
        self._files = files
        self._budget_bytes = budget_bytes

    def free(self, size_bytes: int, digests: Set[str]) -> None:
        """Remove what is longest unused until so many bytes, those of `digests`, have room.

        Raises CacheFull, with nothing removed, if even then there would be too little.
        """
        with self._alone():
            self._free(size_bytes, digests)

    @contextmanager
    def reserved(self, size_bytes: int, digest: str) -> Iterator[None]:
        """Have room for a file while the block runs, which no other process counts as free.

        The caller holds the lock of the download. Raises CacheFull.
        """
        promise = self._files.promise(digest)
        with self._alone():
            self._free(size_bytes, {digest})
            promise.write_text(str(size_bytes))
        try:
            yield
        finally:
            promise.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with locked(self._files.lock("room")):
            yield

    def _free(self, size_bytes: int, digests: Set[str]) -> None:
        short = self._short_of(size_bytes, digests)
        if short > 0:
            self._evict(short, size_bytes, digests)

    def _short_of(self, size_bytes: int, digests: Set[str]) -> int:
        """Return how many bytes are lacking, by the budget and on the disk."""
        present = sum(
            bytes_of(self._files.partial(each)) + bytes_of(self._files.blob(each))
            for each in digests
        )
        used = sum(bytes_of(blob) for blob in self._files.blobs() if blob.name not in digests)
        outstanding = 0
        for partial in self._files.partials():
            if partial.name in digests:
                continue
            arrived = bytes_of(partial)
            expected = max(arrived, self._promised(partial.name))
            used += expected
            outstanding += expected - arrived
        free = shutil.disk_usage(self._files.folder).free - outstanding
        return max(used + size_bytes - self._budget_bytes, size_bytes - present - free)

    def _evict(self, short: int, size_bytes: int, digests: Set[str]) -> None:
        """Remove files that nobody uses until `short` bytes are free. Raises CacheFull."""
        taken: list[tuple[Path, FileLock]] = []
        freed = 0
        try:
            for file in self._oldest_first(digests):
                if freed >= short:
                    break
                lock = try_lock(self._lock_of(file))
                if lock is not None:
                    taken.append((file, lock))
                    freed += bytes_of(file)
            if freed < short:
                raise CacheFull(self._too_full(size_bytes))
            for file, _ in taken:
                file.unlink(missing_ok=True)
                log.info("weights_evicted", sha256=file.name)
        finally:
            for _, lock in taken:
                lock.release()

    def _lock_of(self, file: Path) -> Path:
        is_whole = file.parent.name == "blobs"
        return self._files.lock(file.name) if is_whole else self._files.download_lock(file.name)

    def _oldest_first(self, digests: Set[str]) -> list[Path]:
        files = [
            *sorted(self._files.partials(), key=_used_at),
            *sorted(self._files.blobs(), key=_used_at),
        ]
        return [file for file in files if file.name not in digests]

    def _too_full(self, size_bytes: int) -> str:
        folder = self._files.folder
        free_gb = shutil.disk_usage(folder).free / GB
        return (
            f"{size_bytes / GB:.3f} GB have no room in {folder} beside what is in use"
            f" (MODEL_CACHE_GB {self._budget_bytes / GB:g}, {free_gb:.1f} GB free on its disk)"
        )

    def _promised(self, digest: str) -> int:
        """Return the size of the file that a live process downloads; 0 if none does."""
        with suppress(OSError, ValueError):
            promised = int(self._files.promise(digest).read_text())
            lock = try_lock(self._files.download_lock(digest))
            if lock is None:
                return promised
            lock.release()
        return 0


def bytes_of(file: Path) -> int:
    """Return the size of a file; 0 if it is not there."""
    with suppress(OSError):
        return file.stat().st_size
    return 0


def _used_at(file: Path) -> float:
    with suppress(OSError):
        return file.stat().st_mtime
    return 0.0
