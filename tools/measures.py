"""What the book's studies compute where a run is not all: each function here is named by an arm of experiments/*.yml.

Each takes a job, works in its folder and returns a record of its own form, which the chapter reads.
"""

import functools
import itertools
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from kdlib import engine, glue, losses, machine, models, pretraining, runs
from kdlib.cluster import Job, flat_record
from tools.chapters import ROOT, read_source, tagged

Record = dict[str, Any]
TEACHERS = ROOT / "data" / "teachers"


def circumstances(started: float) -> Record:
    """How long a record took, where and with what."""
    environment = machine.environment(torch.device("cpu"))
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "environment": environment, "git_commit": machine.git_commit()}


def run_of(job: Job, **changes: Any) -> runs.RunConfig:
    """The run that the arm's parameters describe, in the job's folder."""
    return runs.configure(**{**job.unit.parameters, "output_dir": str(job.folder), **changes})


def teacher(job: Job) -> Record:
    """A teacher of the book: trained, and stored in half precision in data/teachers."""
    parameters = {**job.unit.parameters, "output_dir": str(job.folder)}
    on_text = pretraining.is_text(parameters)
    record = (pretraining if on_text else runs).run((pretraining if on_text else runs).configure(**parameters))
    tokenizer, place = models.load_tokenizer(parameters["student"]), str(record.folder / engine.STUDENT)
    if on_text:
        network, name = models.load_masked(place, tokenizer), "mini-corpus"
    else:
        task = glue.task_for(parameters["task"])
        network, name = models.load(place, task, tokenizer), task.name
    engine.save_pretrained(network.half(), tokenizer, TEACHERS / name)
    return flat_record(record)


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 2: influences while a student learns

SHOWN = 64
"""How many samples are recorded one by one, in the runs with teacher and seed 0."""


@functools.cache
def chapter_functions() -> dict[str, Any]:
    """What the cells of chapter 2 that are tagged `experiment` define: the runs are made by the chapter's functions."""
    namespace: dict[str, Any] = {}
    for cell in tagged(read_source(ROOT / "chapters" / "02_influence.py"), "experiment"):
        exec(cell.source, namespace)
    return namespace


def influence(job: Job) -> Record:
    """A column for each quantity, with an entry for each moment of the training; numbers keep four digits."""
    started, wanted = time.perf_counter(), {name: job.unit.parameters[name] for name in ("task", "mode", "seed")}
    table, stage, seen = chapter_functions()["experiment"](*wanted.values())
    record = {
        **wanted,
        **circumstances(started),
        "moments": {name: [rounded(value) for value in table[name].tolist()] for name in table},
    }
    if wanted["mode"] != "labels" and wanted["seed"] == 0:
        chosen = np.random.default_rng(0).permutation(len(stage.oracle))[:SHOWN]
        record["samples"] = {
            "row": stage.oracle["row"].iloc[chosen].tolist(),
            **{
                name: [[rounded(value, 3) for value in observation[name][chosen]] for _, observation in seen]
                for name in ("influence", "student", "teacher")
            },
        }
    return record


def rounded(value: float, digits: int = 4) -> float | int | None:
    """A number with so many significant digits; None for NaN, which JSON does not know."""
    if isinstance(value, int):
        return value
    return None if math.isnan(value) else float(f"{value:.{digits}g}")


# ---------------------------------------------------------------------------------------------------------------------
# Chapters 5 and 7: what becomes of MetaDistil's teachers, and of validation losses

STUDENTS, FINE_TUNED = ("tiny-2x32", "tiny-3x32"), "fine-tuned"


def static_teaching(job: Job) -> Record:
    """The teachers at the end of MetaDistil teach once more, as fixed ones: their own student, and the other.

    `accuracies` by teacher, student and way, and `distances` between the teachers' answers.  A teacher is called
    "fine-tuned", as it is before MetaDistil, or after the student whose MetaDistil it comes from.  The way is "dynamic"
    while it learns and "static" for a student that starts afresh when it has learned.
    """
    started = time.perf_counter()

    def accuracy(teacher: str, student: str, way: str, record: runs.RunRecord) -> Record:
        return {"teacher": teacher, "student": student, "way": way, "accuracy": record.metrics["test/accuracy"]}

    def fixed(student: str, **changes: Any) -> runs.RunConfig:
        return run_of(job, method="kd", student=student, teaching_rate=None, **changes)

    dynamic = {student: runs.run(run_of(job, student=student)) for student in STUDENTS}
    places = {student: str(record.folder / engine.TEACHER_FOLDER) for student, record in dynamic.items()}
    rows = [accuracy(student, student, "dynamic", record) for student, record in dynamic.items()]
    for teacher, student in itertools.product((FINE_TUNED, *STUDENTS), STUDENTS):
        given = {} if teacher == FINE_TUNED else {"teacher": places[teacher], "teacher_epochs": 0}
        rows.append(accuracy(teacher, student, "static", runs.run(fixed(student, **given))))
    places[FINE_TUNED], _ = runs.teacher_of(fixed(STUDENTS[0]))
    told = {"accuracies": rows, "distances": distances(places, fixed(STUDENTS[0]))}
    return {"seed": job.unit.seed, **told, **circumstances(started)}


