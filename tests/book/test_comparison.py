"""The comparison on real GLUE: its records are those of the command, name no folder of a machine, and are made once."""

import dataclasses
import json

import pytest

from kdlib import configuration, runs
from tools import comparison, experiments

RUNS = list(comparison.comparison())
TEACHERS = comparison.teachers_of(RUNS)


def paths():
    return sorted((experiments.RECORDS / comparison.CHAPTER).glob("*.json"))


def test_the_records_are_those_of_the_command():
    expected = {config.asked_id for config in (*RUNS, *TEACHERS)}
    assert {path.stem for path in paths()} == expected
    for path in paths():
        record = runs.read_record(path)
        assert runs.configure(**record.config).asked_id == record.run_id == path.stem
        assert record.teacher in {None, *(t.asked_id for t in TEACHERS)}


def test_every_method_sees_the_same_rows_as_often():
    for task in comparison.SEEDS:
        found = [r for r in map(runs.read_record, paths()) if r.config["task"] == task]
        assert len({json.dumps(r.samples) for r in found}) == 1
        assert len({r.history[-1]["step"] for r in found}) == 1
        assert all(len(r.history) == 1 for r in found)  # nothing is selected on the validation split


def test_a_record_names_no_machine():
    for path in paths():
        config = json.loads(path.read_text())["config"]
        assert (config["source"], config["output_dir"]) == (comparison.HUB, "_runs")


def test_the_teachers_are_shared_and_none_of_the_teaching_settings_matters_to_them():
    assert len({t.seed for t in TEACHERS if t.task == "sst2"}) == len(comparison.SEEDS["sst2"])
    needed = [c for c in RUNS if c.flat["teacher_epochs"]]
    assert needed and {configuration.teachers_config(c).asked_id for c in needed} == {t.asked_id for t in TEACHERS}


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Runs that compute nothing; the configurations they were called with."""
    called, example = [], runs.read_record(paths()[0])

    def run(config):
        called.append(config)
        folder = tmp_path / config.asked_id
        folder.mkdir(exist_ok=True)
        fields = {"run_id": config.asked_id, "config": config.flat, "folder": folder}
        return dataclasses.replace(example, **fields)

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(experiments, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(comparison, "RECORDS", tmp_path / "records")
    return called


def test_a_run_reads_the_local_folder_and_is_kept_under_the_hubs_name(pretend, tmp_path):
    config = next(c for c in RUNS if c.method == "kd")
    assert not comparison.recorded(config)
    comparison.make((config, "/somewhere/glue"))
    assert pretend[0].source == "/somewhere/glue"
    assert comparison.recorded(config)
    (kept,) = (tmp_path / "records" / comparison.CHAPTER).glob("*.json")
    record = runs.read_record(kept)
    assert record.run_id == config.asked_id and "/somewhere" not in kept.read_text()
    assert record.teacher is None or record.teacher == configuration.teachers_config(config).asked_id
    assert not (tmp_path / pretend[0].asked_id).exists()  # a student's weights are not kept


def test_a_teacher_stays_for_the_next_run(pretend, tmp_path):
    comparison.make((TEACHERS[0], "/somewhere/glue"))
    assert (tmp_path / pretend[0].asked_id).exists()
