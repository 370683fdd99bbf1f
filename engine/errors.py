"""Everything that can go wrong in the engine.

EngineError              the unplanned, with its cause attached: log it, count the attempt
├── UnknownCheckpoint    the checkpoint is not here: wrongly routed, another worker may hold it
├── UnsupportedRequest   no engine with this catalog could render it; names the field
│   └── PackageMissing   the checkpoint is sound, and a package that reads it is not installed
├── CheckpointCorrupt    a file is missing, altered or unreadable; names the file
├── CheckpointAbsent     its files could not be brought to this machine; says why
├── NothingLoaded        none of the checkpoints can be loaded; holds why, for each
├── LoadFailed           one checkpoint cannot be loaded; holds why
├── TooLittleMemory      the device has no room for the checkpoint's weights
├── SnapshotRefused      no snapshot, damaged, or of another request or set-up: start from step 0
├── OutOfDeviceMemory    the device could not hold the work: try again alone, or elsewhere
├── ImageNotFinite       the checkpoint produced NaN or infinity: the same request fails again
├── ImageCanceled        somebody asked for it
├── DeadlinePassed       the time was too short: give more time, a better rank, a quieter engine
└── EngineStopped        the engine is not running: another worker can render it from the start
    ├── DeviceLost       the device broke for this process, and no image is to blame
    └── EngineDied       its device thread broke while it held this image, maybe because of it
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto


class LoadProblem(Enum):
    """Name what keeps a checkpoint from being loaded, for whoever tells the way out."""

    FILES = auto()  # one is missing, altered or unreadable
    ABSENT = auto()  # its files could not be brought here
    SETTINGS = auto()  # the spec asks for what the checkpoint, or the engine, does not have
    MEMORY = auto()  # the device has too little
    UNPLANNED = auto()  # anything else; its traceback is in the log


@dataclass(frozen=True)
class LoadFailure:
    """Say why one checkpoint is not served.

    problem: names the file or the setting.
    """

    checkpoint: str
    kind: LoadProblem
    problem: str


class EngineError(Exception):
    """Something the engine did not plan for; its cause is attached.

    The caller decides whether a retry makes sense.
    """


class UnknownCheckpoint(EngineError):
    """The request names a checkpoint this engine was not started with.

    Sending it to a worker that holds it helps.
    """

    def __init__(self, checkpoint: str, known: list[str]) -> None:
        super().__init__(
            f"no checkpoint named {checkpoint!r} here; "
            f"this engine holds {', '.join(known) or 'none'}"
        )
        self.checkpoint = checkpoint


class UnsupportedRequest(EngineError):
    """A field of the request asks for what cannot be rendered; no retry helps. `field` names it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class PackageMissing(UnsupportedRequest):
    """A part of the checkpoint needs a package that is not installed; `package` names it.

    Install it where the worker runs, or serve another checkpoint.
    """

    def __init__(self, part: str, package: str) -> None:
        super().__init__(part, f"needs the package {package}, which is not installed here")
        self.package = package


class CheckpointCorrupt(EngineError):
    """A file of the checkpoint folder is missing, altered or unreadable; `file` names it.

    Fetch the checkpoint again.
    """

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file}: {problem}")
        self.file = file
        self.problem = problem


class CheckpointAbsent(EngineError):
    """The files of the checkpoint could not be brought to this machine, and the message says why.

    Mend the place that they come from.
    """


class NothingLoaded(EngineError):
    """None of the engine's checkpoints can be loaded; `failures` says why, for each.

    Mend what they name and start the engine again.
    """

    def __init__(self, failures: "Sequence[LoadFailure]") -> None:
        super().__init__("; ".join(f"{each.checkpoint}: {each.problem}" for each in failures))
        self.failures = tuple(failures)


class LoadFailed(EngineError):
    """A checkpoint cannot be loaded into a running engine; `failure` says why.

    Mend what it names and load it again. The others are served meanwhile.
    """

    def __init__(self, failure: LoadFailure, path: str) -> None:
        super().__init__(f"checkpoint {failure.checkpoint!r} ({path}): {failure.problem}")
        self.failure = failure


class TooLittleMemory(EngineError):
    """The weights of a checkpoint do not fit beside those that are loaded.

    Unload another first, or use a larger device.
    """

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"it needs {needed_bytes / 1e9:.2f} GB of the device's memory, "
            f"and {max(0, free_bytes) / 1e9:.2f} GB are free"
        )


class SnapshotRefused(EngineError):
    """A snapshot cannot be used here, and the message says why.

    Rendering from the start gives the image, though not from that step.
    """


class OutOfDeviceMemory(EngineError):
    """Even alone, this image did not fit into the device's memory.

    A quieter or a larger device may hold it.
    """


class ImageNotFinite(EngineError):
    """The decoded image held NaN or infinity.

    The same request on the same checkpoint fails again.
    """


class ImageCanceled(EngineError):
    """The image was canceled before it was finished."""


class DeadlinePassed(EngineError):
    """The image was not finished in the time it was given.

    The same request fits into more time, at a better rank, or where less waits.
    """


class EngineStopped(EngineError):
    """The engine was never started, was stopped, or its device thread died.

    Nothing of this image is kept.
    """


class DeviceLost(EngineStopped):
    """The device broke in a way that only another process, or the host, can repair.

    No image is to blame, and none of this process can be rendered any more.
    """


class EngineDied(EngineStopped):
    """The device thread broke with this image in flight: nobody can say whether it was to blame.

    Count the attempt.
    """
