"""What the studies measure where a run is not all: records of the arms that name them, and made again in small."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from kdlib import book, checkpoints, corpus, engine, glue, machine, models, pretraining, records, runs, trainer
from kdlib.cluster import Job
from kdlib.learner import accelerator_for
from kdlib.methods.on_text import TextCast
from kdlib.methods.task_agnostic import MLM
from kdlib.methods.tutor import TutorKD
from kdlib.settings import names
from kdlib.study import Unit
from tests.book.studies import RECORDS, STUDIES
from tools import measures

MEASURED = {name: study for name, study in STUDIES.items() if any(unit.measure for unit in study.units)}
SMALL = {"max_train": 60, "max_evaluation": 50, "teacher_epochs": 1, "epochs": 2, "feedback_fraction": 0.2}


def record_of(unit: Unit, study: str) -> dict:
    return json.loads(STUDIES[study].record(unit).read_text())


def unit_of(study: str, arm: str, seed: int = 0, **changes) -> Unit:
    (unit,) = [unit for unit in STUDIES[study].units if (unit.arm, unit.seed) == (arm, seed)]
    return dataclasses.replace(unit, parameters={**unit.parameters, **changes})


@pytest.mark.parametrize("study", MEASURED)
def test_a_record_says_which_arm_and_seed_it_is_of(study):
    for unit in MEASURED[study].units:
        record = record_of(unit, study)
        assert record.get("seed", record.get("config", {}).get("seed")) == unit.seed
        assert record.get("way", unit.arm) == unit.arm
        told = record.get("config") or record
        ours = {name: unit.parameters.get(name) for name in ("task", "mode", "method", "student") if name in told}
        if study == "11_pretraining":
            ours = {name: value for name, value in ours.items() if unit.arm not in ("none", "teacher")}
        assert {name: told[name] for name in ours} == ours, unit.name


@pytest.mark.parametrize("study", ["02_influence", "05_static_teaching", "07_validation_loss", "09_tutor_kd"])
def test_none_is_taken_for_a_run(study):
    assert not any(map(records.is_record, (RECORDS / study).iterdir())), "the README would take them for runs"


# --- Chapter 2 ---


def test_the_record_of_an_influence_is_complete():
    for unit in STUDIES["02_influence"].units:
        record = record_of(unit, "02_influence")
        moments = {len(column) for column in record["moments"].values()}
        assert moments == {measures.chapter_functions()["MOMENTS"]}
        assert ("samples" in record) == (unit.parameters["mode"] != "labels" and unit.seed == 0)


def test_nan_becomes_null():
    assert measures.rounded(float("nan")) is None
    assert measures.rounded(0.123456) == 0.1235
    assert measures.rounded(-1234567.0, 3) == -1230000.0
    assert measures.rounded(7) == 7


def test_the_start_of_an_influence_can_be_made_again():
    """The first moment needs no training, so it is the same on every machine but for rounding."""
    functions, unit = measures.chapter_functions(), STUDIES["02_influence"].units[0]
    stage = functions["stage"](unit.parameters["task"], unit.seed)
    step, rate, student, teacher = next(functions["lessons"](stage, unit.parameters["mode"], unit.seed))
    row = functions["summary"]([(rate, functions["observe"](stage, student, teacher))], stage.oracle)
    recorded = {name: column[0] for name, column in record_of(unit, "02_influence")["moments"].items()}
    assert step == recorded["step"] == 0
    for name, value in row.items():
        assert value == pytest.approx(recorded[name], rel=1e-2, abs=1e-2), name


@pytest.mark.timeout(300)
def test_a_whole_influence_can_be_made_again(tmp_path):
    """Digit for digit in the environment of the record; elsewhere rounding differs, and training wanders off."""
    unit, threads = STUDIES["02_influence"].units[0], torch.get_num_threads()
    recorded = record_of(unit, "02_influence")
    if machine.environment(torch.device("cpu")) | {"threads": "1"} != recorded["environment"]:
        pytest.skip("another environment than the record's")
    torch.set_num_threads(1)
    try:
        assert measures.influence(Job(unit, tmp_path))["moments"] == recorded["moments"]
    finally:
        torch.set_num_threads(threads)


# --- Chapters 5 and 7 ---

TEACHERS = (measures.FINE_TUNED, *measures.STUDENTS)


def accuracies(record: dict) -> dict:
    return {(row["teacher"], row["student"], row["way"]): row["accuracy"] for row in record["accuracies"]}


def identity(config: runs.RunConfig) -> str:
    """What makes a run what it is; that some runs were observed on the way changes nothing."""
    return runs.configure(**{**config.flat, "observe": None}).run_id


def known_runs(*chapters: str) -> dict[str, runs.RunRecord]:
    found = [record for chapter in chapters for record in book.read_records(chapter)]
    return {identity(runs.configure(**record.config)): record for record in found}


def test_static_teaching_is_complete_and_agrees_with_the_records_of_the_chapter():
    """The same students of the same teachers, by another command."""
    dynamic = [(student, student, "dynamic") for student in measures.STUDENTS]
    static = [(teacher, student, "static") for teacher, student in itertools.product(TEACHERS, measures.STUDENTS)]
    known, compared = known_runs("05_pilot_updates"), 0
    for unit in STUDIES["05_static_teaching"].units:
        record = record_of(unit, "05_static_teaching")
        assert sorted(accuracies(record)) == sorted(dynamic + static)
        pairs = [(row["first"], row["second"]) for row in record["distances"]]
        assert sorted(pairs) == sorted(itertools.permutations(TEACHERS, 2))
        assert all(row["kl"] > 0 for row in record["distances"])
        student = measures.STUDENTS[0]
        meta = {**unit.parameters, "student": student}
        fixed = {**{name: value for name, value in meta.items() if name != "teaching_rate"}, "method": "kd"}
        for parameters, way in ((meta, (student, student, "dynamic")), (fixed, (TEACHERS[0], student, "static"))):
            recorded = known.get(identity(runs.configure(**parameters)))
            if recorded is not None and recorded.environment == record["environment"]:
                assert accuracies(record)[way] == recorded.metrics["test/accuracy"]
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
    monkeypatch.setattr(measures, "distances", lambda places, config: [places])
    job = Job(unit_of("05_static_teaching", "static", 5), tmp_path)
    table = measures.static_teaching(job)
    ends = {c.student: tmp_path / c.asked_id / engine.TEACHER_FOLDER for c in asked if c.method == "metadistil"}
    assert ends.keys() == set(measures.STUDENTS)
    for row in table["accuracies"]:
        config = asked[int(row["accuracy"]) - 1]
        assert (config.student, config.seed, config.task) == (row["student"], 5, "mini-mnli")
        assert config.method == ("metadistil" if row["way"] == "dynamic" else "kd")
        if row["way"] == "static" and row["teacher"] != measures.FINE_TUNED:
            assert (Path(config.teacher), config.settings.teacher_epochs) == (ends[row["teacher"]], 0)
        else:
            assert config.teacher == "tiny-2x64" and config.settings.teacher_epochs > 0
    (places,) = table["distances"]
    assert {name: Path(places[name]) for name in measures.STUDENTS} == ends


@pytest.mark.timeout(120)
def test_a_small_table_of_static_teaching_can_be_made(tmp_path):
    """With training: the distances are those of the stored teachers, by torch's own function."""
    table = measures.static_teaching(Job(unit_of("05_static_teaching", "static", **SMALL), tmp_path))
    assert len(table["accuracies"]) == 8
    made = [runs.configure(**runs.read_record(path).config) for path in tmp_path.glob("*/record.json")]
    config = next(c for c in made if c.method == "metadistil")
    data, tokenizer = runs.load_data(config), models.load_tokenizer(config.student)
    encoded = glue.encode(data.test["test"], data.task, tokenizer)
    before, after = (
        torch.from_numpy(models.predict(models.load(str(place), data.task, tokenizer), encoded)).log_softmax(-1)
        for place in (runs.teacher_of(config)[0], config.folder / engine.TEACHER_FOLDER)
    )
    expected = torch.nn.functional.kl_div(after, before, log_target=True, reduction="batchmean").item()
    wanted = (measures.FINE_TUNED, config.student)
    (found,) = [r["kl"] for r in table["distances"] if (r["first"], r["second"]) == wanted]
    assert found == pytest.approx(expected, abs=1e-5) and found > 0


