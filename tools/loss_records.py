"""The validation losses of chapter 7's runs: `python -m tools.loss_records`, part of `make experiments`.

LGTM's Figure 2 says of a student that it overfits, by its loss on the validation split.  The runs are those of chapters
5 and 7 once more, with the losses of student and teacher beside their accuracies.  One JSON file a run,
data/runs/07_validation_loss/<way>-seed<n>.json, a column for each quantity; what has a file is not computed again.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KDLIB_PROGRESS", "0")

import pandas as pd
import torch

from kdlib import files, runs
from tools import experiments
from tools.chapters import ROOT

FOLDER = ROOT / "data" / "runs" / "07_validation_loss"
WORK = ROOT / "_build" / "validation_loss"
TASK, SEEDS = "mini-mnli", range(5)
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed teacher": ("kd", {}),
    "online distillation": ("prokt", {}),
    "MetaDistil": ("metadistil", {}),
    "LGTM, weighted": ("lgtm", {"influence": "weighted"}),
    "LGTM, meta, half as long": ("lgtm", {"influence": "meta", "influence_share": 0.5}),
}
"""By the names that the chapter uses: the method, and what it changes."""
KEPT = ("loss", "accuracy")
"""Of the student and of the teacher, on the validation split."""


class Job(NamedTuple):
    """One run: how the student is trained, and the seed of everything."""

    way: str
    seed: int

    @property
    def path(self) -> Path:
        """The file of its record."""
        return FOLDER / f"{self.way.replace(',', '').replace(' ', '-')}-seed{self.seed}.json"


def jobs() -> Iterator[Job]:
    """All runs that the chapter reads, seed by seed."""
    yield from (Job(way, seed) for seed in SEEDS for way in WAYS)


def config_of(job: Job, **changes: Any) -> runs.RunConfig:
    """A run of chapter 5 or 7."""
    method, term = WAYS[job.way]
    if method in ("kd", "metadistil"):
        return experiments.meta_run(TASK, method, job.seed, **changes)
    return experiments.lgtm_run(method, job.seed, **{**term, **changes})


def compute(job: Job, work: Path = WORK, **changes: Any) -> dict[str, Any]:
    """Make a run and return its record: the columns of its history that tell of overfitting."""
    torch.set_num_threads(1)
    record = runs.run(config_of(job, output_dir=str(work), **changes))
    history = pd.DataFrame(record.history)
    wanted = [f"{who}validation/{what}" for who in ("", "teacher/") for what in KEPT]
    names = [name for name in ("epoch", "train_loss", "train_feedback_loss", *wanted) if name in history]
    return {
        **job._asdict(),
        "history": {name: [float(f"{value:.6g}") for value in history[name]] for name in names},
        "seconds": record.seconds,
        "environment": record.environment,
        "git_commit": record.git_commit,
    }


def make(job: Job) -> str:
    """Make a run, keep its record and return a line about it."""
    started, record = time.perf_counter(), compute(job)
    FOLDER.mkdir(parents=True, exist_ok=True)
    files.write_text(job.path, json.dumps(record, indent=1) + "\n")
    return f"07_validation_loss  {job.path.stem}  {time.perf_counter() - started:.0f} s"


def missing() -> list[Job]:
    """The runs that have no record yet."""
    return [job for job in jobs() if not job.path.exists()]


if __name__ == "__main__":
    for job in missing():
        print(make(job), flush=True)
