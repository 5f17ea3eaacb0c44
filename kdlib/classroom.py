"""What the chapters share: what becomes of exercises without an answer, tables of verdicts, words they bear out."""

import os
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from kdlib.compare import BySeed, Decision, Plan, decide, family, seeds_to_settle


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


def verdicts_on(pairs: Mapping[Hashable, tuple[BySeed, BySeed]], margin: float, settle: bool = False) -> pd.DataFrame:
    """How much larger the first of each pair of values by seed is, and what all of them say together; see `as_table`.

    Values and margin are in points.  Raises what `compare.decide` raises.
    """
    return as_table({name: decide(Plan(margin, (len(a),)), a, b) for name, (a, b) in pairs.items()}, settle=settle)


def as_table(decisions: Mapping[Hashable, Decision], unit: float = 1.0, settle: bool = False) -> pd.DataFrame:
    """What decisions say as a family, a row for each: the mean gain ± its deviation, the interval, and the verdict.

    The interval is that of a claim alone, the verdict that of all of them together, see `compare.family`.  One point is
    so many units of the values: 0.01 where these are fractions.  With `settle` there is also how many seeds it would
    take to settle a claim alone, see `compare.seeds_to_settle`.

    Columns, all of them text: gain (points), 95 % interval, seeds to settle if asked for, verdict.
    """
    words = family({str(place): decision for place, decision in enumerate(decisions.values())})["verdict"]
    rows: dict[Hashable, dict[str, str]] = {}
    for (name, decision), word in zip(decisions.items(), words, strict=True):
        found = decision.difference
        mean, deviation, low, high = (value / unit for value in (found.mean, found.std, found.low, found.high))
        rows[name] = {"gain (points)": f"{mean:+.1f} ± {deviation:.1f}", "95 % interval": f"{low:+.1f} to {high:+.1f}"}
        if settle:
            rows[name]["seeds to settle"] = f"{seeds_to_settle(found, decision.plan.margin):,}"
        rows[name]["verdict"] = word
    return pd.DataFrame([*rows.values()], index=[*rows])


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