def test_validation_losses_are_those_of_the_runs_of_chapters_5_and_7():
    """Same settings by another command; the same accuracies at every epoch where the machine is the same."""
    known = known_runs("05_pilot_updates", "07_good_teachers")
    for unit in STUDIES["07_validation_loss"].units:
        recorded, ours = known[identity(unit.config)], record_of(unit, "07_validation_loss")
        history = ours["history"]
        assert history["epoch"] == list(range(1, unit.parameters["epochs"] + 1))
        expected = {"epoch", "train_loss", "validation/loss", "validation/accuracy"}
        if unit.parameters["method"] != "kd":
            expected |= {"teacher/validation/loss", "teacher/validation/accuracy"}
        assert history.keys() - {"train_feedback_loss"} == expected
        assert all(len(v) == len(history["epoch"]) and np.isfinite(v).all() for v in history.values())
        if recorded.environment == ours["environment"]:
            accuracies = [row["validation/accuracy"] for row in recorded.history]
            assert history["validation/accuracy"] == pytest.approx(accuracies, rel=1e-5), unit.name


@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", ["fixed teacher", "LGTM, weighted"])
def test_the_last_loss_is_that_of_the_network_that_is_left(way, tmp_path):
    """Mean cross entropy of the labels, by SciPy from the stored network's own predictions."""
    job = Job(unit_of("07_validation_loss", way, **SMALL), tmp_path)
    record, config = measures.validation_losses(job), measures.run_of(job)
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


