"""What the chapters share: answers to exercises that are not there yet, and words that tables must bear out."""

import os
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd


def untouched(answer: Any) -> bool:
    """Whether an exercise's stub has not been filled in: it returned None or NotImplemented.  If so, say "not yet".

    A chapter runs from top to bottom with its stubs untouched.  Whoever grades sets KDLIB_STRICT=1; then an untouched
    stub is a wrong answer.

    Raises AssertionError for an untouched stub while KDLIB_STRICT is set to anything but 0.
    """
    if answer is not None and answer is not NotImplemented:
        return False
    assert os.environ.get("KDLIB_STRICT", "0") in ("", "0"), "this exercise has no answer yet: replace the stub"
    print("not yet")
    return True


def expect(verdicts: pd.Series, words: str | Mapping[Hashable, str]) -> None:
    """Assert that a table says what the prose beside it says: one word for all rows, or a word for each row named.

    `verdicts` is the table's column of words, with the claims as its index.  A row that is not named may say anything.

    Raises AssertionError that names the row, the text's word and the table's; KeyError for a row that is not there.
    """
    told = dict.fromkeys(verdicts.index, words) if isinstance(words, str) else words
    assert told, "a table without rows bears out nothing"
    for row, word in told.items():
        found = verdicts.loc[row]
        assert isinstance(found, str), f"the table has several rows {row!r}: give each a name of its own"
        assert found == word, f"the text says {word!r} of {row!r}, the table {found!r}: rewrite the sentence"
