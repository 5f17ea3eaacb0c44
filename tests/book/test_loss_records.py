"""The records of validation losses: complete, of the chapter's own runs, and of the loss that they are named for."""

import json
import math

import numpy as np
import pytest
from scipy.special import log_softmax

from kdlib import book, engine, glue, models, records, runs
from tools import experiments, loss_records

JOBS = list(loss_records.jobs())
SMALL = {"max_train": 60, "max_evaluation": 50, "teacher_epochs": 1, "epochs": 2, "feedback_fraction": 0.2}


def record_of(job: loss_records.Job) -> dict:
    return json.loads(job.path.read_text())


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.path.stem)
def test_a_record_holds_a_number_for_every_epoch(job):
    record = record_of(job)
    assert {name: record[name] for name in job._fields} == job._asdict() and record["environment"]["threads"] == "1"
    history = record["history"]
    assert history["epoch"] == list(range(1, experiments.META_SETTINGS["epochs"] + 1))
    assert all(len(values) == len(history["epoch"]) and all(map(math.isfinite, values)) for values in history.values())
    expected = {"epoch", "train_loss", "validation/loss", "validation/accuracy"}
    if loss_records.WAYS[job.way][0] != "kd":
        expected |= {"teacher/validation/loss", "teacher/validation/accuracy"}
    assert history.keys() - {"train_feedback_loss"} == expected


def test_there_is_no_other_record_and_none_is_taken_for_a_run():
    assert sorted(loss_records.FOLDER.iterdir()) == sorted(job.path for job in JOBS)
    assert not any(map(records.is_record, loss_records.FOLDER.iterdir())), "the README would take them for runs"


def test_the_records_are_small_and_name_no_machine():
    texts = [path.read_text() for path in loss_records.FOLDER.iterdir()]
    assert sum(map(len, texts)) < 120_000
    assert not any(str(experiments.ROOT) in text for text in texts)


def identity(config: runs.RunConfig) -> str:
    """What makes a run what it is; that some runs were observed on the way changes nothing."""
    return runs.configure(**{**config.flat, "observe": None}).run_id


def test_they_are_the_runs_of_chapters_5_and_7():
    """Same settings by another command; the same accuracies at every epoch where the machine is the same."""
    chapters = ("05_pilot_updates", "07_good_teachers")
    records = [record for chapter in chapters for record in book.read_records(chapter)]
    known = {identity(runs.configure(**record.config)): record for record in records}
    for job in JOBS:
        recorded, ours = known[identity(loss_records.config_of(job))], record_of(job)
        if recorded.environment == ours["environment"]:
            accuracies = [row["validation/accuracy"] for row in recorded.history]
            assert ours["history"]["validation/accuracy"] == pytest.approx(accuracies, rel=1e-5), job


@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", ["fixed teacher", "LGTM, weighted"])
def test_the_last_loss_is_that_of_the_network_that_is_left(way, tmp_path):
    """Mean cross entropy of the labels, by SciPy from the stored network's own predictions."""
    job = loss_records.Job(way, 0)
    record = loss_records.compute(job, tmp_path, **SMALL)
    config = loss_records.config_of(job, output_dir=str(tmp_path), **SMALL)
    data, tokenizer = runs.load_data(config), models.load_tokenizer(config.student)
    encoded = glue.encode(data.evaluation["validation"], data.task, tokenizer)
    best = runs.read_record(config.folder).best_step
    for who, folder in (("", "student"), ("teacher/", engine.TEACHER_FOLDER)):
        column = f"{who}validation/loss"
        if column not in record["history"]:
            continue
        network = models.load(str(config.folder / folder), data.task, tokenizer)
        log_p = log_softmax(models.predict(network, encoded), axis=1)
        expected = -log_p[np.arange(len(encoded)), encoded.labels.numpy()].mean()
        steps = [row["step"] for row in runs.read_record(config.folder).history]
        place = steps.index(best) if who == "" else -1  # the student of the best evaluation is kept
        assert record["history"][column][place] == pytest.approx(expected, rel=1e-4)
