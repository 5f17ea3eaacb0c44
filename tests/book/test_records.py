"""The committed run records: those of the studies and no other, small, naming no machine; and one made again."""

import hashlib
import json
import subprocess

import pytest
import torch

from kdlib import book, configuration, glue, metrics, models, runs
from tests.book.studies import RECORDS, ROOT, STUDIES

QUICK = 15.0
"""Seconds that the record which is made again may have taken, its teacher's not counted."""


@pytest.mark.parametrize("name", STUDIES)
def test_the_records_are_those_of_the_study(name):
    study = STUDIES[name]
    assert study.records == RECORDS / name
    assert {path.stem for path in study.records.glob("*.json")} == {unit.name for unit in study.units}


def test_every_record_is_of_a_study():
    assert {path.name for path in RECORDS.iterdir()} == {*STUDIES}


@pytest.mark.parametrize("name", STUDIES)
def test_a_record_names_no_machine_and_is_small(name):
    paths = [*STUDIES[name].records.glob("*.json")]
    for path in paths:
        record = json.loads(path.read_text())
        assert str(ROOT) not in path.read_text() and "/tmp" not in path.read_text()
        assert record.get("config", {}).get("output_dir", "_runs") == "_runs"
        assert record["environment"]["threads"] == "1"
        assert record.get("config", {}).get("source", "miniglue") in ("miniglue", "nyu-mll/glue")
    assert sum(path.stat().st_size for path in paths) < 1_000_000


@pytest.mark.parametrize("task", ["mini-sst2", "mini-mnli"])
def test_a_stored_teacher_scores_what_its_record_says(task):
    """Halving the precision of its weights may turn a borderline example, no more."""
    (record,) = [r for r in book.read_records("teachers") if r.config.get("task") == task]
    data = glue.load("miniglue", task)
    tokenizer = models.load_tokenizer(models.BOOK_TEACHER)
    teacher = models.load(models.BOOK_TEACHER, data.task, tokenizer)
    assert next(teacher.parameters()).dtype == torch.float32
    encoded = glue.encode(data.test["test"], data.task, tokenizer)
    accuracy = metrics.compute(["accuracy"], models.predict(teacher, encoded), encoded.labels.numpy())["accuracy"]
    assert accuracy == pytest.approx(record.metrics["test/accuracy"], abs=0.003)


def test_on_glue_every_method_sees_the_same_rows_as_often():
    for task in ("sst2", "mrpc"):
        found = [record for record in book.read_records("12_glue") if record.config["task"] == task]
        assert len({json.dumps(record.samples) for record in found}) == 1
        assert len({record.history[-1]["step"] for record in found}) == 1
        assert all(len(record.history) == 1 for record in found)  # nothing is selected on the validation split


def test_on_glue_the_teachers_are_the_runs_of_the_arms_called_so():
    units = STUDIES["12_glue"].units
    teachers = {unit.name for unit in units if "teacher" in unit.arm}
    needed = [configuration.teachers_config(unit.config) for unit in units if unit.name not in teachers]
    assert {config.asked_id for config in needed if config is not None} == teachers
    assert {record.teacher for record in book.read_records("12_glue")} == {None, *teachers}


def chosen_record() -> runs.RunRecord:
    """One that is made quickly, another one for each commit."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    plain = [name for name, study in STUDIES.items() if all(unit.measure is None for unit in study.units)]
    candidates = [r for name in plain if name != "12_glue" for r in book.read_records(name) if r.seconds < QUICK]
    assert len(candidates) > 50
    return candidates[int(hashlib.sha256(commit.encode()).hexdigest(), 16) % len(candidates)]


@pytest.mark.timeout(300)
def test_one_record_can_be_made_again(tmp_path):
    """Bit for bit in the environment of the record; elsewhere rounding differs, and training wanders off."""
    recorded = chosen_record()
    threads = torch.get_num_threads()
    torch.set_num_threads(int(recorded.environment["threads"]))
    try:
        again = runs.run(runs.configure(**{**recorded.config, "output_dir": str(tmp_path)}))
    finally:
        torch.set_num_threads(threads)
    if again.environment == recorded.environment:
        # What is measured only since then has no column in the record.
        rows = zip(again.history, recorded.history, strict=True)
        assert [{name: row[name] for name in old} for row, old in rows] == recorded.history
        assert again.metrics == recorded.metrics
    else:
        for name, value in recorded.metrics.items():
            assert again.metrics[name] == pytest.approx(value, abs=0.15), name
