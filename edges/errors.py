"""Turn an error of a library into one of ours, so that no caller has to know the library."""

from collections.abc import Callable
from types import TracebackType
from typing import Any


class wrap:
    """Raise our error from each error of `kinds` in the block; any other error passes unchanged.

    into: our error class, which gets the kind and the text of the library's error; or a function
    that makes our error out of the library's, where that text must not be repeated. Keeps no
    state, so threads may share one. A class, because a generator under `contextmanager` is slower
    and this runs at every Redis command.
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
