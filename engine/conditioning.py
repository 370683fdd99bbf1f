"""Remember encoded prompts, least recently used out first, bounded in bytes.

A key names the checkpoint's weights, the adapters over its text encoders, the encoder, the text and all else the encoder is told; so
a new version of a checkpoint never meets an old encoding. What is given out is shared: users concatenate, they never write.
"""

from collections import OrderedDict
from collections.abc import Callable

from engine.families.contract import Rows


class ConditioningCache:
    """Encodings by (what encodes, what is encoded). Used by the engine's thread only; the counters may be read from any."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[tuple[str, str], Rows] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def recall(self, encoder: str, text: str, encode: Callable[[], Rows]) -> Rows:
        """What `encode()` gave for this text before, or gives now. An encoding larger than the whole cache is not kept."""
        key = (encoder, text)
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]
        self.misses += 1
        encoding = encode()
        size_bytes = _size_bytes(encoding)
        if size_bytes <= self.max_bytes:
            self._entries[key] = encoding
            self.size_bytes += size_bytes
            while self.size_bytes > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.size_bytes -= _size_bytes(oldest)
        return encoding


def _size_bytes(encoding: Rows) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in encoding.values())
