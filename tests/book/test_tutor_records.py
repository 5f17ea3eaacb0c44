"""The records of chapter 9: complete, of the configurations that the command has, and one way made again in small."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from kdlib import checkpoints, corpus, machine, models, pretraining, records, trainer
from kdlib.learner import accelerator_for
from kdlib.methods.on_text import TextCast
from kdlib.methods.task_agnostic import MLM
from kdlib.methods.tutor import TutorKD
from kdlib.settings import names
from tools import experiments, tutor_records
from tools.tutor_records import NOTHING, SEEDS, TASKS, WAYS

JOBS = list(itertools.product(WAYS, SEEDS))


def record_of(way: str, seed: int) -> dict:
    return json.loads(tutor_records.path_of(way, seed).read_text())


def test_there_is_a_record_for_each_way_and_seed_and_no_other():
    expected = {*(tutor_records.path_of(*job) for job in JOBS), tutor_records.FOLDER / "teacher.json"}
    assert set(tutor_records.FOLDER.iterdir()) == expected


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_a_record_is_of_the_configuration_that_its_name_says(job, tmp_path):
    record = record_of(*job)
    assert (record["way"], record["seed"]) == job and sorted(record["scores"]) == sorted(TASKS)
    assert record["environment"]["threads"] == "1"
    if job[0] == NOTHING:
        assert record["config"] == {} and record["history"] == []
        return
    assert pretraining.configure(**record["config"]).identity == tutor_records.config_of(*job, tmp_path).identity
    steps = tutor_records.SETTINGS["steps"]
    assert [row["step"] for row in record["history"]] == list(range(steps // 10, steps + 1, steps // 10))


def test_every_way_has_as_many_steps_and_sees_as_much_text():
    """The same budget: steps, batch, text and masks; only the method and its learning rate differ."""
    configs = [record_of(way, 0)["config"] for way in WAYS if way != NOTHING]
    varied = {"method", "learning_rate", *names(TutorKD)}
    common = [{name: value for name, value in config.items() if name not in varied} for config in configs]
    assert all(one == common[0] for one in common)


def test_the_seeds_of_the_choice_are_not_those_of_the_records():
    assert not set(tutor_records.CHOOSING) & set(SEEDS)


def test_the_records_are_small_and_name_no_machine():
    texts = [path.read_text() for path in tutor_records.FOLDER.iterdir()]
    assert sum(map(len, texts)) < 600_000
    assert not any(str(experiments.ROOT) in text for text in texts)
    assert not any(map(records.is_record, tutor_records.FOLDER.iterdir())), "the README would take them for runs"


@pytest.mark.usefixtures("unchecked")  # the cast is an extra
def test_the_stored_teacher_scores_what_its_record_says():
    """Halving the precision of its weights changes little."""
    record = json.loads((tutor_records.FOLDER / "teacher.json").read_text())
    tokenizer = models.load_tokenizer(models.BOOK_MASKED)
    network = models.load_masked(models.BOOK_MASKED, tokenizer)
    assert next(network.parameters()).dtype == torch.float32
    config = pretraining.configure(**record["config"])
    held_out = corpus.load(config.corpus, tokenizer, "validation").encoded
    student = SimpleNamespace(module=network, accelerator=accelerator_for("cpu"))
    cast = TextCast(student, None, None, (), 0)
    who = SimpleNamespace(cast=cast, measure=MLM().measure(cast))
    found = pretraining.evaluation(config, who, held_out, tokenizer)()
    assert found["validation/loss"] == pytest.approx(record["history"][-1]["validation/loss"], abs=0.01)


@pytest.mark.timeout(300)
def test_one_record_can_be_made_again(tmp_path):
    """The start of one way's distillation, bit for bit in the environment of the record."""
    way, seed = "tutor-kd", 1
    recorded = record_of(way, seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = first_row(tutor_records.config_of(way, seed, tmp_path))
    finally:
        torch.set_num_threads(threads)
    same = machine.environment(torch.device("cpu")) | {"threads": "1"} == recorded["environment"]
    for name, value in recorded["history"][0].items():
        tolerance = {"abs": 2e-6} if same else {"rel": 0.2, "abs": 0.1}
        assert again[name] == pytest.approx(value, **tolerance), name


def first_row(config: pretraining.PretrainingConfig) -> dict[str, float]:
    """The first row of the history that the whole run would have; the run is stopped soon after it."""
    while True:
        try:
            return pretraining.run(dataclasses.replace(config, max_seconds=10.0)).history[0]
        except trainer.TrainingInterruptedError:
            state = checkpoints.read_tensors(config.folder / trainer.CHECKPOINT)[1]["training"]
            if state["history"]:
                return state["history"][0]