# --- Chapters 9 and 11 ---


def test_the_ways_of_chapter_9_are_of_the_configurations_that_the_study_says():
    for unit in STUDIES["09_tutor_kd"].units:
        record = record_of(unit, "09_tutor_kd")
        assert sorted(record["scores"]) == ["mini-mnli", "mini-sst2"]
        if unit.arm == "no distillation":
            assert record["config"] == {} and record["history"] == []
            continue
        assert pretraining.configure(**record["config"]).identity == unit.config.identity
        steps = unit.parameters["steps"]
        assert [row["step"] for row in record["history"]] == list(range(steps // 10, steps + 1, steps // 10))


def test_every_way_has_as_many_steps_and_sees_as_much_text():
    """The same budget: steps, batch, text and masks; only the method and its learning rate differ."""
    units = [unit for unit in STUDIES["09_tutor_kd"].units if unit.seed == 0]
    configs = [config for unit in units if (config := record_of(unit, "09_tutor_kd")["config"])]
    varied = {"method", "learning_rate", *names(TutorKD)}
    common = [{name: value for name, value in config.items() if name not in varied} for config in configs]
    assert len(common) == 16 and all(one == common[0] for one in common)
    units = STUDIES["11_pretraining"].units
    found = [record_of(unit, "11_pretraining") for unit in units if unit.arm in ("tutor", "soft_labels")]
    assert len({json.dumps(record["samples"]) for record in found}) == 1
    assert {record["history"][-1]["step"] for record in found} == {200}
    assert all(0 < record["metrics"]["sst2/accuracy"] < 1 for record in found)


@pytest.mark.usefixtures("unchecked")  # the cast is an extra
def test_the_stored_masked_teacher_scores_what_its_record_says():
    """Halving the precision of its weights changes little."""
    record = json.loads((RECORDS / "teachers" / "mini-corpus-seed0.json").read_text())
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
def test_the_start_of_a_distillation_can_be_made_again(tmp_path):
    """Of one way's distillation, bit for bit in the environment of the record."""
    unit = unit_of("09_tutor_kd", "tutor-kd", 1, output_dir=str(tmp_path))
    recorded, threads = record_of(unit, "09_tutor_kd"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = first_row(unit.config)
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


@pytest.mark.timeout(120)
def test_a_student_is_distilled_then_fine_tuned_on_every_task(tmp_path):
    """In small, against the two runs by hand."""
    unit = unit_of("09_tutor_kd", "soft labels", steps=2, evaluate_every=2, max_lines=40)
    then = tuple({**settings, "max_train": 40, "max_evaluation": 20, "epochs": 1} for settings in unit.then)
    job = Job(dataclasses.replace(unit, then=then), tmp_path / "job")
    record = measures.distilled_then_fine_tuned(job)
    distilled = pretraining.run(pretraining.configure(**{**job.unit.parameters, "output_dir": str(tmp_path / "hand")}))
    assert record["history"][-1]["validation/loss"] == pytest.approx(distilled.history[-1]["validation/loss"], abs=1e-6)
    for settings in then:
        told = {**settings, "student": str(distilled.folder / engine.STUDENT), "output_dir": str(tmp_path / "hand")}
        assert record["scores"][settings["task"]] == runs.run(runs.configure(**told)).metrics["test/accuracy"]
