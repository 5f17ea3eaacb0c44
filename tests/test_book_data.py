"""The book's own data, where they are."""

from kdlib import book


def test_published_tables():
    whole = book.published()
    assert set(whole["paper"]) == {"LGTM", "MetaDistil", "IKD", "Tutor-KD"}
    rte = book.published("rte")
    assert set(rte["task"]) == {"rte"} and 0 < len(rte) < len(whole)


def test_published_tables_are_empty_without_the_repository(tmp_path):
    assert book.published(folder=tmp_path).empty
