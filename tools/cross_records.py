"""The records of static and cross teaching, chapter 5: `python -m tools.cross_records`, part of `make experiments`.

A teacher at the end of MetaDistil is used once more, as a fixed one: for the student it was trained with, and for
another.  One JSON file a seed, data/runs/05_static_teaching/seed<n>.json: accuracies by who teaches whom.
"""

import itertools
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KDLIB_PROGRESS", "0")

import pandas as pd
import torch

from kdlib import runs
from tools.chapters import ROOT

FOLDER = ROOT / "data" / "runs" / "05_static_teaching"
WORK = ROOT / "_build" / "static_teaching"
TASK, STUDENTS, SEEDS = "mini-mnli", ("tiny-2x32", "tiny-1x32"), range(3)


def missing() -> list[int]:
    """The seeds that have no record yet."""
    return [seed for seed in SEEDS if not path_of(seed).exists()]


def path_of(seed: int) -> Path:
    """The file of a seed's record."""
    return FOLDER / f"seed{seed}.json"


def taught(seed: int, work: Path) -> pd.DataFrame:
    """Test accuracies of one seed: columns teacher ("fine-tuned" or the student it was trained with), student, way."""
    from tools.experiments import meta_run

    rows, ends = [], {}
    place = {"output_dir": str(work)}
    for student in STUDENTS:
        dynamic = runs.run(meta_run(TASK, "metadistil", seed, student=student, **place))
        ends[student] = str(dynamic.folder / runs.TEACHER_FOLDER)
        rows.append((student, student, "dynamic", dynamic.metrics["test/accuracy"]))
    for teacher, student in itertools.product(("fine-tuned", *STUDENTS), STUDENTS):
        fixed = {} if teacher == "fine-tuned" else {"teacher": ends[teacher], "teacher_epochs": 0}
        record = runs.run(meta_run(TASK, "kd", seed, student=student, **place, **fixed))
        rows.append((teacher, student, "static", record.metrics["test/accuracy"]))
    return pd.DataFrame(rows, columns=["teacher", "student", "way", "accuracy"])


def make(seed: int) -> str:
    """Compute one seed and write its record; return a line about it."""
    work = WORK / f"seed{seed}"
    table = taught(seed, work)
    record = {
        "seed": seed,
        "rows": table.to_dict("records"),
        "environment": runs.environment(torch.device("cpu")),
        "git_commit": runs.git_commit(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    temporary = FOLDER / f".seed{seed}.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path_of(seed))
    shutil.rmtree(work)
    return f"static teaching  seed {seed}"


if __name__ == "__main__":
    for number in missing():
        print(make(number), flush=True)
