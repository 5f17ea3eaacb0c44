"""The study files of the papers' tables: whole before the first run, with an arm for each published row."""

import csv
import json
import re

import pandas as pd
import pytest

from kdlib import cluster, configuration
from kdlib.study import Study
from tests.book.studies import ROOT
from tools import ledger

FILES = sorted((ROOT / "experiments" / "tables").glob("*.yml"))
ENTRIES = {entry.study: entry for entry in ledger.read(ROOT) if entry.study}
"""The tables by their study: the ledger says which rows have no arm, and why."""
OWN = {"lgtm-tab1": {"MetaDistil, feedback from train", "LGTM, feedback from train"}}
"""Arms that no published row has."""
FEWER = {(table, "SKD"): "its gradient vanishes for two classes" for table in ("lgtm-tab1", "lgtm-tab4")}
"""Rows of which not all tasks are computed, and why."""
NETWORKS = {
    "BERT-Base": "bert-base-uncased",
    "BERT-6L": "google/bert_uncased_L-6_H-768_A-12",
    "BERT-4L": "google/bert_uncased_L-4_H-768_A-12",
    "BERT_24": "bert-large-uncased",
    "BERT_12": "bert-base-uncased",
    "SciBERT_12": "allenai/scibert_scivocab_uncased",
    "BERT_4": 4,
    "BERT_6": 6,
    "SciBERT_6": 6,
}
OTHER_STUDENTS = {"DistilBERT", "TinyBERT", "MiniLMv2", "Theseus"}
"""Rows of MetaDistil's table whose student starts elsewhere."""


def table_of(study: Study) -> str:
    """The id of the published table."""
    table = ENTRIES[study.path.relative_to(ROOT).as_posix()].id
    assert table == study.name.replace("_table", "-tab")
    return table


def published(table: str) -> list[dict[str, str]]:
    """The rows of a published table that are scores of a method."""
    with (ROOT / "data" / "published" / f"{table.split('-')[0]}.csv").open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["table"] == table and row["method"] != "all"]


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def study(request, tmp_path_factory) -> Study:
    """A table's study, with a table of choices in which all that is tried is equally good."""
    found = Study(request.param)
    if found.trials:
        tried = [{name: unit.config.flat[name] for name in found.sheet.choose.by} for unit in found.trials]
        found.choices = tmp_path_factory.mktemp(found.name) / "choices.csv"
        pd.DataFrame(tried).drop_duplicates().assign(mean=0.5, worst=0.5).to_csv(found.choices, index=False)
    return found


def test_a_table_can_be_planned_offline(study):
    """As `--dry-run` does: all is configured, named and counted, and the head of the file has the numbers."""
    head = study.path.read_text().partition("question:")[0]
    assert f"python -m kdlib study experiments/tables/{study.path.name}" in head
    for choosing, units, noun in ((True, study.trials, "trials"), (False, study.units, "runs")):
        assert len({unit.config.asked_id for unit in units}) == len({unit.name for unit in units}) == len(units)
        if units:
            assert f"{len(units)} runs to do" in cluster.plan(study, choosing)
            assert re.search(rf"\b{len(units)} {noun}\b", head), f"not {len(units)} {noun}"
    assert "Not stated" in head or "lgtm_table1.yml, which says" in head
    seeds = {unit.seed for unit in study.units if unit.arm != "teacher"}
    assert seeds == {0, 1, 2} and not seeds & {unit.seed for unit in study.trials}


def test_every_published_row_has_an_arm(study):
    table = table_of(study)
    rows = {row["method"] for row in published(table)}
    missing = next(entry.no_arm.keys() for entry in ENTRIES.values() if entry.id == table)
    assert rows, table
    assert {unit.arm for unit in study.units} - OWN.get(table, set()) == rows - missing


def test_every_arm_has_the_tasks_of_its_row(study):
    table = table_of(study)
    wanted: dict[str, set[str]] = {}
    for row in published(table):
        if row["task"] != "average":
            wanted.setdefault(row["method"], set()).add(row["task"].removesuffix("_mismatched"))
    found = {arm: {unit.config.task for unit in study.units if unit.arm == arm} for arm in study.sheet.arms}
    everything = set().union(*wanted.values())
    for arm, tasks in found.items():
        assert tasks <= everything, arm
        assert ((table, arm) in FEWER) == (not wanted.get(arm, everything) <= tasks), arm
        assert tasks == everything or (table, arm) in FEWER, arm


