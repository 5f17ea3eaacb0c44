"""The stored costs of a step: the ways that the book speaks of are there, and the ratios are those of the columns."""

import argparse

import pandas as pd
import pytest

from benchmarks import processes, step, tutor
from kdlib.methods import METHODS, ON_TEXT

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


@pytest.fixture(scope="module")
def tutoring(root) -> pd.DataFrame:
    return pd.read_csv(root / "data" / "benchmarks" / "tutor.csv")


def test_tutor_kd_stands_beside_soft_labels_for_each_of_its_small_students(tutoring):
    assert {"tutor-5.7m", "tutor-9m"} <= set(tutoring["student"])
    for _, ways in tutoring.groupby(["student", "batch", "tokens", "precision"])["way"]:
        assert {tutor.SOFT, tutor.TUTORED} <= set(ways) and ways.is_unique


def test_its_ratios_and_tokens_are_those_of_the_columns(tutoring):
    for _, size in tutoring.groupby(["student", "batch", "tokens", "precision"]):
        floor = size.loc[size["way"] == tutor.SOFT, "seconds"].item()
        assert ((size["seconds / soft labels"] - size["seconds"] / floor).abs() < 0.006).all()
        real = size["tokens / second"] * size["seconds"]
        assert real.max() <= (size["batch"] * size["tokens"]).max() and real.max() / real.min() < 1.01


def test_every_way_of_tutor_kd_makes_a_step():
    """With few words, so that it is quick."""
    calls = tutor.ways("tutor-5.7m", tutor.teacher_network("cpu", words=1300), "cpu", "fp32")
    batch = tutor.batch_of(2, 8, "cpu", words=1300)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all() and batch["masked"].any()
    for step_of in calls.values():
        assert step_of(batch)["loss"] > 0


@pytest.mark.parametrize("method", [*METHODS, *ON_TEXT])
def test_every_method_makes_a_step_in_the_benchmark_of_processes(method):
    size = argparse.Namespace(layers=(2, 1), hidden=32, batch=3, tokens=8)
    assert processes.call_of(method, size)()["loss"] > 0
