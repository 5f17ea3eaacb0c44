"""The records of chapter 9: `python -m tools.tutor_records`, part of `make experiments`.

A student is distilled on the mini-corpus in each of the ways that Tutor-KD's tables compare, and each student is
fine-tuned on two tasks.  One JSON file for a way and a seed, data/runs/09_tutor_kd/<way>-seed<n>.json: the numbers of
the distillation, step by step, and the scores of the fine-tuned student.

`python -m tools.experiments --choose 09_tutor_kd` writes what was tried before: learning rates, judged by the
validation splits, with seeds of their own.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KDLIB_PROGRESS", "0")

import pandas as pd
import torch
from tqdm import tqdm

from kdlib import engine, files, machine, models, pretraining, runs
from tools.chapters import ROOT

FOLDER, TEACHER = ROOT / "data" / "runs" / "09_tutor_kd", ROOT / "data" / "teachers" / "mini-corpus"
WORK = ROOT / "_build" / "tutor_kd"
TASKS, SEEDS = ("mini-sst2", "mini-mnli"), range(5)
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
RATES = {
    "tutor": 1e-3,
    "untutored": 5e-4,
    "soft_labels": 2.5e-4,
    "distilbert": 2.5e-4,
    "tinybert": 5e-4,
    "minilm": 2.5e-4,
    "minilm_v2": 2e-3,
}
"""Of the distillation, by method; see `choose`."""
FINE_TUNING_RATE = 2e-3
GRID, CHOOSING = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), range(100, 103)
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


class Trial(NamedTuple):
    """A learning rate that is tried, of a way's distillation or of the fine-tuning after it."""

    tuned: str
    way: str
    rate: float
    seed: int


def path_of(way: str, seed: int) -> Path:
    """The file of a record."""
    return FOLDER / f"{way.replace(' ', '-')}-seed{seed}.json"


def missing() -> list[tuple[str, int]]:
    """The ways and seeds that have no record yet."""
    return [(way, seed) for seed, way in itertools.product(SEEDS, WAYS) if not path_of(way, seed).exists()]


def config_of(way: str, seed: int, work: Path, **changes: Any) -> pretraining.PretrainingConfig:
    """The distillation of a way and a seed."""
    chosen = WAYS[way]
    rate = RATES[chosen["method"]]
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
        student = str(record.folder / engine.STUDENT)
    scores = {task: fine_tuned(student, task, seed, work).metrics["test/accuracy"] for task in TASKS}
    return {"scores": scores, **({"config": {}, "history": []} if record is None else told(record))}


def told(record: runs.RunRecord) -> dict[str, Any]:
    """What is kept of a distillation: its configuration, and its history in six decimals."""
    history = [{name: round(value, 6) for name, value in row.items()} for row in record.history]
    return {"config": pretraining.configure(**record.config).identity, "history": history}


def circumstances() -> dict[str, Any]:
    """Where and with what a record was made."""
    return {"environment": machine.environment(torch.device("cpu")), "git_commit": machine.git_commit()}


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
    files.write_text(path, json.dumps(record, indent=1) + "\n")


def has_teacher() -> bool:
    """Whether the book's masked language model is stored."""
    return (TEACHER / "config.json").exists()


def make_teacher() -> str:
    """Train the book's masked language model and store it, in half precision, with its record; a line about it."""
    torch.set_num_threads(1)
    record = pretraining.run(pretraining.configure(output_dir=str(WORK / "teacher"), device="cpu", **TEACHER_SETTINGS))
    tokenizer = models.load_tokenizer(TEACHER_SETTINGS["student"])
    network = models.load_masked(str(record.folder / engine.STUDENT), tokenizer)
    engine.save_pretrained(network.half(), tokenizer, TEACHER)
    write(FOLDER / "teacher.json", {"way": "teacher", **told(record), "seconds": record.seconds, **circumstances()})
    return f"tutor-kd  teacher  {record.seconds:.0f} s  {record.metrics}"


def trials() -> Iterator[Trial]:
    """What is tried: first the fine-tuning's learning rate, then that of each way's distillation."""
    for way, rate, seed in itertools.product((NOTHING, "tutor-kd", "soft labels"), GRID[2:], CHOOSING):
        yield Trial("fine-tuning", way, rate, seed)
    for way, rate, seed in itertools.product(COMPARED, GRID, CHOOSING):
        yield Trial("distillation", way, rate, seed)


def tried(trial: Trial) -> list[dict[str, Any]]:
    """What the validation splits say of a trial, a row a task."""
    work, fine_tuning = WORK / "candidates", trial.tuned == "fine-tuning"
    changes = {} if fine_tuning else {"learning_rate": trial.rate}
    student = STUDENT if trial.way == NOTHING else distilled(trial.way, trial.seed, work, **changes)
    rate = trial.rate if fine_tuning else FINE_TUNING_RATE
    found = {task: fine_tuned(student, task, trial.seed, work, rate).metrics for task in TASKS}
    return [{**trial._asdict(), "task": task, "accuracy": m["validation/accuracy"]} for task, m in found.items()]


def choose(pool: Pool) -> pd.DataFrame:
    """The accuracy of all that is tried on the validation splits, over seeds; the test splits are not looked at."""
    found = tqdm(pool.imap_unordered(tried, trials()), "09_tutor_kd", total=len(list(trials())))
    rows = itertools.chain.from_iterable(found)
    return pd.DataFrame(rows).groupby(["tuned", "way", "rate", "task"])["accuracy"].agg(["mean", "std", "count"])


def distilled(way: str, seed: int, work: Path, **changes: Any) -> str:
    """The folder of a distilled student."""
    return str(pretraining.run(config_of(way, seed, work, **changes)).folder / engine.STUDENT)


if __name__ == "__main__":
    if not has_teacher():
        print(make_teacher(), flush=True)
    for job in missing():
        print(make(job), flush=True)
