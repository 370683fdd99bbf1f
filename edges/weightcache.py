"""Keep weights that were fetched from elsewhere: each file once, under its sha256.

Any number of processes share the folder (its parts: edges/weightroom.py). One downloads a file, the
others wait for it. What a live process holds is never removed.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path

import structlog

from edges.filelocks import FileLock, locked, try_lock
from edges.weightdownloads import observe, receive, size_of
from edges.weightroom import GB, CacheFiles, CacheFull, Room, bytes_of
from edges.weightsources import DigestWrong, RemoteFolder

log = structlog.get_logger(__name__)

ASK_EVERY_S = 0.2  # whether the process that downloads is done

Tell = Callable[[str], object]  # takes a sentence on what is under way


def folder_in(cache: Path, sha256: Mapping[str, str]) -> Path:
    """Return where in a cache the files with these digests lie, or would lie."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sha256.items()))
    return cache.absolute() / "folders" / hashlib.sha256(lines.encode()).hexdigest()[:32]


class WeightCache:
    """The cache, as one process uses it: it holds what it has brought until it lets it go."""

    def __init__(self, folder: Path, *, budget_gb: float, tell: Tell = str) -> None:
        """tell: takes a sentence with every piece of a file; what it raises ends the download."""
        self._files = CacheFiles(folder)
        self._room = Room(self._files, int(budget_gb * GB))
        self._tell = tell
        self._held: dict[str, FileLock] = {}

    @property
    def folder(self) -> Path:
        """Return the folder that it keeps everything in."""
        return self._files.folder

    # --- what is here ---

    def has(self, digest: str) -> bool:
        """Tell whether the file with this digest is here."""
        return self._files.blob(digest).is_file()

    def unlisted_bytes(self, digests: Set[str]) -> int:
        """Return how much lies here beside these files, what is incomplete included."""
        unlisted = [blob for blob in self._files.blobs() if blob.name not in digests]
        return sum(map(bytes_of, unlisted + self._files.partials()))

    def remove_damaged(self, digest: str) -> bool:
        """Read a file again; if it is not what it was, remove it. Return whether it was damaged.

        Also one that is held: whoever has it open goes on with what was read.
        """
        blob = self._files.blob(digest)
        with blob.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                return False
        blob.unlink(missing_ok=True)
        return True

    # --- holding it ---

    def hold(self, digests: Iterable[str]) -> None:
        """Keep from removal those of the files that are here."""
        for digest in digests:
            self._hold(digest)

    def hold_only(self, digests: Set[str]) -> None:
        """Hold these of the files that are held, and no others."""
        for digest in self._held.keys() - digests:
            self._held.pop(digest).release()

    def _hold(self, digest: str) -> bool:
        """Hold the file if it is here and nobody is about to remove it; tell whether it is held."""
        blob = self._files.blob(digest)
        if digest in self._held:
            if blob.is_file():
                return True
            self._held.pop(digest).release()  # it was damaged, and somebody removed it
        lock = try_lock(self._files.lock(digest), shared=True) if blob.is_file() else None
        if lock is None:
            return False
        if not blob.is_file():  # removed just now
            lock.release()
            return False
        with suppress(PermissionError):
            os.utime(blob)
        self._held[digest] = lock
        return True

    # --- fetching ---

    def bring(self, remote: RemoteFolder, sha256: Mapping[str, str]) -> Path:
        """Fetch what is not here of the files with these digests, and hold them; return the folder.

        Raises WeightsError: before the first byte if there is no room for all of them.
        """
        self._files.make_folders()
        missing = {digest: name for name, digest in sha256.items() if not self._hold(digest)}
        sizes = {digest: size_of(remote, name) for digest, name in missing.items()}
        if missing:
            self._room.free(sum(sizes.values()), missing.keys())
        for digest, name in missing.items():
            self._bring_file(remote, name, digest, sizes[digest])
        return self._linked(sha256)

    def fetch_unlisted(self, remote: RemoteFolder, name: str) -> str:
        """Fetch a file of which no digest is known yet, and hold it; return its digest.

        Raises WeightsError.
        """
        self._files.make_folders()
        stand_in = f"new-{secrets.token_hex(8)}"
        size_bytes = size_of(remote, name)
        try:
            with (
                locked(self._files.download_lock(stand_in)),
                self._room.reserved(size_bytes, stand_in),
            ):
                digest = self._received(remote, name, stand_in, size_bytes)
                self._put_in_place(stand_in, digest)
        finally:  # nobody could tell whether a part is of the same file later
            self._files.partial(stand_in).unlink(missing_ok=True)
            self._files.download_lock(stand_in).unlink(missing_ok=True)
        self._hold(digest)
        return digest

    def _bring_file(self, remote: RemoteFolder, name: str, digest: str, size_bytes: int) -> None:
        """Have the file here and held: download it, or wait for the process that does."""
        began_at = time.monotonic()
        while not self._hold(digest):
            lock = try_lock(self._files.download_lock(digest))
            if lock is None:
                done = bytes_of(self._files.partial(digest))
                self._say(f"waits for another process that fetches {name}", done, size_bytes)
                time.sleep(ASK_EVERY_S)
                continue
            with lock:
                observe("wait", time.monotonic() - began_at)
                if not self.has(digest):
                    self._download(remote, name, digest, size_bytes)
            began_at = time.monotonic()

    def _download(self, remote: RemoteFolder, name: str, digest: str, size_bytes: int) -> None:
        """Fetch the file, from where an earlier try ended. The caller has its lock."""
        partial = self._files.partial(digest)
        is_resumed = bytes_of(partial) > 0
        with self._room.reserved(size_bytes, digest):
            found = self._received(remote, name, digest, size_bytes)
            if found != digest and is_resumed:  # what lay here may have been damaged
                partial.unlink()
                found = self._received(remote, name, digest, size_bytes)
            if found != digest:
                partial.unlink()
                raise DigestWrong(f"{name}: has sha256 {found}, not {digest}; it was deleted")
            self._put_in_place(digest, digest)
            log.info("weights_fetched", file=name, sha256=digest, size_bytes=size_bytes)

    def _received(self, remote: RemoteFolder, name: str, partial: str, size_bytes: int) -> str:
        """Have the whole file as the partial one of this name; return its sha256."""

        def tell(done: int) -> None:
            self._say(f"fetches {name}", done, size_bytes)

        place = self._files.partial(partial)
        try:
            return receive(remote, name, place, size_bytes, on_bytes=tell)
        except OSError as error:
            raise CacheFull(f"{name}: cannot be written: {error.strerror}") from error

    def _put_in_place(self, partial: str, digest: str) -> None:
        """Make a verified file a blob, in one step."""
        blob = self._files.blob(digest)
        place = self._files.partial(partial)
        place.chmod(0o444)
        place.replace(blob)
        descriptor = os.open(blob.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _linked(self, sha256: Mapping[str, str]) -> Path:
        """Make the folder of a version: a link to each blob, under the file's own name."""
        folder = folder_in(self.folder, sha256)
        for name, digest in sha256.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # the same link: digest and name are the folder's
                place.symlink_to(os.path.relpath(self._files.blob(digest), place.parent))
        return folder

    def _say(self, what: str, done: int, size_bytes: int) -> None:
        self._tell(f"{what}: {done / GB:.2f} of {size_bytes / GB:.2f} GB")
