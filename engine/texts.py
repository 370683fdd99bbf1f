"""Count the tokens of a request's texts, and tell which of them a checkpoint does not read.

Encoders cut off what is too long for them, without a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class UnreadText:
    """A text of which the end, or all of it, has no effect on the image.

    Tokens are the text's own, without those that frame it.
    """

    field: str  # prompt or negative_prompt
    tokens_given: int
    tokens_read: int  # less than given; 0: nothing of it


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """The tokens of a text, and those of them that are read, from its start."""

    given: int
    read: int


@dataclass(frozen=True, kw_only=True)
class ReadTexts:
    """How a checkpoint reads the texts of a request.

    prompt: None where a family cannot tell.  unread: what of the texts has no effect.
    """

    prompt: TokenCount | None = None
    unread: tuple[UnreadText, ...] = ()


def count(text: str, readers: Sequence[tuple[Any, int]]) -> TokenCount | None:
    """Count the tokens of a text by the encoder that reads furthest; None without an encoder.

    readers: the tokenizer of each text encoder, and the length to which it pads and cuts.
    """
    furthest: TokenCount | None = None
    for tokenizer, length in readers:
        given = _count(tokenizer, text)
        read = min(given, room(tokenizer, length))
        if read == given:
            return TokenCount(given=given, read=read)
        if furthest is None or read > furthest.read:
            furthest = TokenCount(given=given, read=read)
    return furthest


def cut_off(field: str, counted: TokenCount | None) -> UnreadText | None:
    """Tell what is left unread of a text; None if nothing is."""
    if counted is None or counted.read == counted.given:
        return None
    return UnreadText(field=field, tokens_given=counted.given, tokens_read=counted.read)


def ignored(field: str, text: str, readers: Sequence[tuple[Any, int]]) -> UnreadText:
    """Give a text that no encoder is given."""
    return UnreadText(
        field=field,
        tokens_given=max((_count(tokenizer, text) for tokenizer, _ in readers), default=0),
        tokens_read=0,
    )


def room(tokenizer: Any, length: int) -> int:
    """Give the tokens of a text that fit into `length`, beside those that frame it."""
    return max(0, length - int(tokenizer.num_special_tokens_to_add()))


def _count(tokenizer: Any, text: str) -> int:
    return len(
        tokenizer(
            text, add_special_tokens=False, truncation=False, padding=False, verbose=False
        ).input_ids
    )
