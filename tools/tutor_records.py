"""The records of chapter 9: `python -m tools.tutor_records`, part of `make experiments`.

A student is distilled on the mini-corpus in each of the ways that Tutor-KD's tables compare, and each student is
fine-tuned on two tasks.  One JSON file for a way and a seed, data/runs/09_tutor_kd/<way>-seed<n>.json: the numbers of
the distillation, step by step, and the scores of the fine-tuned student.

`python -m tools.tutor_records --choose` shows how the learning rates were chosen: by the validation split, with seeds
of their own.
"""

import argparse
import itertools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KDLIB_PROGRESS", "0")

import pandas as pd
import torch

from kdlib import models, pretraining, runs
from tools.chapters import ROOT

FOLDER, TEACHER = ROOT / "data" / "runs" / "09_tutor_kd", ROOT / "data" / "teachers" / "mini-corpus"
WORK = ROOT / "_build" / "tutor_kd"
TASKS, SEEDS = ("mini-sst2", "mini-mnli"), range(3)
STUDENT = "tiny-2x64h4"
NOTHING = "no distillation"
WAYS: dict[str, dict[str, Any]] = {
    "tutor-kd": {"method": "tutor"},
    "without r_T": {"method": "tutor", "reward_weight": 0.0},
    "lambda 0.25": {"method": "tutor", "reward_weight": 0.25},
    "lambda 0.75": {"method": "tutor", "reward_weight": 0.75},
    "without r_S": {"method": "tutor", "reward_weight": 1.0},
    "no reward": {"method": "tutor", "strategy": "no reward"},
    "reverse": {"method": "tutor", "strategy": "reverse"},
    "hard for both": {"method": "tutor", "strategy": "hard for both"},
    "easy for both": {"method": "tutor", "strategy": "easy for both"},
    "without modification": {"method": "tutor", "imitated": "distribution"},
    "without modification and tutor": {"method": "untutored"},
    "soft labels": {"method": "soft_labels"},
    "distilbert": {"method": "distilbert"},
    "tinybert": {"method": "tinybert"},
    "minilm": {"method": "minilm"},
    "minilm v2": {"method": "minilm_v2"},
    NOTHING: {},
}
"""What is compared, by the name that the chapter uses."""
TEACHER_SETTINGS = {"method": "mlm", "student": "tiny-4x128", "steps": 3000, "batch_size": 32, "learning_rate": 1e-3}
SETTINGS = {"student": STUDENT, "steps": 300, "batch_size": 32, "evaluate_every": 30, "device": "cpu"}
FINE_TUNING = {"method": "fine_tune", "epochs": 4, "batch_size": 32, "max_train": 2000, "device": "cpu"}
RATES = {"tutor": 1e-3, "untutored": 1e-3, "soft_labels": 1e-3, "distilbert": 1e-3, "minilm": 4e-3}
"""Of the distillation, by method; 2e-3 where nothing else stands.  See `choose`."""
FINE_TUNING_RATE = 2e-3
GRID, CHOOSING_SEEDS = (1e-3, 2e-3, 4e-3), (100, 101)
COMPARED = (
    "tutor-kd",
    "without modification and tutor",
    "soft labels",
    "distilbert",
    "tinybert",
    "minilm",
    "minilm v2",
)
"""The ways whose learning rate is chosen; the variants of Tutor-KD take its."""


def path_of(way: str, seed: int) -> Path:
    """The file of a record."""
    return FOLDER / f"{way.replace(' ', '-')}-seed{seed}.json"


def missing() -> list[tuple[str, int]]:
    """The ways and seeds that have no record yet."""
    return [(way, seed) for seed, way in itertools.product(SEEDS, WAYS) if not path_of(way, seed).exists()]


def config_of(way: str, seed: int, work: Path, **changes: Any) -> pretraining.PretrainingConfig:
    """The distillation of a way and a seed."""
    chosen = WAYS[way]
    rate = RATES.get(chosen["method"], 2e-3)
    folders = {"output_dir": str(work), "cache_dir": str(WORK / "corpora")}
    return pretraining.configure(**{"seed": seed, "learning_rate": rate, **SETTINGS, **chosen, **folders, **changes})


def fine_tuned(student: str, task: str, seed: int, work: Path, rate: float = FINE_TUNING_RATE) -> runs.RunRecord:
    """A student on a task."""
    settings = {**FINE_TUNING, "output_dir": str(work), "learning_rate": rate}
    return runs.run(runs.configure(task=task, student=student, seed=seed, **settings))


