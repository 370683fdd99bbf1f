"""Decode untrusted pictures in processes of their own, so that none can block or crash the gateway.

An image decoder may hold the interpreter for long and may have unknown faults. Here it has limits
on processor time and memory of its own and no secrets in its environment, and if it crashes, it
crashes alone. The number of processes limits what decoding takes in all. Turns are given fairly, so
that a tenant with a thousand pictures does not delay the others.

Run as a module, this is such a process: it answers one request after the other on its standard
output until its input ends.
"""

import contextlib
import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Any, BinaryIO

from edges import pictures
from edges.pictures import NormalisedPicture, NotAPicture
from settings import REPO

AT_ONCE = 2  # some 350 MB each at worst
WAIT_S = 10.0  # for a turn
MAX_WAITING = 16  # of one tenant: each is a request that holds a thread
CPU_S = 8  # of one picture: the worst that is accepted takes about two
EXTRA_BYTES = 1_500_000_000  # of address space, beside what the process has when it starts
_PIECE_BYTES = 262_144
_READY = b"ready\n"
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class TooBusy(Exception):
    """No decoder is free; try again in a moment."""


class DecoderDied(NotAPicture):
    """The picture exceeded the limits on time or memory, or hit a fault of the decoder.

    The next picture gets a new process.
    """


class Decoders:
    """Own the decoder processes of one gateway process; each starts when it is first needed."""

    def __init__(self, *, at_once: int = AT_ONCE, wait_s: float = WAIT_S) -> None:
        self._turns = FairSemaphore(at_once, wait_s=wait_s, max_waiting=MAX_WAITING)
        self._idle = [_Decoder() for _ in range(at_once)]

    def normalise(self, source: bytes | BinaryIO, *, tenant: Hashable) -> NormalisedPicture:
        """Decode and encode again (edges/pictures.py). Raises NotAPicture, TooBusy.

        source: a file is read, in pieces, only when it is this picture's turn; those that wait take
        no memory.
        """
        with self._turn(tenant) as decoder:
            told, content = decoder.ask({"what": "normalise"}, source)
            return NormalisedPicture(content, **told)

    def selects(self, mask: bytes, width_px: int, height_px: int, *, tenant: Hashable) -> bool:
        """Tell whether this stored picture, as a mask, selects anything to repaint.

        Raises NotAPicture, TooBusy.
        """
        return self._told("selects", mask, width_px, height_px, tenant)

    def has_hole(self, picture: bytes, width_px: int, height_px: int, *, tenant: Hashable) -> bool:
        """Tell whether part of this stored picture is transparent. Raises NotAPicture, TooBusy."""
        return self._told("has_hole", picture, width_px, height_px, tenant)

    def close(self) -> None:
        """End the idle processes; those at work end when their gateway does."""
        for decoder in self._idle:
            decoder.close()

    def _told(
        self, what: str, content: bytes, width_px: int, height_px: int, tenant: Hashable
    ) -> bool:
        with self._turn(tenant) as decoder:
            told, _ = decoder.ask(
                {"what": what, "width_px": width_px, "height_px": height_px}, content
            )
            return bool(told["is_so"])

    @contextmanager
    def _turn(self, tenant: Hashable) -> Iterator["_Decoder"]:
        with self._turns.one(tenant):
            decoder = self._idle.pop()
            try:
                yield decoder
            finally:
                self._idle.append(decoder)


@dataclass(eq=False)
class _Waiting:
    tenant: Hashable
    arrival: int
    may_go: bool = False


class FairSemaphore:
    """Give at most `at_once` tenants' callers a turn at the same time, fairly.

    Next is the tenant with the fewest turns running; among equals, the one whose last turn began
    the longest ago.
    """

    def __init__(self, at_once: int, *, wait_s: float, max_waiting: int) -> None:
        self._at_once = at_once
        self._wait_s = wait_s
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._running = Counter[Hashable]()
        self._waiting = list[_Waiting]()
        self._last_turn: dict[Hashable, int] = {}  # of those that run or wait
        self._count = 0

    @contextmanager
    def one(self, tenant: Hashable) -> Iterator[None]:
        """Wait for a turn of the tenant's.

        Raises TooBusy after `wait_s`, or if `max_waiting` callers of the tenant wait already.
        """
        self._wait(tenant)
        try:
            yield
        finally:
            with self._changed:
                self._running[tenant] -= 1
                self._let_go()

    def _wait(self, tenant: Hashable) -> None:
        with self._changed:
            if sum(other.tenant == tenant for other in self._waiting) >= self._max_waiting:
                raise TooBusy
            self._count += 1
            own = _Waiting(tenant, self._count)
            self._waiting.append(own)
            self._let_go()
            if not self._changed.wait_for(lambda: own.may_go, timeout=self._wait_s):
                self._waiting.remove(own)
                raise TooBusy

    def _let_go(self) -> None:
        """Give free turns to those that wait."""
        self._running += Counter()  # removes tenants with no turn running

        def rank(one: _Waiting) -> tuple[int, int, int]:
            return self._running[one.tenant], self._last_turn.get(one.tenant, 0), one.arrival

        while self._waiting and self._running.total() < self._at_once:
            chosen = min(self._waiting, key=rank)
            self._waiting.remove(chosen)
            self._running[chosen.tenant] += 1
            self._count += 1
            self._last_turn[chosen.tenant] = self._count
            chosen.may_go = True
        known = {one.tenant for one in self._waiting} | self._running.keys()
        self._last_turn = {
            tenant: turn for tenant, turn in self._last_turn.items() if tenant in known
        }
        self._changed.notify_all()


