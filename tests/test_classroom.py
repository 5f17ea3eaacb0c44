"""Unfinished exercises and words that no table bears out are found."""

import numpy as np
import pandas as pd
import pytest

from kdlib.classroom import as_table, expect, untouched, verdicts_on
from kdlib.compare import Plan, decide, family, seeds_to_settle


@pytest.mark.parametrize("answer", [None, NotImplemented])
def test_an_untouched_stub_lets_a_chapter_go_on(answer, monkeypatch, capsys):
    monkeypatch.delenv("KDLIB_STRICT", raising=False)
    assert untouched(answer)
    assert capsys.readouterr().out == "not yet\n"


@pytest.mark.parametrize("answer", [None, NotImplemented])
def test_an_untouched_stub_is_a_wrong_answer_where_it_is_graded(answer, monkeypatch):
    monkeypatch.setenv("KDLIB_STRICT", "1")
    with pytest.raises(AssertionError, match="no answer yet"):
        untouched(answer)


@pytest.mark.parametrize("answer", [0, 0.0, False, "", (), pd.Series([1, 2])])
@pytest.mark.parametrize("strict", ["0", "1"])
def test_any_other_answer_is_one(answer, strict, monkeypatch, capsys):
    monkeypatch.setenv("KDLIB_STRICT", strict)
    assert not untouched(answer)
    assert capsys.readouterr().out == ""


VERDICTS = pd.Series({"a over b": "better", "b over c": "open", "c over d": "open"})


def test_words_that_the_table_bears_out_pass():
    expect(VERDICTS, {"a over b": "better", "c over d": "open"})
    expect(VERDICTS[1:], "open")


@pytest.mark.parametrize("words", [{"a over b": "open"}, {"c over d": "better"}, "open"])
def test_a_word_that_the_table_does_not_bear_out_is_refused(words):
    with pytest.raises(AssertionError, match="the text says"):
        expect(VERDICTS, words)


def test_rows_that_are_missing_or_not_unique_are_refused():
    with pytest.raises(KeyError):
        expect(VERDICTS, {"d over e": "open"})
    with pytest.raises(AssertionError, match="several rows"):
        expect(pd.Series(["open", "open"], index=["a", "a"]), {"a": "open"})
    with pytest.raises(AssertionError, match="without rows"):
        expect(VERDICTS[:0], "open")


def test_a_table_of_verdicts_says_what_the_family_says():
    rng = np.random.default_rng(0)
    base = pd.Series(rng.normal(60, 1, 12))
    pairs = {
        ("a", "test"): (base + rng.normal(3, 0.1, 12), base),
        ("b", "test"): (base + rng.normal(0, 0.1, 12), base),
        ("c", "test"): (base + rng.normal(0, 5, 12), base),
    }
    decisions = {name: decide(Plan(0.5, (12,)), ours, theirs) for name, (ours, theirs) in pairs.items()}
    table = verdicts_on(pairs, 0.5, settle=True)
    assert list(table["verdict"]) == list(family({str(n): d for n, d in decisions.items()})["verdict"])
    assert list(table["verdict"]) == ["better", "equal", "open"] and list(table.index) == [*pairs]
    first = decisions["a", "test"].difference
    assert table["gain (points)"].iloc[0] == f"+{first.mean:.1f} ± {first.std:.1f}"
    assert table["95 % interval"].iloc[0] == f"+{first.low:.1f} to +{first.high:.1f}"
    assert table["seeds to settle"].iloc[2] == format(seeds_to_settle(decisions["c", "test"].difference, 0.5), ",")
    fractions = {name: decide(Plan(0.005, (12,)), a / 100, b / 100) for name, (a, b) in pairs.items()}
    pd.testing.assert_frame_equal(as_table(fractions, unit=0.01), table.drop(columns="seeds to settle"))
    with pytest.raises(ValueError, match="from two on"):
        verdicts_on({"a": (base[:1], base[:1])}, 0.5)
