"""The committed run records: complete, of runs that can be made again, and one of them made again."""

import hashlib
import json
import subprocess

import pytest
import torch

from kdlib import book, runs
from tools import experiments

CHAPTERS = ["teachers", *experiments.EXPERIMENTS]  # chapters with records of another form have tests of their own


def records(chapter: str) -> list[runs.RunRecord]:
    return book.read_records(chapter)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_records_are_those_of_the_experiments(chapter):
    made = experiments.teachers if chapter == "teachers" else experiments.EXPERIMENTS[chapter]
    expected = {config.run_id for config in made()}
    assert {record.run_id for record in records(chapter)} == expected
    for record in records(chapter):
        assert runs.configure(**record.config).run_id == record.run_id


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_record_names_no_machine(chapter):
    for path in (experiments.RECORDS / chapter).glob("*.json"):
        assert json.loads(path.read_text())["config"]["output_dir"] == "_runs"
        assert str(experiments.ROOT) not in path.read_text()


@pytest.mark.parametrize("task", experiments.TEACHER_TASKS)
def test_a_stored_teacher_scores_what_its_record_says(task):
    """Halving the precision of its weights may turn a borderline example, no more."""
    from kdlib import glue, metrics, models

    (record,) = [r for r in records("teachers") if r.config["task"] == task]
    data = glue.load("miniglue", task)
    tokenizer = models.load_tokenizer(models.BOOK_TEACHER)
    teacher = models.load(models.BOOK_TEACHER, data.task, tokenizer)
    assert next(teacher.parameters()).dtype == torch.float32
    encoded = glue.encode(data.test["test"], data.task, tokenizer)
    accuracy = metrics.compute(["accuracy"], models.predict(teacher, encoded), encoded.labels.numpy())["accuracy"]
    assert accuracy == pytest.approx(record.metrics["test/accuracy"], abs=0.003)


def chosen_record(root) -> runs.RunRecord:
    """One record, another one for each commit."""
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    candidates = [record for chapter in CHAPTERS if chapter != "teachers" for record in records(chapter)]
    return candidates[int(hashlib.sha256(commit.encode()).hexdigest(), 16) % len(candidates)]


@pytest.mark.timeout(300)
def test_one_record_can_be_made_again(root, tmp_path):
    """Bit for bit in the environment of the record; elsewhere rounding differs, and training wanders off."""
    recorded = chosen_record(root)
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
