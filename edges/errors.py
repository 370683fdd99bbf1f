"""How an error of a library becomes one of ours, so that no caller has to know the library."""

from collections.abc import Callable
from types import TracebackType
from typing import Any


class wrap:
    """Raise ours from each error of `kinds` in the block; any other error passes as it is.

    into: a class of ours, told the kind and the text of theirs; or a function that makes ours
    out of theirs, where that text would be too much. Keeps no state, so threads may share one.
    A class and not a generator under `contextmanager`, for it stands before every command.
    """

    __slots__ = ("_into", "_kinds")

    def __init__(
        self,
        kinds: type[Exception] | tuple[type[Exception], ...],
        into: type[Exception] | Callable[[Any], Exception],
    ) -> None:
        self._kinds = kinds
        self._into = into

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or not isinstance(error, self._kinds):
            return
        into = self._into
        if isinstance(into, type):
            raise into(f"{type(error).__name__}: {error}") from error
        raise into(error) from error
