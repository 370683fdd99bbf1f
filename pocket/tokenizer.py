"""Build the pocket model's tokenizer: CLIP byte-pair encoding, learnt from the world's own
captions.

Every word a caption can hold becomes one token; any other word falls back to its letters, so no
prompt is refused. The same seed gives the same vocabulary in every process. A library's trainer
numbers its alphabet anew each time, and weights learnt with one numbering read captions wrongly
with another.
"""

import random
import string
from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

from pocket.world import caption, random_scene

NUM_CAPTIONS = 4_000
MAX_TOKENS = 24
START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"


def build_tokenizer(seed: int = 0) -> CLIPTokenizer:
    """Learn the vocabulary from `NUM_CAPTIONS` captions; return it as an ordinary CLIPTokenizer."""
    rng = random.Random(seed)
    words = Counter(
        word for _ in range(NUM_CAPTIONS) for word in caption(random_scene(rng), rng).split()
    )
    merges = learn_merges(words)
    letters = list(string.ascii_lowercase)
    tokens = dict.fromkeys(
        [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), START, END]
    )
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS, pad_token=END)


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Join the most frequent neighbours until every word is a single token.

    Ties are resolved in alphabetical order.
    """
    spelled = {word: [*word[:-1], word[-1] + WORD_END] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        neighbours: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                neighbours[pair] += words[word]
        if not neighbours:
            return merges
        commonest = min(neighbours, key=lambda pair: (-neighbours[pair], pair))
        merges.append(commonest)
        for parts in spelled.values():
            for at in range(len(parts) - 2, -1, -1):
                if (parts[at], parts[at + 1]) == commonest:
                    parts[at : at + 2] = ["".join(commonest)]
