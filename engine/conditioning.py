"""Remember encoded prompts, least recently used out first, bounded in bytes.

A key names the checkpoint's weights, the adapters over its text encoders, the encoder, the text and
all else the encoder is told; so a new version of a checkpoint never meets an old encoding. What is
given out is shared: users concatenate, they never write.
"""

from collections.abc import Callable

from cachetools import LRUCache

from engine.tensors import Rows


class ConditioningCache:
    """Encodings by (what encodes, what is encoded).

    Used by the device thread only; the counters may be read from any.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._entries: LRUCache[tuple[str, str], Rows] = LRUCache(max_bytes, getsizeof=_size_bytes)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        """Return the memory of all encodings that are remembered."""
        return int(self._entries.currsize)

    def recall(self, encoder: str, text: str, encode: Callable[[], Rows]) -> Rows:
        """Give what `encode()` gave for this text before, or gives now.

        An encoding larger than the whole cache is not kept.
        """
        known = self._entries.get((encoder, text))
        if known is not None:
            self.hits += 1
            return known
        self.misses += 1
        encoding = encode()
        if _size_bytes(encoding) <= self.max_bytes:
            self._entries[encoder, text] = encoding
        return encoding

    def forget(self, encoder_prefix: str) -> None:
        """Drop what was encoded by encoders whose key begins so."""
        for key in [key for key in self._entries if key[0].startswith(encoder_prefix)]:
            del self._entries[key]

    def stats(self) -> dict[str, int]:
        """Give plain numbers since the start."""
        return {
            "cache_hits": self.hits,
            "cache_misses": self.misses,
            "cache_bytes": self.size_bytes,
        }


def _size_bytes(encoding: Rows) -> int:
    return sum(tensor.nbytes for tensor in encoding.values())
