"""The records of static and cross teaching: complete, in agreement with the chapter's other records, rightly wired."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdlib import book, engine, glue, models, records, runs
from tools import experiments, static_records
from tools.static_records import FINE_TUNED, SEEDS, STUDENTS, TASK

TEACHERS = (FINE_TUNED, *STUDENTS)
SMALL = {"max_train": 100, "max_evaluation": 50, "teacher_epochs": 1, "epochs": 1, "feedback_fraction": 0.2}


def record_of(seed: int) -> dict:
    return json.loads(static_records.path_of(seed).read_text())


def accuracies(record: dict) -> dict:
    return {(row["teacher"], row["student"], row["way"]): row["accuracy"] for row in record["accuracies"]}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_record_of_a_seed_is_complete(seed):
    record = record_of(seed)
    dynamic = [(student, student, "dynamic") for student in STUDENTS]
    static = [(teacher, student, "static") for teacher, student in itertools.product(TEACHERS, STUDENTS)]
    assert record["seed"] == seed and record["environment"]["threads"] == "1"
    assert sorted(accuracies(record)) == sorted(dynamic + static)
    pairs = [(row["first"], row["second"]) for row in record["distances"]]
    assert sorted(pairs) == sorted(itertools.permutations(TEACHERS, 2))
    assert all(row["kl"] > 0 for row in record["distances"])


def test_there_is_no_other_record():
    assert sorted(static_records.FOLDER.iterdir()) == sorted(map(static_records.path_of, SEEDS))


def test_the_records_are_small_and_name_no_machine():
    texts = [path.read_text() for path in static_records.FOLDER.iterdir()]
    assert sum(map(len, texts)) < 60_000
    assert not any(str(experiments.ROOT) in text for text in texts)
    assert not any(map(records.is_record, static_records.FOLDER.iterdir())), "the README would take them for runs"


def test_they_agree_with_the_records_of_the_chapter():
    """The same students of the same teachers, by another command; that some were observed there changes nothing."""
    compared = 0
    for record in book.read_records("05_pilot_updates"):
        config = record.config
        wanted = experiments.meta_run(TASK, config["method"], config["seed"], observe=config["observe"])
        if config["method"] not in ("kd", "metadistil") or record.run_id != wanted.run_id:
            continue
        ours = record_of(config["seed"])
        way = (FINE_TUNED, STUDENTS[0], "static") if config["method"] == "kd" else (STUDENTS[0], STUDENTS[0], "dynamic")
        if ours["environment"] == record.environment:
            assert accuracies(ours)[way] == record.metrics["test/accuracy"], record.run_id
            compared += 1
    assert compared == 10, "two methods, five seeds"


@pytest.mark.usefixtures("unchecked")  # stand-ins for records
def test_each_static_student_has_the_teacher_that_the_table_says(monkeypatch, tmp_path):
    """Without training: what would be run, and from whose folder."""
    asked = []

    def pretend(config):
        asked.append(config)
        (tmp_path / config.asked_id / engine.STUDENT).mkdir(parents=True, exist_ok=True)
        (tmp_path / config.asked_id / engine.STUDENT / "config.json").touch()
        return SimpleNamespace(folder=tmp_path / config.asked_id, metrics={"test/accuracy": float(len(asked))})

    monkeypatch.setattr(runs, "run", pretend)
    monkeypatch.setattr(static_records, "distances", lambda places, config: [places])
    table = static_records.taught(7, tmp_path)
    ends = {c.student: tmp_path / c.asked_id / engine.TEACHER_FOLDER for c in asked if c.method == "metadistil"}
    assert ends.keys() == set(STUDENTS)
    for row in table["accuracies"]:
        config = asked[int(row["accuracy"]) - 1]
        assert (config.student, config.seed, config.task) == (row["student"], 7, TASK)
        assert config.method == ("metadistil" if row["way"] == "dynamic" else "kd")
        if row["way"] == "static" and row["teacher"] != FINE_TUNED:
            assert (Path(config.teacher), config.settings.teacher_epochs) == (ends[row["teacher"]], 0)
        else:
            assert config.teacher == experiments.META_SETTINGS["teacher"] and config.settings.teacher_epochs > 0
    (places,) = table["distances"]
    assert {name: Path(places[name]) for name in STUDENTS} == ends


@pytest.mark.timeout(120)
def test_a_small_table_can_be_made(monkeypatch, tmp_path):
    """With training: the distances are those of the stored teachers, by torch's own function."""
    monkeypatch.setattr(experiments, "META_SETTINGS", {**experiments.META_SETTINGS, **SMALL})
    table = static_records.taught(0, tmp_path)
    assert len(table["accuracies"]) == 8
    config = next(c for c in map(read_config, tmp_path.glob("*/record.json")) if c.method == "metadistil")
    data, tokenizer = runs.load_data(config), models.load_tokenizer(config.student)
    encoded = glue.encode(data.test["test"], data.task, tokenizer)
    before, after = (
        torch.from_numpy(models.predict(models.load(str(place), data.task, tokenizer), encoded)).log_softmax(-1)
        for place in (runs.teacher_of(config)[0], config.folder / engine.TEACHER_FOLDER)
    )
    expected = torch.nn.functional.kl_div(after, before, log_target=True, reduction="batchmean").item()
    (found,) = [r["kl"] for r in table["distances"] if (r["first"], r["second"]) == (FINE_TUNED, config.student)]
    assert found == pytest.approx(expected, abs=1e-5) and found > 0


def read_config(path: Path) -> runs.RunConfig:
    return runs.configure(**runs.read_record(path).config)
