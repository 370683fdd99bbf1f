"""Estimate what a piece of work costs on this device.

Covers the seconds of a forward by its rows, of an encode and of a decode, and the bytes of a row.

Everything is measured, nothing assumed: `observe_*` is called at warm-up and after every piece of
work, `adopt` with what `./darkroom calibrate` wrote down (`curves.py`). No torch, no clock, no
files. This module does not know who waits; `scheduler.py` asks it.

Three things stand between a measurement and a decision:

- A *moving average* per row count. The first forward of a size also pays for what is done once
  (kernels chosen, memory laid out), so the second observation replaces it when lower. From then on
  one observation counts as at most `OUTLIER` times the average. Values from a file are trusted like
  a settled average: later observations move them slowly.

- A *curve* through the averages that never falls (pool adjacent violators): more rows are never
  cheaper. Averages that say otherwise share their mean, in which a row count that was not seen for
  `HALF_LIFE` forwards has half the weight. The curve is straight between measured row counts.
  Beyond the last it continues with the last slope. Below the first it uses the first slope, but
  never goes below the proportional share.

- A *second look*. A row count found too expensive is not used and so would never be measured again.
  The next row count above the one in use is therefore tried when it was seen only once, or not
  within the last `STALE_AFTER` forwards of its batch key.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from engine.inflight import BatchKey

OUTLIER = 2.0
HALF_LIFE = 50  # forwards of the batch key
STALE_AFTER = 1000  # likewise
MAX_KEYS = 256  # a pipeline call that can share no forward brings a batch key of its own
PART_GAIN = 0.95  # several forwards that take this part of one's seconds are worth the change
TICK_S = 1e-6  # no forward takes less, whatever a coarse clock says

# Used before the first forward of a checkpoint was timed. Only the proportions matter then: they
# tell which image is nearer its end.
ROW_S_PER_MEGAPIXEL = 0.25
DECODE_STEPS = 3.0  # a decode is as long as so many single-row steps
ENCODE_STEPS = 1.0

Value = TypeVar("Value")


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device."""

    fixed_bytes: int  # whatever it does, besides the weights of all checkpoints
    per_row_bytes: int  # what a row of a forward adds
    decode_bytes: int  # what a decode adds
    encode_bytes: int = 0  # what an encode adds, the one of a picture where one may be given


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What is known of one batch key."""

    key: BatchKey
    steps: Mapping[int, float]  # seconds of a forward by its rows; empty where none was timed
    encode_s: float | None = None
    decode_s: float | None = None
    footprint: Footprint | None = None


class CostModel:
    """Seconds and bytes by batch key."""

    def __init__(self, *, memory: float = 0.1) -> None:
        """Start without measurements.

        memory: the weight of the newest observation in a moving average, above 0 and at most 1.
        """
        if not 0 < memory <= 1:
            raise ValueError(f"memory is {memory}, not above 0 and at most 1")
        self.memory = memory
        self._points: _ByKey[_Forwards] = _ByKey()  # of a single row count
        self._curves: _ByKey[_Forwards] = _ByKey()  # of more than one
        self._encodes: _ByKey[_Average] = _ByKey()
        self._decodes: _ByKey[_Average] = _ByKey()
        self._footprints: dict[BatchKey, Footprint] = {}

    # --- seconds ---

    def observe_step(self, key: BatchKey, rows: int, seconds: float) -> None:
        """Note a forward of `rows` rows, padding included, that took `seconds`."""
        forwards = self._forwards_of(key)
        forwards.observe(rows, max(seconds, TICK_S), self.memory)
        self._file(key, forwards)

    def observe_encode(self, key: BatchKey, seconds: float) -> None:
        """Note an encode.

        A prompt the cache knew takes next to nothing: both kinds are averaged, for nobody knows
        which comes next.
        """
        average = self._encodes.get(key) or _Average()
        average.observe(seconds, self.memory)
        self._encodes.keep(key, average)

    def observe_decode(self, key: BatchKey, seconds: float) -> None:
        """Note the decode of one image."""
        average = self._decodes.get(key) or _Average()
        average.observe(seconds, self.memory, most=OUTLIER)
        self._decodes.keep(key, average)

    def is_measured(self, key: BatchKey) -> bool:
        """Tell whether a forward of this very batch key is known, by observation or from a file."""
        return key in self._curves or key in self._points

    def measured_keys(self) -> list[BatchKey]:
        """Give the batch keys of which a forward is known."""
        return [*self._curves, *self._points]

    def curve(self, key: BatchKey) -> Curve:
        """Give the seconds of a forward by its rows, as known now.

        A key never measured borrows the curve of the most alike key of its checkpoint, scaled by
        pixels; one with a single row count measured borrows only the shape, of one that has more.
        Where nothing is known, the first row takes `ROW_S_PER_MEGAPIXEL` and each further one half
        of that.
        """
        point = self._points.get(key)
        curve = self._curves.nearest(key)
        if point is not None and curve is not None:
            (rows,) = point.averages
            return Curve(curve[1], point.seconds(rows) / curve[1].seconds(rows))
        found = curve or self._points.nearest(key)
        if found is None:
            return Curve(_UNMEASURED, _pixels(key) / 1e6)
        alike, forwards = found
        return Curve(forwards, _pixels(key) / _pixels(alike))

    def step_s(self, key: BatchKey, rows: int) -> float:
        """Give the seconds of a forward of `rows` rows, padding included."""
        return self.curve(key).seconds(rows)

    def encode_s(self, key: BatchKey) -> float:
        """Give the seconds of an encode.

        Borrowed like a step's, but not scaled: a prompt has no pixels.
        """
        found = self._encodes.nearest(key)
        return ENCODE_STEPS * self.step_s(key, 1) if found is None else found[1].seconds

    def decode_s(self, key: BatchKey) -> float:
        """Give the seconds of the decode of one image; borrowed like a step's."""
        found = self._decodes.nearest(key)
        if found is None:
            return DECODE_STEPS * self.step_s(key, 1)
        alike, average = found
        return average.seconds * _pixels(key) / _pixels(alike)

    # --- bytes ---

    def observe_memory(
        self,
        key: BatchKey,
        *,
        fixed_bytes: int,
        per_row_bytes: int,
        decode_bytes: int,
        encode_bytes: int = 0,
    ) -> None:
        """Note the memory that the device needs.

        It is a fixed part besides the weights of all checkpoints, a part per row of a forward, one
        per decode and one per encode.
        """
        self._footprints[key] = Footprint(fixed_bytes, per_row_bytes, decode_bytes, encode_bytes)

    def row_limit(self, key: BatchKey, budget_bytes: int | None) -> int | None:
        """Tell the rows of a forward that fit into the budget beside one decode.

        An encode comes before or after a forward, never beside it, and in the same memory.

        budget_bytes: what the weights leave.  None where nothing is measured or no budget set.
        """
        footprint = self._footprints.get(key)
        if footprint is None or budget_bytes is None:
            return None
        free_bytes = budget_bytes - footprint.fixed_bytes - footprint.decode_bytes
        return max(0, free_bytes // max(1, footprint.per_row_bytes))

    # --- all of it ---

    def measurements(self) -> list[Measurements]:
        """Give everything known, by batch key; `adopt` takes it back."""
        keys = {*self.measured_keys(), *self._encodes, *self._decodes, *self._footprints}
        return [self._measurements_of(key) for key in sorted(keys, key=str)]

    def adopt(self, measured: Iterable[Measurements]) -> None:
        """Take over what was measured before. What was measured here already stays as it is."""
        settled = math.ceil(1 / self.memory)
        for one in measured:
            if one.steps and not self.is_measured(one.key):
                forwards = _Forwards()
                forwards.load(one.steps, settled)
                self._file(one.key, forwards)
            for averages, seconds in ((self._encodes, one.encode_s), (self._decodes, one.decode_s)):
                if seconds is not None and one.key not in averages:
                    average = _Average()
                    average.load(seconds, settled)
                    averages.keep(one.key, average)
            if one.footprint is not None:
                self._footprints.setdefault(one.key, one.footprint)

    def forget(self, checkpoint: str) -> None:
        """Drop all that is known of a checkpoint."""
        for values in (self._points, self._curves, self._encodes, self._decodes):
            for key in [key for key in values if key.checkpoint == checkpoint]:
                values.drop(key)
        footprints = self._footprints
        self._footprints = {
            key: one for key, one in footprints.items() if key.checkpoint != checkpoint
        }

    def working_bytes(self) -> int:
        """Return what the largest encode or row known, and one decode beside it, add to weights."""
        return max(
            (
                max(one.per_row_bytes, one.encode_bytes) + one.decode_bytes
                for one in self._footprints.values()
            ),
            default=0,
        )

    def _forwards_of(self, key: BatchKey) -> _Forwards:
        return self._curves.get(key) or self._points.get(key) or _Forwards()

    def _file(self, key: BatchKey, forwards: _Forwards) -> None:
        """Keep it as the key's, and as the one used last."""
        if len(forwards.averages) > 1:
            self._points.drop(key)
            self._curves.keep(key, forwards)
        else:
            self._points.keep(key, forwards)

    def _measurements_of(self, key: BatchKey) -> Measurements:
        averages = self._forwards_of(key).averages
        encode = self._encodes.get(key)
        decode = self._decodes.get(key)
        return Measurements(
            key=key,
            steps={rows: average.seconds for rows, average in sorted(averages.items())},
            encode_s=None if encode is None else encode.seconds,
            decode_s=None if decode is None else decode.seconds,
            footprint=self._footprints.get(key),
        )


class Curve:
    """Seconds of a forward by its rows, for one batch key."""

    def __init__(self, measured: _Forwards, scale: float) -> None:
        self._measured = measured
        self._scale = scale

    def seconds(self, rows: int) -> float:
        """Give the seconds of a forward of `rows` rows, padding included."""
        return self._scale * self._measured.seconds(rows)

    def is_worth_growing(
        self, from_rows: int, to_rows: int, *, used_rows: int, ceiling: float = 0.85
    ) -> bool:
        """Tell whether growing a forward is cheaper than running its new rows alone.

        It is when the growth costs less than `ceiling` times a single-row step for each of the
        `used_rows` rows gained. `from_rows` and `to_rows` include padding. True as well where a
        second look is due.
        """
        measured = self._measured
        more_s = measured.seconds(to_rows) - measured.seconds(from_rows)
        return more_s < ceiling * used_rows * measured.seconds(1) or measured.is_due(
            from_rows, to_rows
        )

    def knee(self, most_rows: int, ceiling: float = 0.85) -> int:
        """Return the rows, at most `most_rows`, that a forward grows to.

        Single rows are taken to be always waiting.
        """
        rows = 1
        for more in range(2, most_rows + 1):
            if self.is_worth_growing(rows, more, used_rows=more - rows, ceiling=ceiling):
                rows = more
        return self.best_part(rows, range(1, rows))

    def best_part(self, rows: int, parts: Iterable[int], padded: Callable[[int], int] = int) -> int:
        """Return the size of the forwards that do `rows` rows soonest, one after the other.

        It is one of `parts`, or `rows` where none of them is sooner by a good deal, and while that
        size is to be measured again.  padded: gives the rows of a forward that holds so many.
        """
        best = rows
        all_rows = padded(rows)
        if self._measured.is_doubtful(all_rows):
            return best
        best_s = PART_GAIN * self.seconds(all_rows)
        for part in parts:
            whole, rest = divmod(rows, part)
            rest_s = self.seconds(padded(rest)) if rest else 0.0
            took_s = whole * self.seconds(padded(part)) + rest_s
            if took_s < best_s:
                best = part
                best_s = took_s
        return best


class _Average:
    """Seconds of one kind of work: a plain mean at first, a moving average from then on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.observations = 0
        self.seen_at = 0  # forwards of its curve by then

    def observe(self, seconds: float, memory: float, most: float = math.inf) -> None:
        self.observations += 1
        if self.observations == 1 or (self.observations == 2 and seconds < self.seconds):
            self.seconds = seconds
        else:
            weight = max(memory, 1 / self.observations)
            self.seconds += weight * (min(seconds, most * self.seconds) - self.seconds)

    def load(self, seconds: float, observations: int) -> None:
        self.seconds = seconds
        self.observations = observations


class _Forwards:
    """What was measured of the forwards of one batch key."""

    def __init__(self) -> None:
        self.averages: dict[int, _Average] = {}  # by rows
        self._observations = 0
        self._rows: list[int] = []  # measured, ascending
        self._seconds: list[float] = []  # at each of them, never falling
        self._known: dict[int, float] = {}  # what `seconds` said since the last observation

    def observe(self, rows: int, seconds: float, memory: float) -> None:
        self._observations += 1
        average = self.averages.setdefault(rows, _Average())
        average.observe(seconds, memory, most=OUTLIER)
        average.seen_at = self._observations
        self._fit(settled=1 / memory)

    def load(self, steps: Mapping[int, float], observations: int) -> None:
        for rows, seconds in steps.items():
            self.averages.setdefault(rows, _Average()).load(seconds, observations)
        self._fit(settled=observations)

    def seconds(self, rows: int) -> float:
        if rows not in self._known:
            self._known[rows] = self._read(rows)
        return self._known[rows]

    def is_due(self, from_rows: int, to_rows: int) -> bool:
        """Tell whether `to_rows` is the next measured row count and should be measured again."""
        place = bisect_right(self._rows, from_rows)
        return (
            self._rows[place : place + 1] == [to_rows]
            and self.is_doubtful(to_rows)
            and not self.is_doubtful(from_rows)
        )

    def is_doubtful(self, rows: int) -> bool:
        """Tell whether these rows were measured, and only once or long ago."""
        average = self.averages.get(rows)
        return average is not None and (
            average.observations == 1 or self._observations - average.seen_at > STALE_AFTER
        )

    def _fit(self, settled: float) -> None:
        """Fit the curve anew (pool adjacent violators).

        Neighbours of which the larger is cheaper share their weighted mean.
        """
        self._known.clear()
        self._rows = sorted(self.averages)
        blocks: list[tuple[float, float, int]] = []  # seconds, weight, row counts
        for rows in self._rows:
            average = self.averages[rows]
            age = self._observations - average.seen_at
            seconds = average.seconds
            weight = min(average.observations, settled) * 0.5 ** (age / HALF_LIFE)
            count = 1
            while blocks and blocks[-1][0] >= seconds:
                before, before_weight, before_count = blocks.pop()
                seconds = (seconds * weight + before * before_weight) / (weight + before_weight)
                weight = weight + before_weight
                count = count + before_count
            blocks.append((seconds, weight, count))
        self._seconds = [seconds for seconds, _, count in blocks for _ in range(count)]

    def _read(self, rows: int) -> float:
        known = self._rows
        seconds = self._seconds
        if len(known) == 1:
            return seconds[0] * (1 + rows) / (1 + known[0])
        left = min(max(bisect_right(known, rows) - 1, 0), len(known) - 2)
        slope = (seconds[left + 1] - seconds[left]) / (known[left + 1] - known[left])
        straight = seconds[left] + slope * (rows - known[left])
        return max(straight, seconds[0] * rows / known[0]) if rows < known[0] else straight


_UNMEASURED = _Forwards()
_UNMEASURED.load({1: ROW_S_PER_MEGAPIXEL}, 1)


class _ByKey(dict[BatchKey, Value], Generic[Value]):
    """Values of the `MAX_KEYS` batch keys used last, and which of them is most alike another."""

    def __init__(self) -> None:
        super().__init__()
        self._borrowed: dict[BatchKey, BatchKey | None] = {}

    def keep(self, key: BatchKey, value: Value) -> None:
        """Note the value as the one used last.

        Forget the one not used for longest when there are too many.
        """
        if key not in self or len(self._borrowed) > MAX_KEYS:
            self._borrowed.clear()
        self.pop(key, None)
        self[key] = value
        if len(self) > MAX_KEYS:
            del self[next(iter(self))]

    def drop(self, key: BatchKey) -> None:
        """Forget it. Harmless when it is not here."""
        if self.pop(key, None) is not None:
            self._borrowed.clear()

    def nearest(self, key: BatchKey) -> tuple[BatchKey, Value] | None:
        """Return the key itself where it is known, else the most similar one of its checkpoint.

        The same call counts first, then pixels, then text length.
        """
        own = self.get(key)
        if own is not None:
            return key, own
        if key not in self._borrowed:
            self._borrowed[key] = min(
                (other for other in self if other.checkpoint == key.checkpoint),
                key=_distance_from(key),
                default=None,
            )
        alike = self._borrowed[key]
        return None if alike is None else (alike, self[alike])


def _distance_from(key: BatchKey) -> Any:
    def distance(other: BatchKey) -> tuple[bool, float, int, str]:
        pixels = abs(math.log(_pixels(other) / _pixels(key)))
        return other.call != key.call, pixels, abs(other.text_length - key.text_length), str(other)

    return distance


def _pixels(key: BatchKey) -> int:
    return key.height_px * key.width_px
