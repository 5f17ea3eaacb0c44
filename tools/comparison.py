"""`python -m tools.comparison FOLDER`: the methods side by side on real GLUE, for chapter 12 (`data/runs/12_glue`).

FOLDER is a local copy of `nyu-mll/glue`, or that id itself.  MiniLM with six layers teaches its first three; every
method sees the same rows, as often, and none of the feedback rows.  An evaluation at the end only, so nothing is
selected on the validation split, which the table reports.

The command can be stopped at any time: runs that have a record are skipped, an interrupted one goes on where it was.
"""

import argparse
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator
from multiprocessing import get_context

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KDLIB_PROGRESS", "0")

from kdlib import configuration, models, runs
from kdlib.runs import RunConfig
from tools.experiments import RECORDS, ROOT, keep

CHAPTER = "12_glue"
WORK = ROOT / "_build" / "comparison"
HUB = "nyu-mll/glue"
SEEDS = {"sst2": (0, 1, 2), "mrpc": (0,)}
SIZES = {"sst2": {"max_train": 2000, "batch_size": 32}, "mrpc": {"max_train": 1000, "batch_size": 16}}
"""Pairs of sentences are four times as long, so there are fewer of them."""
SETTINGS = {
    "source": HUB,
    "teacher": models.MINILM,
    "student_layers": 3,
    "feedback_fraction": 0.1,
    "epochs": 2,
    "evaluate_every": 10_000,
    "checkpoint_every": 50,
    "predict_test": False,
    "precision": "bf16",
    "device": "cpu",
    "output_dir": str(WORK),
}
LOWERED = {"tangent_precision": "autocast"}
ARMS: list[dict] = [
    {"method": "fine_tune"},
    {"method": "kd"},
    {"method": "prokt"},
    {"method": "dml"},
    {"method": "metadistil", **LOWERED},
    {"method": "ikd", **LOWERED},
    {"method": "lgtm", "influence": "weighted", **LOWERED},
    {"method": "lgtm", "influence": "meta", "influence_weight": "student_rate", **LOWERED},
]
"""What differs between the methods; rates and weights are their defaults, but LGTM's "meta" has the exact gradient."""


def comparison() -> Iterator[RunConfig]:
    """The runs of the comparison, seed by seed, so that what is there at any time can be compared."""
    for task, seeds in SEEDS.items():
        for seed, arm in itertools.product(seeds, ARMS):
            given = {"task": task, "seed": seed, **arm, **SIZES[task], **SETTINGS}
            if arm["method"] != "fine_tune":
                given["teacher_seed"] = seed
            if arm["method"] in ("kd", "metadistil", "ikd"):  # their teachers are fine-tuned first, as the students are
                given |= {f"teacher_{name}": given[name] for name in ("batch_size", "evaluate_every")}
            yield runs.configure(**given)


def teachers_of(configs: list[RunConfig]) -> list[RunConfig]:
    """The fine-tunings that these runs share."""
    found = [teacher for teacher in map(configuration.teachers_config, configs) if teacher is not None]
    return list({teacher.asked_id: teacher for teacher in found}.values())


def recorded(config: RunConfig) -> bool:
    """Whether the run has a record in the repository, under the name of what was asked of the hub's data."""
    return (RECORDS / CHAPTER / f"{config.asked_id}.json").exists()


def make(job: tuple[RunConfig, str]) -> str:
    """Compute one run on the data in `folder`, keep its record under the hub's name, return a line about it."""
    config, folder = job
    if recorded(config):  # by another process, since this one started
        return f"{config.asked_id} is there"
    record = runs.run(dataclasses.replace(config, source=folder))
    teacher = configuration.teachers_config(config)
    named = {"run_id": config.asked_id, "config": config.flat, "teacher": teacher and teacher.asked_id}
    keep(dataclasses.replace(record, **named), CHAPTER)
    if config.student_layers is not None:  # a teacher is needed again
        shutil.rmtree(record.folder)
    return f"{config.asked_id}  {record.seconds:.0f} s  {record.metrics}"


def main() -> None:
    """Make the records that are missing: the teachers first, which several runs share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a local copy of nyu-mll/glue, or that id")
    parser.add_argument("--tasks", nargs="*", default=list(SEEDS), choices=list(SEEDS))
    methods = list(dict.fromkeys(arm["method"] for arm in ARMS))
    parser.add_argument("--methods", nargs="*", default=methods, choices=methods)
    parser.add_argument("--processes", type=int, default=1, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    chosen = [c for c in comparison() if c.task in arguments.tasks and c.method in arguments.methods]
    wanted = [config for config in chosen if not recorded(config)]
    with get_context("spawn").Pool(arguments.processes) as pool:
        for configs in (teachers_of(wanted), wanted):
            for line in pool.imap(make, [(config, arguments.folder) for config in configs]):
                print(line, flush=True)
        pool.close()
        pool.join()


if __name__ == "__main__":
    main()
