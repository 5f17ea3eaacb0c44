"""Unfinished exercises and words that no table bears out are found."""

import pandas as pd
import pytest

from kdlib.classroom import expect, untouched


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
