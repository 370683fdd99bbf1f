"""Replace a network in one image's copy of a pipeline, to intercept the pipeline's calls of it.

The networks themselves are shared by all images and are left as they are: nothing is hooked,
nothing is set on them. It does not know who is told, nor what comes of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.families.calls import NetworkCall


class StandIn:
    """Looks like a network in every way, `isinstance` included. What is set on it stays here."""

    def __init__(self, network: Any) -> None:
        self._network = network

    @property  # type: ignore[misc]  # every object has a `__class__` to write to
    def __class__(self) -> Any:
        return type(self._network)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


class Denoiser(StandIn):
    """Asks for what the network would give: `ask(call)`."""

    def __init__(self, network: Any, name: str, ask: Callable[[NetworkCall], Any]) -> None:
        super().__init__(network)
        self._name = name
        self._ask = ask
        self._context = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask(NetworkCall(self._name, self._context, args, kwargs))

    forward = __call__

    @contextmanager
    def cache_context(self, name: str, **_where: Any) -> Iterator[None]:
        """Name the cache context of the calls made within it.

        On the network itself the context would apply to all images.
        """
        outer = self._context
        self._context = name
        try:
            yield
        finally:
            self._context = outer


class Decoder(StandIn):
    """Tells when the network is about to decode.

    A cast tells it too: some pipelines make one before they decode.
    """

    def __init__(self, network: Any, tell: Callable[[], None]) -> None:
        super().__init__(network)
        self._tell = tell

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the network does."""
        self._tell()
        return self._network.decode(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the network does."""
        self._tell()
        return self._network.to(*args, **kwargs)


def lay_over(sampler: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method of this one sampler by `around(sampler, method, ...)`.

    The method is `set_timesteps` or `step`. Its signature and the name of its class stay, which
    pipelines ask for. What is laid over last is called first. It is handed the sampler and should
    not hold it: a reference cycle would keep its tensors until the next garbage collection.
    """
    if not hasattr(sampler, "_laid_over"):
        kind: Any = type(sampler)
        sampler.__class__ = _opened(kind)
        sampler._laid_over = {}
    sampler._laid_over.setdefault(name, []).append(around)


@functools.cache
def _opened(kind: Any) -> Any:
    """Make the same class, but that over its two methods there can be others."""

    def opened(name: str) -> Callable[..., Any]:
        method = getattr(kind, name)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            called = functools.partial(method, self)
            for around in self._laid_over.get(name, ()):
                called = functools.partial(around, self, called)
            return called(*args, **kwargs)

        return call

    methods = {name: opened(name) for name in ("set_timesteps", "step")}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})
