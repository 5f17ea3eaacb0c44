"""The stored costs of a step: the ways that the book speaks of are there, and the ratios are those of the columns."""

import pandas as pd
import pytest

from benchmarks import step

CASE = ["layers", "hidden", "batch", "tokens", "precision"]
REFERENCES = {"first": step.FLOOR, "at once": step.AT_ONCE, "double": step.DOUBLE}


@pytest.fixture(scope="module")
def table(root) -> pd.DataFrame:
    return pd.read_csv(root / "data" / "benchmarks" / "step.csv")


def test_every_size_has_the_floors_and_each_way_of_metadistil(table):
    wanted = {*REFERENCES.values(), "MetaDistil, jvp", "MetaDistil, central difference"}
    assert {64, 128} <= set(table["tokens"])
    for _, ways in table.groupby(CASE)["way"]:
        assert wanted <= set(ways) and ways.is_unique


def test_the_costs_stay_within_what_the_book_promises(table):
    """Pieces keep MetaDistil's memory at the floor's; no teacher that learns costs twice the time of the floor."""
    learning = table["way"].str.match("MetaDistil|LGTM|IKD") & ~table["way"].isin([step.DOUBLE, step.RELEASED])
    assert (table.loc[learning, "seconds / first"] <= 1.8).all()
    cut = table[table["way"].str.startswith("MetaDistil") & table["way"].str.endswith("in two pieces")]
    assert len(cut) == 2 * table["tokens"].nunique()
    assert (cut["saved / first"] <= 1.05).all() and (cut["saved / double"] <= 0.65).all()
    assert (cut["seconds / double"] <= 1).all()


@pytest.mark.parametrize("short", REFERENCES)
@pytest.mark.parametrize("column, stored, digits", [("seconds", "seconds", 4), ("saved", "saved MiB", 1)])
def test_the_ratios_are_those_of_the_columns(table, column, stored, digits, short):
    """As far as rounding lets them be: a ratio of rounded numbers may differ in its last digit."""
    for _, size in table.groupby(CASE):
        floor = size.loc[size["way"] == REFERENCES[short], stored].item()
        slack = 0.006 + size[stored] / floor * 10**-digits / floor
        assert ((size[f"{column} / {short}"] - size[stored] / floor).abs() < slack).all()