def distances(places: Mapping[str, str], config: runs.RunConfig) -> list[Record]:
    """Mean KL(first ‖ second) of the stored networks' answers on the test split, in nats, for each ordered pair."""
    data, tokenizer = runs.load_data(config), models.load_tokenizer(config.reader)
    encoded = glue.encode(data.test["test"], data.task, tokenizer)
    answers = {
        name: torch.from_numpy(models.predict(models.load(place, data.task, tokenizer), encoded))
        for name, place in places.items()
    }
    return [
        {"first": first, "second": second, "kl": round(losses.kl_divergence(answers[second], answers[first]).item(), 5)}
        for first, second in itertools.permutations(answers, 2)
    ]


def validation_losses(job: Job) -> Record:
    """A run of chapter 5 or 7 once more: the columns of its history that tell of overfitting (LGTM, Figure 2)."""
    record = runs.run(run_of(job))
    history = pd.DataFrame(record.history)
    wanted = [f"{who}validation/{what}" for who in ("", "teacher/") for what in ("loss", "accuracy")]
    names = [name for name in ("epoch", "train_loss", "train_feedback_loss", *wanted) if name in history]
    return {
        "way": job.unit.arm,
        "seed": job.unit.seed,
        "history": {name: [float(f"{value:.6g}") for value in history[name]] for name in names},
        "seconds": record.seconds,
        "environment": record.environment,
        "git_commit": record.git_commit,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Chapters 9 and 11: distilled on text, then fine-tuned

NOTHING = "nothing"
"""The method of a student that is fine-tuned without any distillation."""


def distilled_then_fine_tuned(job: Job) -> Record:
    """Chapter 9: `history` of the distillation, and `scores` of the student on the test splits of what comes after."""
    started, parameters = time.perf_counter(), {**job.unit.parameters, "output_dir": str(job.folder)}
    record, student = None, parameters["student"]
    if parameters["method"] != NOTHING:
        record = pretraining.run(pretraining.configure(**parameters))
        student = str(record.folder / engine.STUDENT)
    scores = {}
    for settings in job.unit.then:
        after = runs.configure(**{**settings, "student": student, "output_dir": str(job.folder)})
        scores[after.task] = runs.run(after).metrics["test/accuracy"]
    history = [] if record is None else [{n: round(v, 6) for n, v in row.items()} for row in record.history]
    config = {} if record is None else pretraining.configure(**record.config).identity
    told = {"scores": scores, "config": config, "history": history}
    return {"way": job.unit.arm, "seed": job.unit.seed, **told, **circumstances(started)}


HEAD = {"method": "mlm", "student": models.MINILM, "steps": 500, "learning_rate": 5e-4, "evaluate_every": 250}
"""MiniLM comes as a network for whole sentences; all of it is first trained as a masked language model, since a head
alone learned little more than how frequent the words are.
"""
OF_THE_TEXT = ("corpus", "train_split", "max_length", "batch_size", "device", "checkpoint_every")


def on_real_text(job: Job) -> Record:
    """Chapter 11: a record of the distillation, with the score on the task after it; text and task by their names."""
    (settings,), parameters = job.unit.then, dict(job.unit.parameters)
    text, source = parameters["corpus"], settings["source"]
    here = {"output_dir": str(job.folder.parent / "11_pretraining-shared"), "corpus": job.folders.get(text, text)}
    shared = {name: parameters[name] for name in OF_THE_TEXT} | here
    after = {**settings, "source": job.folders.get(source, source), "output_dir": str(job.folder)}
    if parameters["method"] == NOTHING:
        folder, tokenizer = job.folder / "fresh", models.load_tokenizer(models.MINILM)
        student = models.load_masked(parameters["student"], tokenizer, job.unit.seed).base_model
        engine.save_pretrained(student, tokenizer, folder)
        record = runs.run(runs.configure(**after, student=str(folder)))
        score, names = record.metrics["validation/accuracy"], {"source": source, "student": parameters["student"]}
    else:
        teacher = pretraining.run(pretraining.configure(**{**shared, **HEAD}))
        if parameters["method"] == HEAD["method"]:
            return flat_record(teacher, run_id=job.unit.name, names={"corpus": text})
        told = {**parameters, **here, "teacher": str(teacher.folder / engine.STUDENT)}
        record = pretraining.run(pretraining.configure(**told))
        fine_tuned = runs.run(runs.configure(**after, student=str(record.folder / engine.STUDENT)))
        score, names = fine_tuned.metrics["validation/accuracy"], {"corpus": text, "teacher": "teacher"}
    return flat_record(record, run_id=job.unit.name, names=names, metrics={"sst2/accuracy": score})
