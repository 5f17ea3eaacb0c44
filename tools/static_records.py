"""The records of static and cross teaching, chapter 5: `python -m tools.static_records`, part of `make experiments`.

The teacher at the end of MetaDistil is used once more, as a fixed one: for the student that it was trained with, and
for another.  One JSON file a seed, data/runs/05_static_teaching/seed<n>.json: who taught whom with which accuracy, and
how far the teachers' answers are from each other.
"""

import itertools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KDLIB_PROGRESS", "0")

import torch

from kdlib import engine, files, glue, losses, machine, models, runs
from tools import experiments
from tools.chapters import ROOT

FOLDER = ROOT / "data" / "runs" / "05_static_teaching"
WORK = ROOT / "_build" / "static_teaching"
TASK, STUDENTS, SEEDS = "mini-mnli", ("tiny-2x32", "tiny-3x32"), range(6)
FINE_TUNED = "fine-tuned"


def path_of(seed: int) -> Path:
    """The file of a seed's record."""
    return FOLDER / f"seed{seed}.json"


def missing() -> list[int]:
    """The seeds that have no record yet."""
    return [seed for seed in SEEDS if not path_of(seed).exists()]


def taught(seed: int, work: Path) -> dict[str, list[dict[str, Any]]]:
    """One seed's `accuracies` by teacher, student and way, and the `distances` between the teachers' answers.

    A teacher is called "fine-tuned", as it is before MetaDistil, or after the student whose MetaDistil it comes from.
    The way is "dynamic" while it learns and "static" for a student that starts afresh when it has learned.  A distance
    is the mean of KL(first ‖ second) over the test split, in nats.
    """
    common = {"seed": seed, "output_dir": str(work)}
    dynamic = {student: runs.run(run_of("metadistil", student, common)) for student in STUDENTS}
    places = {student: str(record.folder / engine.TEACHER_FOLDER) for student, record in dynamic.items()}
    rows = [row(student, student, "dynamic", record) for student, record in dynamic.items()]
    for teacher, student in itertools.product((FINE_TUNED, *STUDENTS), STUDENTS):
        fixed = {} if teacher == FINE_TUNED else {"teacher": places[teacher], "teacher_epochs": 0}
        rows.append(row(teacher, student, "static", runs.run(run_of("kd", student, common | fixed))))
    places[FINE_TUNED], _ = runs.teacher_of(run_of("kd", STUDENTS[0], common))
    return {"accuracies": rows, "distances": distances(places, run_of("kd", STUDENTS[0], common))}


def run_of(method: str, student: str, changes: dict[str, Any]) -> runs.RunConfig:
    """A run of chapter 5."""
    return experiments.meta_run(TASK, method, student=student, **changes)


def row(teacher: str, student: str, way: str, record: runs.RunRecord) -> dict[str, Any]:
    """A line of the table: the student's accuracy on the test split."""
    return {"teacher": teacher, "student": student, "way": way, "accuracy": record.metrics["test/accuracy"]}


def distances(places: dict[str, str], config: runs.RunConfig) -> list[dict[str, Any]]:
    """Mean KL(first ‖ second) of the stored networks' answers on the test split, for each ordered pair."""
    data, tokenizer = runs.load_data(config), models.load_tokenizer(config.student)
    encoded = glue.encode(data.test["test"], data.task, tokenizer)
    answers = {
        name: torch.from_numpy(models.predict(models.load(place, data.task, tokenizer), encoded))
        for name, place in places.items()
    }
    return [
        {"first": first, "second": second, "kl": round(losses.kl_divergence(answers[second], answers[first]).item(), 5)}
        for first, second in itertools.permutations(answers, 2)
    ]


def make(seed: int) -> str:
    """Compute one seed and write its record; return a line about it."""
    work, started = WORK / f"seed{seed}", time.perf_counter()
    torch.set_num_threads(1)
    record = {
        "seed": seed,
        **taught(seed, work),
        "seconds": round(time.perf_counter() - started, 1),
        "environment": machine.environment(torch.device("cpu")),
        "git_commit": machine.git_commit(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    files.write_text(path_of(seed), json.dumps(record, indent=1) + "\n")
    shutil.rmtree(work)
    return f"static teaching  seed {seed}  {record['seconds']:.0f} s"


if __name__ == "__main__":
    for seed in missing():
        print(make(seed), flush=True)