def compared(way: str, seed: int, work: Path) -> dict[str, Any]:
    """One way, one seed: `history` of the distillation and `scores` of the student on the tasks' test splits."""
    record, student = None, STUDENT
    if way != NOTHING:
        record = pretraining.run(config_of(way, seed, work))
        student = str(record.folder / runs.STUDENT)
    scores = {task: fine_tuned(student, task, seed, work).metrics["test/accuracy"] for task in TASKS}
    return {"scores": scores, **({"config": {}, "history": []} if record is None else told(record))}


def told(record: runs.RunRecord) -> dict[str, Any]:
    """What is kept of a distillation: its configuration, and its history in six decimals."""
    history = [{name: round(value, 6) for name, value in row.items()} for row in record.history]
    return {"config": pretraining.configure(**record.config).identity, "history": history}


def circumstances() -> dict[str, Any]:
    """Where and with what a record was made."""
    return {"environment": runs.environment(torch.device("cpu")), "git_commit": runs.git_commit()}


def make(job: tuple[str, int]) -> str:
    """Compute one way and one seed and write the record; return a line about it."""
    (way, seed), started = job, time.perf_counter()
    work = WORK / f"{way} {seed}"
    torch.set_num_threads(1)
    record = {
        "way": way,
        "seed": seed,
        **compared(way, seed, work),
        "seconds": round(time.perf_counter() - started, 1),
        **circumstances(),
    }
    write(path_of(way, seed), record)
    shutil.rmtree(work)
    return f"tutor-kd  {way}  seed {seed}  {record['seconds']:.0f} s  {record['scores']}"


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def has_teacher() -> bool:
    """Whether the book's masked language model is stored."""
    return (TEACHER / "config.json").exists()


def make_teacher() -> str:
    """Train the book's masked language model and store it, in half precision, with its record; a line about it."""
    torch.set_num_threads(1)
    record = pretraining.run(pretraining.configure(output_dir=str(WORK / "teacher"), device="cpu", **TEACHER_SETTINGS))
    tokenizer = models.load_tokenizer(TEACHER_SETTINGS["student"])
    network = models.load_masked(str(record.folder / runs.STUDENT), tokenizer)
    runs.save_pretrained(network.half(), tokenizer, TEACHER)
    write(FOLDER / "teacher.json", {"way": "teacher", **told(record), "seconds": record.seconds, **circumstances()})
    return f"tutor-kd  teacher  {record.seconds:.0f} s  {record.metrics}"


def choose() -> None:
    """Print what the validation splits say of the fine-tuning's learning rate, then of each way's."""
    work = WORK / "candidates"
    rows = []
    for way, rate, seed in itertools.product((NOTHING, "tutor-kd", "soft labels"), GRID, CHOOSING_SEEDS):
        rows += scored(
            f"{way}, fine-tuning", rate, STUDENT if way == NOTHING else distilled(way, seed, work), seed, rate
        )
    for way, rate, seed in itertools.product(COMPARED, GRID, CHOOSING_SEEDS):
        rows += scored(way, rate, distilled(way, seed, work, learning_rate=rate), seed, FINE_TUNING_RATE)
    table = pd.DataFrame(rows).pivot_table(index=["way", "rate"], columns="task", values="score")
    print(table.assign(mean=table.mean(axis=1)).round(4).to_string())


def distilled(way: str, seed: int, work: Path, **changes: Any) -> str:
    """The folder of a distilled student."""
    return str(pretraining.run(config_of(way, seed, work, **changes)).folder / runs.STUDENT)


def scored(way: str, rate: float, student: str, seed: int, fine_tuning_rate: float) -> list[dict[str, Any]]:
    """What the validation splits say of a student, a row a task."""
    work = WORK / "candidates"
    found = {task: fine_tuned(student, task, seed, work, fine_tuning_rate).metrics for task in TASKS}
    return [
        {"way": way, "rate": rate, "seed": seed, "task": task, "score": metrics["validation/accuracy"]}
        for task, metrics in found.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--choose", action="store_true", help="compare learning rates and stop")
    if parser.parse_args().choose:
        choose()
    else:
        if not has_teacher():
            print(make_teacher(), flush=True)
        for job in missing():
            print(make(job), flush=True)