def test_what_a_row_prints_is_what_its_runs_measure(study):
    metrics = {(row["task"].removesuffix("_mismatched"), row["metric"]) for row in published(table_of(study))}
    measured = {(unit.config.task, name) for unit in study.units for name in unit.config.glue_task.metrics}
    assert {(task, metric) for task, metric in metrics if task != "average"} <= measured


def test_teacher_and_student_are_those_of_the_row(study):
    pairs = {(row["teacher"], row["student"]) for row in published(table_of(study))}
    (teacher, student) = (NETWORKS[name] for name in pairs.pop())
    assert not pairs
    for config in {unit.arm: unit.config for unit in study.units if unit.arm != "teacher"}.values():
        assert config.method == "fine_tune" or config.teacher == teacher
    alone = {unit.config.student for unit in study.units if unit.arm == "teacher"}
    assert alone == {teacher}
    for unit in study.units:
        if unit.arm not in {"teacher", *OTHER_STUDENTS}:
            assert student in (unit.config.student, unit.config.student_layers), unit.arm


@pytest.mark.parametrize("name", ["lgtm_table1", "lgtm_table2", "lgtm_table4"])
def test_lgtm_has_the_settings_that_its_table_5_prints(name):
    study = Study(ROOT / "experiments" / "tables" / f"{name}.yml")
    with (ROOT / "data" / "published" / "lgtm.csv").open(newline="") as lines:
        rows = [(row["metric"], float(row["value"])) for row in csv.DictReader(lines) if row["table"] == "lgtm-tab5"]
    printed = {metric: value for metric, value in rows if metric != "student_learning_rate"}
    assert {name: study.sheet.common[name] for name in printed} == printed
    tried = {unit.config.learning_rate for unit in study.trials}
    assert tried == {value for metric, value in rows if metric == "student_learning_rate"}


def test_lgtm_and_metadistil_take_their_feedback_from_where_the_paper_says():
    study = Study(ROOT / "experiments" / "tables" / "lgtm_table1.yml")
    for unit in study.trials:
        if unit.config.method in ("metadistil", "lgtm"):
            own = unit.arm == "feedback from train"
            assert unit.config.settings.feedback == ("feedback" if own else "validation")
            assert unit.config.feedback_fraction == (0.1 if own else 0.0)


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        ("lgtm_table1", [(None, 10), ("bert-base-uncased", None)]),
        ("metadistil_table1", [(None, 10), ("bert-base-uncased", None)]),
        ("ikd_table1", [("bert-base-uncased", None), ("bert-large-uncased", None)]),
    ],
)
def test_the_assistant_of_takd_stands_between_teacher_and_student(name, chain):
    study = Study(ROOT / "experiments" / "tables" / f"{name}.yml")
    config = next(unit.config for unit in study.trials or study.units if unit.config.method == "takd")
    for student, layers in chain:
        config = configuration.teachers_config(config)
        assert (config.student, config.student_layers) == (student, layers)
    assert config.method == "fine_tune" and configuration.teachers_config(config) is None


def test_settings_are_chosen_by_the_metric_of_each_task(tmp_path, monkeypatch):
    """GLUE's tasks have no metric in common."""
    monkeypatch.chdir(tmp_path)
    arms = """
common: {task: mini-mrpc, student: tiny-1x32, max_train: 64, max_evaluation: 40, epochs: 1, device: cpu,
         learning_rate: chosen, output_dir: RUNS}
arms: {alone: {method: fine_tune, task: [mini-mrpc, mini-stsb]}}
seeds: 0
choose:
  arms: {alone: {like: alone, learning_rate: [1.0e-3, 2.0e-3]}}
  seeds: 100
  by: [task, learning_rate]
"""
    (tmp_path / "small.yml").write_text(arms.replace("RUNS", str(tmp_path / "runs")))
    study = Study("small.yml")
    expected = set()
    for unit in study.trials:
        told = json.loads(cluster.computed(cluster.Job(unit, tmp_path / "work")))
        first = {"mini-mrpc": "f1", "mini-stsb": "pearson"}[unit.config.task]
        expected.add((unit.config.task, unit.config.learning_rate, round(told["metrics"][f"validation/{first}"], 5)))
        study.record(unit, trying=True).parent.mkdir(parents=True, exist_ok=True)
        study.record(unit, trying=True).write_text(json.dumps(told))
    table = cluster.tried(study)
    assert set(table[["task", "learning_rate", "mean"]].itertuples(index=False, name=None)) == expected
    study.choices.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(study.choices, index=False)
    for unit in study.units:
        rows = table[table["task"] == unit.config.task]
        assert unit.config.learning_rate == rows.loc[rows["worst"].idxmax(), "learning_rate"]
