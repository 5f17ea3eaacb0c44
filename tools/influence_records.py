"""The run records of the chapter on influence: `python -m tools.influence_records`, part of `make experiments`.

The runs are made by the chapter's own functions: the cells tagged `experiment` hold imports, constants and definitions
only, and are executed here.  A record is one JSON file, data/runs/02_influence/<task>-<mode>-seed<n>.json: a column
for each quantity, with an entry for each moment of the training; numbers keep four digits.
"""

import functools
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KDLIB_PROGRESS", "0")

import numpy as np
import torch

from kdlib import files, machine
from tools.chapters import ROOT, read_source, tagged

CHAPTER = "02_influence"
FOLDER = ROOT / "data" / "runs" / CHAPTER
TASKS, SEEDS = ("mini-sst2", "mini-mrpc"), range(5)
SHOWN = 64
"""How many samples are recorded one by one, in the runs with teacher and seed 0."""


class Job(NamedTuple):
    """One run: a MiniGLUE task, who teaches, and the seed of everything."""

    task: str
    mode: str
    seed: int

    @property
    def path(self) -> Path:
        """The file of its record."""
        return FOLDER / f"{self.task}-{self.mode}-seed{self.seed}.json"


def jobs() -> list[Job]:
    """All runs that the chapter reads."""
    pairs = itertools.product(("labels", "together"), TASKS)
    return [
        *(Job(task, mode, seed) for seed, (mode, task) in itertools.product(SEEDS, pairs)),
        *(Job("mini-sst2", "fixed", seed) for seed in range(3)),
    ]


@functools.cache
def chapter_functions() -> dict[str, Any]:
    """What the cells tagged `experiment` define."""
    namespace: dict[str, Any] = {}
    for cell in tagged(read_source(ROOT / "chapters" / f"{CHAPTER}.py"), "experiment"):
        exec(cell.source, namespace)
    return namespace


def compute(job: Job) -> dict[str, Any]:
    """Make a run and return its record."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    table, stage, seen = chapter_functions()["experiment"](*job)
    record = {
        **job._asdict(),
        "seconds": round(time.perf_counter() - started, 1),
        "environment": machine.environment(torch.device("cpu")),
        "git_commit": machine.git_commit(),
        "moments": {name: [rounded(value) for value in table[name].tolist()] for name in table},
    }
    if job.mode != "labels" and job.seed == 0:
        chosen = np.random.default_rng(job.seed).permutation(len(stage.oracle))[:SHOWN]
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


def make(job: Job) -> str:
    """Make a run, keep its record and return a line about it."""
    record = compute(job)
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, separators=(",", ":")).replace('],"', '],\n"').replace(',"moments"', ',\n"moments"')
    files.write_text(job.path, text + "\n")
    return f"{CHAPTER}  {job.path.stem}  {record['seconds']:.0f} s"


def missing() -> list[Job]:
    """The runs that have no record yet."""
    return [job for job in jobs() if not job.path.exists()]


if __name__ == "__main__":
    for job in missing():
        print(make(job), flush=True)
