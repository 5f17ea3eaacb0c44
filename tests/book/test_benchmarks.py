"""The stored costs: the ways that the book speaks of are there, and the ratios are those of the columns."""

import argparse
import copy

import pandas as pd
import pytest
import torch

from benchmarks import first_batch, fixed_teacher, precision, processes, rivals, step, tutor
from kdlib import glue
from kdlib.methods import METHODS, ON_TEXT
from kdlib.methods.base import Piloting

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
    size = argparse.Namespace(layers=(4, 2), hidden=32, batch=3, tokens=8)
    assert processes.call_of(method, size)()["loss"] > 0


@pytest.fixture(scope="module")
def fixed(root) -> pd.DataFrame:
    return pd.read_csv(root / "data" / "benchmarks" / "fixed_teacher.csv")


def check_fixed(table: pd.DataFrame) -> None:
    """Everybody makes the same steps; kdlib asks the teacher once and Trainer at every step."""
    for epochs, ways in table.groupby("epochs"):
        assert set(ways["way"]) == {fixed_teacher.KDLIB, fixed_teacher.GROUPED, fixed_teacher.RANDOM}
        assert ways["way"].is_unique and ways["steps"].nunique() == 1
        floor = ways.loc[ways["way"] == fixed_teacher.KDLIB, "seconds"].item()
        slack = 0.006 + (1 + ways["seconds"] / floor) * 1e-3 / floor
        assert ((ways["seconds / kdlib"] - ways["seconds"] / floor).abs() < slack).all()
        asked = ways["way"] != fixed_teacher.KDLIB
        assert (ways.loc[asked, "teacher's tokens"] == ways.loc[asked, "student's tokens"]).all(), epochs
    once = table[table["way"] == fixed_teacher.KDLIB]
    assert once["teacher's tokens"].nunique() == 1 and once["student's tokens"].is_unique


def test_a_fixed_teacher_is_asked_once_by_kdlib_and_at_every_step_by_trainer(fixed):
    assert {1, 3} == set(fixed["epochs"])
    check_fixed(fixed)


def test_kdlib_and_trainer_distil_a_fixed_teacher():
    """With few words and tiny networks, so that it is quick."""
    texts, task = fixed_teacher.joined_sentences(8, 2)
    student, teacher, tokenizer = fixed_teacher.networks(task, "tiny-4x32")
    encoded = glue.encode(texts, task, tokenizer)
    before = copy.deepcopy(student.state_dict())
    check_fixed(fixed_teacher.tidy(fixed_teacher.costs(encoded, (student, teacher), tokenizer, [1, 2], 4, 1)))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.fixture(scope="module")
def precise(root) -> pd.DataFrame:
    return pd.read_csv(root / "data" / "benchmarks" / "precision.csv", keep_default_na=False, na_values=[])


def test_every_method_has_its_error_and_seconds_in_bf16(precise):
    assert set(precise["method"]) == set(METHODS)
    for method, rows in precise.groupby("method"):
        tangents = ["fp32", "autocast"] if issubclass(METHODS[method], Piloting) else [""]
        assert list(rows["precision"]) == ["fp32"] + ["bf16"] * len(tangents)
        assert list(rows["tangent"]) == ["", *tangents]
        floor = rows["seconds"].iloc[0]
        slack = 0.006 + 1e-4 / floor
        assert ((rows["seconds / fp32"] - rows["seconds"] / floor).abs() < slack).all()
        learning = METHODS[method].teaches == "learning"
        errors = rows["teacher gradient error"].iloc[1:]
        assert (errors != "").all() if learning else (errors == "").all()
        assert (rows["student gradient error"].iloc[1:].astype(float) < 0.05).all()


def test_the_error_of_a_step_is_that_of_its_precision_alone():
    """The same step from the same state is the same, dropout or not; one in autocast is another."""
    both, data = precision.pairs("metadistil", (2, 1), 32, precision.accelerators(), "fp32"), rivals.batches(4, 8)
    start = precision.state_of(both["fp32"][0])
    found = []
    for name in ("fp32", "fp32", "bf16"):
        pair, step = both[name]
        precision.put_back(pair, start)
        found.append(precision.moves(step, pair, data))
    assert set(found[0]) == {f"{who} {what}" for who in ("student", "teacher") for what in ("gradient", "update")}
    for what, value in found[0].items():
        assert torch.equal(value, found[1][what]) and 0 < (found[2][what] - value).norm() < 0.2 * value.norm()
    assert all(layer.p == 0.1 for layer in both["fp32"][0][0].module.modules() if isinstance(layer, torch.nn.Dropout))


@pytest.fixture(scope="module")
def each(root) -> pd.DataFrame:
    return pd.read_csv(root / "data" / "benchmarks" / "rivals.csv").set_index("method")


def test_the_costs_of_the_rivals_are_counted_and_their_ratios_are_those_of_the_columns(each):
    assert list(each.index) == list(METHODS)
    floor = each.loc["kd", "seconds"]
    assert ((each["seconds / kd"] - each["seconds"] / floor).abs() < 0.006).all()
    passes = each[[column for column in each if "ward" in column]]
    looked_up = [
        m for m in METHODS if METHODS[m].teaches != "learning" and m not in ("pkd", "theseus", "tinybert_task")
    ]
    assert (passes.loc[looked_up] == [1, 1, 0, 0]).all().all()
    assert (passes.loc[["pkd", "tinybert_task", "pesf"]] == [1, 1, 1, 0]).all().all()
    assert passes.loc["dml"].tolist() == [1, 1, 1, 1] and passes.loc["prokt"].tolist() == [2, 1, 2, 1]
    ship = passes.loc["theseus"]
    assert ship["student, forward"] + ship["teacher, forward"] == pytest.approx(1, abs=0.011)


def test_the_passes_of_a_step_are_counted_layer_by_layer():
    """As stored, for the methods whose number does not depend on chance, with tiny networks."""
    found = rivals.costs((4, 2), 32, 4, 8, 1).set_index("method")
    stored = pd.read_csv(rivals.TABLE).set_index("method")
    counted = [column for column in found if "ward" in column]
    pd.testing.assert_frame_equal(found[counted].drop("theseus"), stored[counted].drop("theseus"))


def test_the_parts_of_the_way_to_the_first_step_add_up(root):
    parts = pd.read_csv(root / "data" / "benchmarks" / "first_batch.csv").set_index("part")
    assert list(parts.index) == [*first_batch.PARTS, first_batch.TOTAL]
    assert parts["seconds"].iloc[:-1].sum() == pytest.approx(parts["seconds"].iloc[-1], abs=0.06)
    assert ((parts["share"] - parts["seconds"] / parts["seconds"].iloc[-1]).abs() < 0.006).all()
