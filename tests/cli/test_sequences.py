# ruff: noqa: RUF001 - the marks of other scripts are meant
"""Sentences, and the sequences made of them: the figures of the paper, and no text lost."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.training.sentences import split_sentences
from fastbert.training.sequences import (
    IS_NEXT,
    IS_RANDOM,
    Draw,
    Pair,
    cut_sentences,
    full_sentences,
    pairs,
    truncated,
)

PLACE = 10_000  # token ids are document * PLACE + place, so that a token says where it comes from


@pytest.mark.parametrize(
    ("paragraph", "wanted"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. Smith met J. K. Rowling. He waved.", ["Dr. Smith met J. K. Rowling.", "He waved."]),
        ("It is 3.5 m long, i.e. too long. 12 are not.", ["It is 3.5 m long, i.e. too long.", "12 are not."]),
        ('He said "no." Then he left.', ['He said "no."', "Then he left."]),
        ("See No. 5 and Fig. 3. All is there.", ["See No. 5 and Fig. 3.", "All is there."]),
        ('"Really?" she asked. (He nodded.) Then...', ['"Really?" she asked.', "(He nodded.)", "Then..."]),
        ("Wait... and see. So did I. He won.", ["Wait... and see.", "So did I.", "He won."]),
        ("No mark at the end", ["No mark at the end"]),
        ("A superapprox. It ends here.", ["A superapprox.", "It ends here."]),
        ("a.b.c example.com costs 1.5", ["a.b.c example.com costs 1.5"]),
        ("这是第一句。这是第二句！好吗？", ["这是第一句。", "这是第二句！", "好吗？"]),
        ("¿Qué? ¡Sí! Élan vital.", ["¿Qué?", "¡Sí!", "Élan vital."]),
        ("   ", []),
        ("", []),
    ],
)
def test_sentences(paragraph: str, wanted: list[str]) -> None:
    assert split_sentences(paragraph) == wanted


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="aB.!?\"' )(1。\n…"))
def test_sentences_lose_nothing(paragraph: str) -> None:
    found = split_sentences(paragraph)
    assert all(found)
    assert "".join("".join(found).split()) == "".join(paragraph.split())


@pytest.mark.parametrize("part", [".", ".)", "a", "Mr. ", "J. K. Rowling and "])
def test_long_paragraphs(part: str) -> None:
    """In time that grows with their length, not with its square: that took 10 s and more for each of these."""
    paragraph = part * (50_000 // len(part)) + '". A'
    began = time.process_time()
    split_sentences(paragraph)
    assert time.process_time() - began < 2


def documents(count: int, seed: int = 0, most: int = 12, longest: int = 25) -> list[list[list[int]]]:
    """Documents of at least two sentences, whose tokens say where they are from."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        lengths = [rng.randint(1, longest) for _ in range(rng.randint(2, most))]
        places = [number * PLACE + place for place in range(sum(lengths))]
        found.append([[places.pop(0) for _ in range(length)] for length in lengths])
    return found


def four_sigma(share: float, count: int) -> float:
    """How far a share of ``count`` independent draws is from its mean at most, but for one time in 16,000."""
    return 4 * (share * (1 - share) / count) ** 0.5


def test_figures_of_the_paper() -> None:
    made = list(pairs(documents(2000), 64, Draw(3)))
    count = len(made)
    assert count > 4000
    assert abs(sum(pair.label == IS_NEXT for pair in made) / count - 0.5) < four_sigma(0.5, count)
    assert abs(sum(pair.short for pair in made) / count - 0.1) < four_sigma(0.1, count)
    assert not any(pair.forced for pair in made)
    # The label does not show in the length of the first segment more than in that of the whole.
    for short in (False, True):
        some = [pair for pair in made if pair.short == short]
        assert abs(sum(pair.label == IS_NEXT for pair in some) / len(some) - 0.5) < four_sigma(0.5, len(some))


def test_segments_are_where_they_say() -> None:
    docs = documents(300, seed=1)
    for max_length in (16, 64, 512):
        for pair in pairs(docs, max_length, Draw(5, max_length)):
            assert pair.first
            assert pair.second
            assert len(pair.first) + len(pair.second) + 3 <= max_length
            for segment in (pair.first, pair.second):
                assert segment == list(range(segment[0], segment[0] + len(segment))), "a segment is running text"
            same = pair.first[0] // PLACE == pair.second[0] // PLACE
            assert same == (pair.label == IS_NEXT)
            if same:
                assert pair.second[0] > pair.first[-1]


def test_displaced_sentences_come_back() -> None:
    """With room for whole documents nothing is cut off, and every token is in a first segment or a true next."""
    docs = documents(60, seed=2)
    found = {token for pair in pairs(docs, 4096, Draw(1)) for token in _own(pair)}
    assert found == {token for document in docs for sentence in document for token in sentence}


def _own(pair: Pair) -> list[int]:
    return pair.first + (pair.second if pair.label == IS_NEXT else [])


def test_a_document_of_one_sentence_is_before_a_random_one() -> None:
    made = list(pairs([[[1, 2, 3]], [[PLACE, PLACE + 1]], [[2 * PLACE]]], 32, Draw(0)))
    assert [(pair.label, pair.forced) for pair in made] == [(IS_RANDOM, True)] * 3
    with pytest.raises(ValueError, match="documents must be at least 2"):
        list(pairs([[[1]]], 32, Draw(0)))


def test_another_seed_draws_others() -> None:
    docs = documents(20)
    assert list(pairs(docs, 64, Draw(1, 2))) == list(pairs(docs, 64, Draw(1, 2)))
    assert list(pairs(docs, 64, Draw(1, 2))) != list(pairs(docs, 64, Draw(1, 3)))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 80), st.integers())
def test_truncation(first: int, second: int, limit: int, seed: int) -> None:
    one, two = truncated(list(range(first)), list(range(100, 100 + second)), limit, Draw(seed))
    assert len(one) + len(two) == min(limit, first + second)
    assert min(len(one), len(two)) >= min(first, second, limit // 2)
    for kept in (one, two):
        assert kept == list(range(kept[0], kept[0] + len(kept)))


def test_truncation_takes_from_both_ends() -> None:
    starts = [truncated(list(range(100)), [0], 51, Draw(seed))[0][0] for seed in range(400)]
    mean = sum(starts) / len(starts)
    assert abs(mean - 25) < 4 * (50 * 0.25 / len(starts)) ** 0.5


def test_full_sentences() -> None:
    docs = [[[token + 1 for token in sentence] for sentence in document] for document in documents(80, seed=4)]
    separator = 0
    made = list(full_sentences(docs, 64, separator))
    kept = [token for sequence in made for token in sequence if token != separator]
    assert kept == [token for document in docs for sentence in document for token in sentence]
    assert max(map(len, made)) <= 62
    for sequence, following in pairwise(made):
        assert sequence[-1] != separator
        whole = next(sentence for document in docs for sentence in document if sentence[0] == following[0])
        assert len(sequence) + len(whole) > 62 or len(sequence) + 1 + len(whole) > 62
        for left, right in pairwise(sequence):
            if left and right:
                assert left // PLACE == right // PLACE, "a separator stands between documents"


def test_long_sentences_are_cut() -> None:
    assert cut_sentences([[1, 2, 3, 4, 5], [], [6]], 2) == [[1, 2], [3, 4], [5], [6]]
