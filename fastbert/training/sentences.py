# ruff: noqa: RUF001, RUF002, SIM905 - the marks of other scripts are meant, and word lists read best as text
"""Split a paragraph into sentences by rule.

Written here because the libraries that do it are no longer maintained (pysbd, sentence-splitter), fetch a model at run
time (nltk's punkt) or bring a whole pipeline (spaCy). Next sentence prediction asks for little: pieces of running text
that mostly end where a sentence ends. The rule: a sentence ends behind ``. ! ? …`` and the closing quotes or brackets
that follow, before white space and a capital, a digit or an opening quote or bracket; but not behind an abbreviation or
a single initial. The full stops of Chinese and Japanese (``。！？``) end a sentence without white space.
"""

from __future__ import annotations

import re

# Followed by a name, or by more of the same sentence: a capital behind them begins no sentence.
ABBREVIATIONS = frozenset(
    """
    mr mrs ms dr prof sr jr st mt ft rev hon gen col capt lt sgt cmdr maj gov sen rep pres supt messrs mme mlle
    vs cf e.g i.e viz ca approx est dept univ assn bros inc ltd corp ave blvd
    u.s u.k u.n d.c ph.d m.d b.a m.a b.c a.d z.b d.h bzw
    """.split()
)
# The same, but only before a number: "No. 5" goes on, "He said no. Then he left." does not.
COUNTED = frozenset(
    "no nos vol vols p pp fig figs eq eqs sec ch art nr jan feb mar apr jun jul aug sep sept oct nov dec".split()
)

# Where a sentence may end: the marks, what closes behind them, white space; what begins is looked at in code.
# The look-behind: a run of marks that ends no sentence is not read again from each of its marks.
_MARK = re.compile(r"""(?<![.!?…])([.!?…]+)["'”’»)\]]*\s+|[。！？]+[」』”’）]*\s*""")
_OPENING = "\"'“‘«([¿¡"
_LAST_WORD = re.compile(r"[^\s\"'“‘«(\[]+$")
# Enough to see that a word is longer than any abbreviation, even behind a line break, which `$` passes over.
_LOOK_BACK = max(map(len, ABBREVIATIONS | COUNTED)) + 2


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, in order, without the white space between them; none of them is empty.

    Joined by single spaces they are the paragraph again, up to white space (and up to the spaces that Chinese and
    Japanese text does not have).
    """
    found: list[str] = []
    start = 0
    for match in _MARK.finditer(paragraph):
        end = match.end()
        if end < len(paragraph) and match[1] is not None and not _ends(paragraph, start, match, end):
            continue
        if sentence := paragraph[start:end].strip():
            found.append(sentence)
        start = end
    if rest := paragraph[start:].strip():
        found.append(rest)
    return found


def _ends(paragraph: str, start: int, match: re.Match[str], end: int) -> bool:
    """Whether a sentence ends at a mark that is followed by white space."""
    following = paragraph[end : end + 4].lstrip(_OPENING)[:1] or paragraph[end]
    if following.islower():
        return False
    if match[1] != ".":
        return True
    word = _LAST_WORD.search(paragraph, max(start, match.start() - _LOOK_BACK), match.start())
    if word is None:
        return True
    last = word[0]
    initial = len(last) == 1 and last.isalpha() and last.isupper() and last != "I"
    lower = last.lower()
    return not initial and lower not in ABBREVIATIONS and not (lower in COUNTED and following.isdigit())
