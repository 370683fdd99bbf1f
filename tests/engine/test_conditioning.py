"""The conditioning cache remembers by weights and text, and never more than its bytes."""

import pytest
import torch

from engine.conditioning import ConditioningCache


def an_encoding(kilobytes=1):
    return {"text": torch.zeros(1, kilobytes * 256)}


def test_an_encoding_is_given_again():
    cache = ConditioningCache(10_000)
    first = cache.recall("weights", "a red circle", an_encoding)

    again = cache.recall("weights", "a red circle", lambda: 1 / 0)

    assert again is first
    assert (cache.hits, cache.misses) == (1, 1)


def test_another_checkpoint_does_not_meet_it():
    cache = ConditioningCache(10_000)
    first = cache.recall("old weights", "a red circle", an_encoding)

    assert cache.recall("new weights", "a red circle", an_encoding) is not first


def test_the_least_recently_used_goes_first():
    cache = ConditioningCache(2 * 1024)
    cache.recall("w", "a", an_encoding)
    cache.recall("w", "b", an_encoding)
    cache.recall("w", "a", an_encoding)

    cache.recall("w", "c", an_encoding)

    assert cache.size_bytes == 2 * 1024
    cache.recall("w", "a", lambda: 1 / 0)
    assert len(cache) == 2


def test_an_encoding_larger_than_the_cache_is_not_kept():
    cache = ConditioningCache(1024)

    cache.recall("w", "a", lambda: an_encoding(kilobytes=2))

    assert (len(cache), cache.size_bytes) == (0, 0)


def test_an_encoding_larger_than_the_cache_pushes_nothing_out():
    cache = ConditioningCache(1024)
    cache.recall("w", "a", an_encoding)

    cache.recall("w", "b", lambda: an_encoding(kilobytes=2))

    assert cache.size_bytes == 1024
    cache.recall("w", "a", lambda: 1 / 0)


def test_lookups_are_counted_as_found_or_not():
    cache = ConditioningCache(10_000)

    for text in ("a", "b", "a", "a"):
        cache.recall("w", text, an_encoding)

    assert (cache.hits, cache.misses) == (2, 2)


def test_an_encoding_that_fails_is_not_remembered():
    cache = ConditioningCache(10_000)
    with pytest.raises(ZeroDivisionError):
        cache.recall("w", "a", lambda: 1 / 0)

    assert cache.recall("w", "a", an_encoding).keys() == {"text"}
    assert (len(cache), cache.size_bytes) == (1, 1024)
