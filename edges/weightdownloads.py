"""Receive a file of weights: hashed as it is written, and asked for again where it broke off."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import structlog

from edges import telemetry
from edges.weightsources import RemoteFolder, SourceUnavailable

log = structlog.get_logger(__name__)

TRIES = 6  # without a byte of progress
FIRST_PAUSE_S = 0.5  # doubles with every try


def size_of(remote: RemoteFolder, name: str) -> int:
    """Ask for a file's size, a few times. Raises WeightsError."""
    for nth in range(TRIES - 1):
        try:
            return remote.size_bytes(name)
        except SourceUnavailable as error:
            _pause(name, error, nth)
    return remote.size_bytes(name)


def receive(
    remote: RemoteFolder,
    name: str,
    partial: Path,
    size_bytes: int,
    *,
    on_bytes: Callable[[int], object],
) -> str:
    """Have the whole file in `partial`, on the disk; return its sha256.

    What lies there from an earlier try is not fetched again. on_bytes: takes how much is here, at
    first and with every piece; what it raises ends the download.  Raises WeightsError, OSError.
    """
    with partial.open("ab+") as file:
        received = _Received(file, remote.kind, size_bytes)
        failures = 0
        while not received.is_whole:
            before = received.size_bytes
            problem = _go_on(remote, name, received, on_bytes)
            if received.is_whole:
                break
            failures = 0 if received.size_bytes > before else failures + 1
            if failures >= TRIES:
                raise problem
            _pause(name, problem, failures)
        received.end()
        return received.digest


def _go_on(
    remote: RemoteFolder, name: str, received: "_Received", on_bytes: Callable[[int], object]
) -> SourceUnavailable:
    """Receive more of the file; return why it ended, should there be more of it."""
    on_bytes(received.size_bytes)
    try:
        with remote.open(name, received.size_bytes) as download:
            received.begin_at(download.first)
            for piece in download.pieces:
                received.add(piece)
                on_bytes(received.size_bytes)
                if received.is_too_long:
                    break  # it is another file; its digest will tell
    except SourceUnavailable as error:
        return error
    return SourceUnavailable(f"{name}: ended early")


def _pause(name: str, problem: SourceUnavailable, failures: int) -> None:
    log.warning("weights_interrupted", file=name, reason=str(problem))
    time.sleep(FIRST_PAUSE_S * 2**failures)


def observe(phase: str, seconds: float) -> None:
    """Count how long a phase of bringing a file took."""
    telemetry.WEIGHTS_STAGE_SECONDS.labels(phase).observe(seconds)


class _Received:
    """Bytes of a file that arrive, hashed as they are written."""

    def __init__(self, file: BinaryIO, kind: str, expected_bytes: int) -> None:
        """Go on from what an earlier try left in the file."""
        self._file = file
        self._kind = kind
        self._expected_bytes = expected_bytes
        self._hash = hashlib.sha256()
        self._hash_s = 0.0
        self._began_at = time.monotonic()
        self.size_bytes = 0
        file.seek(0)
        while piece := file.read(1 << 20):
            self._hashed(piece)
        if self.is_too_long:
            self._begin_anew()

    @property
    def digest(self) -> str:
        """Return the sha256 of what is here."""
        return self._hash.hexdigest()

    @property
    def is_whole(self) -> bool:
        """Tell whether all of it is here."""
        return self.size_bytes >= self._expected_bytes

    @property
    def is_too_long(self) -> bool:
        """Tell whether more of it is here than there should be."""
        return self.size_bytes > self._expected_bytes

    def begin_at(self, first: int) -> None:
        """Go on from byte `first`, which is where we are or 0."""
        if first != self.size_bytes:
            self._begin_anew()

    def add(self, piece: bytes) -> None:
        """Take the next bytes."""
        self._file.write(piece)
        self._hashed(piece)
        telemetry.WEIGHTS_FETCHED_BYTES.labels(self._kind).inc(len(piece))

    def end(self) -> None:
        """Have all of it on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        observe("verify", self._hash_s)
        observe("download", time.monotonic() - self._began_at - self._hash_s)

    def _begin_anew(self) -> None:
        self._file.truncate(0)
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def _hashed(self, piece: bytes) -> None:
        began_at = time.monotonic()
        self._hash.update(piece)
        self._hash_s += time.monotonic() - began_at
        self.size_bytes += len(piece)
