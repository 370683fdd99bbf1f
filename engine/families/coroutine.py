"""Run a function as a coroutine: it asks, its owner answers, and only one of them runs at a time.

The function may ask from deep inside other libraries' code.

A generator cannot do that, for it can only yield from its own frame. So the function has a thread
of its own and a baton goes back and forth. Threads rather than greenlets, because much of what
torch calls current (grad mode, stream) is the thread's; what has to be around the function in there
comes as a context manager. It does not know what is asked, nor why.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

Ask = Callable[[Any], Any]
"""ask(request): pass control to the owner, wait until it resumes, and return its answer.

Raises `Closed` when the owner will never answer.
"""


class Closed(BaseException):
    """Unwinds a function that nobody will answer any more.

    No `Exception`: code that survives those must not survive this.
    """


@dataclass(frozen=True)
class Returned:
    """What `resume` gives when the function has come to its end."""

    value: Any


@dataclass(frozen=True)
class _Raised:
    problem: BaseException


class Coroutine:
    """One function on its way. All methods are for its owner, one thread at a time."""

    def __init__(
        self,
        run: Callable[[Ask], Any],
        *,
        name: str = "coroutine",
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Prepare the function; nothing runs before the first `resume`.

        `within()` is entered in the function's own thread, around all of it.
        """
        # Passed to the thread, which drops it at its end. A second reference here would make a
        # cycle that keeps its tensors alive.
        self._thread = threading.Thread(
            target=self._live, args=(run, within), name=name, daemon=True
        )
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._is_closing = False
        self._profile = sys.getprofile()  # a loading thread's pace holds for its calls, too
        self.is_over = False

    def resume(self, answer: Any = None) -> Any:
        """Let the function run on: what it asks for next, or `Returned`.

        The first answer is to no question and is dropped. Raises what the function raised, and
        `RuntimeError` when it is over already.
        """
        if self.is_over:
            raise RuntimeError(f"{self._thread.name} is over")
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._answers.put(answer)
        outcome = self._requests.get()
        if isinstance(outcome, Returned | _Raised):
            self._end()
        if isinstance(outcome, _Raised):
            try:
                raise outcome.problem
            finally:
                del outcome  # else the traceback and this frame hold each other
        return outcome

    def close(self) -> None:
        """End the function wherever it is: not begun, waiting for an answer, or over.

        When this returns, its thread is gone. A waiting function is unwound by `Closed`; whatever
        it returns or raises then is ignored.
        """
        if not self.is_over:
            self._is_closing = True
            self._answers.put(None)
            self._end()

    def _end(self) -> None:
        self.is_over = True
        if self._thread.ident is None:
            # Drops a function that never ran.
            self._thread = threading.Thread(name=self._thread.name)
        else:
            self._thread.join()

    def _live(
        self, run: Callable[[Ask], Any], within: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Run the function in the thread.

        Its result or error is put where the owner waits for it, if anybody does.
        """
        try:
            sys.setprofile(self._profile)
            with within():
                last = Returned(run(self._ask))
        except BaseException as problem:  # noqa: BLE001  it is the owner's to handle
            if not self._is_closing:
                self._requests.put(_Raised(problem))
        else:
            if not self._is_closing:
                self._requests.put(last)

    def _ask(self, request: Any) -> Any:
        if not self._is_closing:
            self._requests.put(request)
            answer = self._answers.get()
            if not self._is_closing:
                return answer
        # Also when it asks again while being unwound, in a `finally` or after a bare `except`.
        raise Closed