class _Decoder:
    """Drive one decoder process from the gateway; used by one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(
        self, question: dict[str, Any], source: bytes | BinaryIO
    ) -> tuple[dict[str, Any], bytes]:
        """Return the answer, and the bytes that come with it.

        Raises NotAPicture, DecoderDied, and TooBusy where no process can be started.
        """
        process = self._started()
        try:
            return self._ask(process, question, source)
        except NotAPicture:
            raise
        except (OSError, ValueError) as error:
            self.close()
            raise DecoderDied("takes more to decode than any picture may") from error
        except BaseException:  # half a question or answer may be on its way
            self.close()
            raise

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            assert process.stdin is not None
            assert process.stdout is not None
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            process.wait()

    def _ask(
        self, process: "subprocess.Popen[bytes]", question: dict[str, Any], source: bytes | BinaryIO
    ) -> tuple[dict[str, Any], bytes]:
        given = process.stdin
        answers = process.stdout
        assert given is not None
        assert answers is not None
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        size_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        given.write(json.dumps(question | {"size_bytes": size_bytes}).encode() + b"\n")
        shutil.copyfileobj(file, given, _PIECE_BYTES)
        given.flush()
        told = json.loads(answers.readline())  # nothing: it has died, and that is no JSON
        if (why := told.pop("why", None)) is not None:
            raise NotAPicture(why)
        return told, _exactly(answers, told.pop("size_bytes"))

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.close()
            command = [sys.executable, "-m", "edges.decoders"]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    cwd=REPO,
                    env=_ENVIRONMENT,
                )
            except OSError as error:  # neither memory nor a process is left
                raise TooBusy from error
            if self._process.stdout is None or self._process.stdout.readline() != _READY:
                self.close()
                raise TooBusy
        return self._process


def _exactly(pipe: IO[bytes], size_bytes: int) -> bytes:
    content = pipe.read(size_bytes)
    if len(content) < size_bytes:
        raise OSError("the decoder has died")
    return content


def _answer(question: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    if question["what"] == "normalise":
        told = asdict(pictures.normalise(content))
        return told, told.pop("content")
    decide = {"selects": pictures.selects, "has_hole": pictures.has_hole}[question["what"]]
    return {"is_so": decide(content, question["width_px"], question["height_px"])}, b""


def _limit_memory() -> None:
    """Limit this process's memory and file size, so that no picture can bring the machine down."""
    # OSError where there is no /proc, ValueError where a lower limit stands.
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as file:
            now_bytes = int(file.read().split()[0]) * resource.getpagesize()
        _set_soft_limit(resource.RLIMIT_AS, now_bytes + EXTRA_BYTES)
        _set_soft_limit(resource.RLIMIT_FSIZE, 0)


def _limit_processor_time() -> None:
    """Allow one picture's processor time from now on; beyond it the kernel ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent_s = int(used.ru_utime + used.ru_stime)
    _set_soft_limit(resource.RLIMIT_CPU, spent_s + CPU_S + 1)


def _set_soft_limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value, hard))


def serve(given: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until the input ends."""
    answers.write(_READY)
    answers.flush()
    while line := given.readline():
        question = json.loads(line)
        _limit_processor_time()
        try:
            told, content = _answer(question, _exactly(given, question["size_bytes"]))
        except NotAPicture as error:
            told = {"why": str(error)}
            content = b""
        answers.write(json.dumps(told | {"size_bytes": len(content)}).encode() + b"\n" + content)
        answers.flush()


if __name__ == "__main__":
    # These signals are meant for the gateway; when it ends, the input ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _limit_memory()
    serve(sys.stdin.buffer, sys.stdout.buffer)
