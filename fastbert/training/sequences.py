"""Pretraining sequences from documents of tokenised sentences.

Pairs of segments for masked language modelling with next sentence prediction, after Devlin et al. 2019, A.2, and the
code released with it; or RoBERTa's full sentences without the second task (Liu et al. 2019, section 4.2).

Three things differ from the released code, each so that the paper's figures hold. A sequence is drawn short on its own,
not together with all others of its document, so that one in ten sequences is short. A chunk holds at least two
sentences wherever the document has them, since one alone can only be followed by a random segment: the length of the
first segment would give the label away. And where one sentence is left over at the end of a document, it is either the
true next of those before it or stands before a random segment, on the same coin. Only a document of a single sentence
has no choice; such sequences are counted apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest

IS_NEXT, IS_RANDOM = 0, 1  # next_sentence_label, as transformers numbers it
SHORT_SHARE = 0.1
PAIR_SPECIAL, SINGLE_SPECIAL = 3, 2  # [CLS] A [SEP] B [SEP] and [CLS] A [SEP]

Sentence = list[int]


@dataclass(slots=True)
class Pair:
    """Two segments of token ids, without special tokens."""

    first: list[int]
    second: list[int]
    label: int  # IS_NEXT or IS_RANDOM
    short: bool = False  # drawn short
    forced: bool = False  # random, because nothing follows


@dataclass
class Counts:
    """What went into a set of sequences, and what came out."""

    documents: int = 0
    sentences: int = 0
    tokens: int = 0  # of the text, without special tokens
    sequences: int = 0
    next: int = 0
    random: int = 0
    forced_random: int = 0  # among random: documents of one sentence
    short: int = 0
    unpaired_documents: int = 0  # the only one of their shard that has any token, so without another one beside it
    lengths: list[int] = field(default_factory=list)  # how many sequences have each length, special tokens included
    vocabulary: list[int] = field(default_factory=list)  # how often each token id is in them, special tokens left out

    def add(self, other: Counts) -> None:
        """Add the counts of another set."""
        for item in fields(self):
            own, more = getattr(self, item.name), getattr(other, item.name)
            both = [a + b for a, b in zip_longest(own, more, fillvalue=0)] if isinstance(own, list) else own + more
            setattr(self, item.name, both)


class Draw:
    """Random numbers that are the same for a seed on every version of Python, which ``random.random()`` alone is."""

    def __init__(self, *seed: int) -> None:
        self._random = random.Random("/".join(map(str, seed)))

    def coin(self, share: float = 0.5) -> bool:
        """True with probability ``share``."""
        return self._random.random() < share

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._random.random() * (high - low + 1))


def cut_sentences(sentences: Sequence[Sentence], limit: int) -> list[Sentence]:
    """The sentences with those longer than ``limit`` tokens cut into pieces that fit, and empty ones left out."""
    return [part[i : i + limit] for part in sentences for i in range(0, len(part), limit)]


def pairs(documents: Sequence[Sequence[Sentence]], max_length: int, draw: Draw) -> Iterator[Pair]:
    """Pairs of segments that fill ``max_length`` tokens with [CLS] and twice [SEP].

    The second segment is the true next one half of the time and otherwise comes from another document; sentences of the
    first one's document that it displaces are used in the next pair. One pair in ten aims at a random length from 2
    tokens up. What does not fit is cut from the front or the back, at random, of the longer segment. Needs two
    documents, each with a sentence and no empty one.
    """
    if len(documents) < 2:
        raise ValueError(f"documents must be at least 2, for random segments from another one; got {len(documents)}")
    limit = max_length - PAIR_SPECIAL
    for number, document in enumerate(documents):
        start = 0
        while start < len(document):
            short = draw.coin(SHORT_SHARE)
            target = draw.between(2, limit) if short else limit
            end, length = start, 0
            while end < len(document) and (length < target or end - start < 2):
                length += len(document[end])
                end += 1
            forced = False
            if end - start >= 2:
                middle = start + draw.between(1, end - start - 1)
                random_next = draw.coin()
            elif start > 0:  # the last sentence alone
                random_next = draw.coin()
                middle = end if random_next else start
                while start == middle or (not random_next and start > 0 and length < target):
                    start -= 1
                    length += len(document[start])
            else:
                middle, random_next, forced = end, True, True
            first = _join(document[start:middle])
            if random_next:
                second = _random_segment(documents, number, target - len(first), draw)
                end = middle  # what follows is put back
            else:
                second = _join(document[middle:end])
            first, second = truncated(first, second, limit, draw)
            yield Pair(first, second, IS_RANDOM if random_next else IS_NEXT, short, forced)
            start = end


def _join(sentences: Sequence[Sentence]) -> list[int]:
    return [token for sentence in sentences for token in sentence]


def _random_segment(documents: Sequence[Sequence[Sentence]], number: int, wanted: int, draw: Draw) -> list[int]:
    """At least one sentence, and ``wanted`` tokens where there are so many, of a document other than ``number``."""
    other = draw.between(0, len(documents) - 2)
    document = documents[other + (other >= number)]
    found: list[int] = []
    for sentence in document[draw.between(0, len(document) - 1) :]:
        found += sentence
        if len(found) >= wanted:
            break
    return found


def truncated(first: list[int], second: list[int], limit: int, draw: Draw) -> tuple[list[int], list[int]]:
    """Both segments, cut token by token until they have ``limit`` together: the longer one, front or back at random."""
    bounds = [[0, len(first)], [0, len(second)]]
    lengths = [len(first), len(second)]
    while lengths[0] + lengths[1] > limit:
        longer = 0 if lengths[0] > lengths[1] else 1
        lengths[longer] -= 1
        if draw.coin():
            bounds[longer][0] += 1
        else:
            bounds[longer][1] -= 1
    return first[slice(*bounds[0])], second[slice(*bounds[1])]


def full_sentences(documents: Sequence[Sequence[Sentence]], max_length: int, separator: int) -> Iterator[list[int]]:
    """Whole sentences one after the other up to ``max_length`` tokens with [CLS] and [SEP].

    A sequence may cross the end of a document, where ``separator`` is put in. No sentence may be longer than what fits.
    """
    limit = max_length - SINGLE_SPECIAL
    current: list[int] = []
    for number, document in enumerate(documents):
        if number and current:
            current.append(separator)
        for sentence in document:
            if len(current) + len(sentence) > limit:
                yield current[:-1] if current[-1] == separator else current
                current = []
            current += sentence
    if current:
        yield current
