"""`make experiments`: fine-tune the book's teachers and make the run records that the chapters read.

`python -m tools.experiments --choose 05_pilot_updates` writes data/choices/05_pilot_updates.csv: the validation
accuracy of the settings that were tried, with seeds of their own.  A chapter's settings are the best of its table.

A run that has a record under data/runs is skipped unless --force is given, so an interrupted command goes on where it
was.  Every run uses one thread: the records then agree bit for bit on processors of one kind.
"""

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KDLIB_PROGRESS", "0")

import pandas as pd
from tqdm import tqdm

from kdlib import engine, files, models, runs
from kdlib.runs import RunConfig
from tools import influence_records, loss_records, static_records, tutor_records

ROOT = Path(__file__).resolve().parents[1]
RECORDS, TEACHERS, CHOICES = ROOT / "data" / "runs", ROOT / "data" / "teachers", ROOT / "data" / "choices"
WORK = ROOT / "_build" / "experiments"

TEACHER_TASKS = ("mini-sst2", "mini-mnli")
CHOOSING = range(100, 103)
"""Seeds by which settings are chosen, on the validation split; no record uses them."""


def teachers() -> Iterator[RunConfig]:
    """The book's teachers: tiny-4x128, one for each task that a chapter distils."""
    for task in TEACHER_TASKS:
        yield runs.configure(task=task, method="fine_tune", student="tiny-4x128", **TEACHER_SETTINGS)


def chapter_01() -> Iterator[RunConfig]:
    """Student alone and distilled, ten seeds; then the temperature and α, six seeds, on one task."""
    common = {"teacher": models.BOOK_TEACHER, **STUDENT_SETTINGS}
    for task, seed in itertools.product(TEACHER_TASKS, range(10)):
        yield runs.configure(task=task, method="fine_tune", seed=seed, **STUDENT_SETTINGS)
        yield runs.configure(task=task, method="kd", seed=seed, alpha=0.5, temperature=2.0, **common)
    for temperature, seed in itertools.product((1.0, 4.0, 8.0), range(6)):
        yield runs.configure(task="mini-mnli", method="kd", seed=seed, alpha=0.5, temperature=temperature, **common)
    for alpha, seed in itertools.product((0.0, 0.25, 0.75, 1.0), range(6)):
        yield runs.configure(task="mini-mnli", method="kd", seed=seed, alpha=alpha, temperature=2.0, **common)


def chapter_04() -> Iterator[RunConfig]:
    """Teachers that learn, five seeds: two starts, three orders (dml is the simultaneous one), four ways to train."""
    for seed in range(5):
        for start in ("one-stage", "two-stage"):
            yield online_run("mini-sst2", "prokt", seed, start=start, teacher_alpha=1.0)
        yield online_run("mini-mnli", "prokt", seed, first="student")
        for task, method in itertools.product(TEACHER_TASKS, ("fine_tune", "kd", "prokt", "dml")):
            yield online_run(task, method, seed)
        # Conditions under which mutual learning might help more: a peer of the same size, and fewer examples.
        yield online_run("mini-mnli", "dml", seed, teacher="tiny-2x32", teaching_rate=ONLINE_RATES["fine_tune"][0])
        for method in ("fine_tune", "kd", "dml"):
            yield online_run("mini-mnli", method, seed, max_train=1000, epochs=16)


def online_run(task: str, method: str, seed: int, start: str = "one-stage", **changes) -> RunConfig:
    """A run of chapter 4: as many steps, evaluations and epochs of the teacher for every method."""
    rate, teaching_rate = ONLINE_RATES[method]
    settings = {**ONLINE_SETTINGS, "learning_rate": rate, "seed": seed, "teacher_seed": seed + 50}
    if method != "fine_tune":
        two_stage = method == "kd" or start == "two-stage"
        settings |= {"teacher": "tiny-2x64", "teacher_epochs": changes.get("epochs", 8) if two_stage else 0}
        settings |= {f"teacher_{name}": settings[name] for name in ("batch_size", "evaluate_every") if two_stage}
    if teaching_rate is not None:
        settings["teaching_rate"] = teaching_rate
    return runs.configure(task=task, method=method, **runs.readable({**settings, **changes}, method))


def chapter_05() -> Iterator[RunConfig]:
    """A teacher with feedback, five seeds: with pilot update, without, a fixed one; variants; three sweeps.

    The statistic of the pilot update has runs of its own, in which copy and student take the same step, and its null.
    """
    for task, seed in itertools.product(TEACHER_TASKS, range(5)):
        yield meta_run(task, "kd", seed)
        yield meta_run(task, "metadistil", seed, observe=True)
        yield meta_run(task, "metadistil", seed, pilot_update=False)
    for seed in range(5):
        yield meta_run("mini-mnli", "metadistil", seed, pilot_rule="adamw", observe=True)
        for rate in (META_RATES["mini-mnli"], STANDSTILL):
            yield meta_run("mini-mnli", "metadistil", seed, teaching_rate=rate, **FAIR_PILOT)
        yield meta_run("mini-mnli", "kd", seed, feedback_fraction=0.0)
    for (field, values), seed in itertools.product(META_SWEEPS.items(), range(5)):
        for value, method in itertools.product(values, ("kd", "metadistil")):
            yield meta_run("mini-mnli", method, seed, **{field: value})


def meta_run(task: str, method: str, seed: int, **changes) -> RunConfig:
    """A run of chapter 5: the same data, steps and teacher at the start for every method."""
    settings = {**META_SETTINGS, "learning_rate": META_STUDENT_RATES[task], "seed": seed}
    if method == "metadistil":
        settings |= {"teaching_rate": META_RATES[task]}
    return runs.configure(task=task, method=method, **{**settings, **changes})


def chapter_06() -> Iterator[RunConfig]:
    """A teacher that hears from its student, five seeds: what it listens to, when, on top of PKD, with few labels."""
    for task, seed in itertools.product(TEACHER_TASKS, range(5)):
        yield feedback_run(task, "kd", seed)
        for weight in (0.0, 0.5, 1.0):
            yield feedback_run(task, "ikd", seed, meta_weight=weight)
    for seed in range(5):
        yield feedback_run("mini-sst2", "ikd", seed, meta_weight=1.0, feedback_at="after")
        for method in ("kd", "ikd"):
            yield feedback_run("mini-sst2", method, seed, teacher="tiny-4x32", pkd_weight=PKD_WEIGHT)
        yield feedback_run("mini-sst2", "fine_tune", seed, **{**FEW_LABELS, "epochs": 12})  # as many steps
        for method in ("kd", "ikd"):
            yield feedback_run("mini-sst2", method, seed, **FEW_LABELS)


def feedback_run(task: str, method: str, seed: int, **changes) -> RunConfig:
    """A run of chapter 6: the same data, steps and teacher at the start for every method."""
    settings = {**META_SETTINGS, "feedback_fraction": 0.0, "seed": seed, "teacher_seed": seed + 50}
    settings |= {"learning_rate": FEEDBACK_STUDENT_RATES[task]}
    if method == "ikd":
        settings |= {"meta_weight": 0.5, "teaching_rate": FEEDBACK_RATES[task, changes.get("meta_weight", 0.5)]}
    return runs.configure(task=task, method=method, **runs.readable({**settings, **changes}, method))


def chapter_07() -> Iterator[RunConfig]:
    """Chapter 5's runs go on, five seeds: online distillation, LGTM in its variants, and with the papers' feedback."""
    for seed in range(5):
        yield lgtm_run("prokt", seed)
        yield lgtm_run("lgtm", seed, influence="weighted", observe=seed == 0)
        yield lgtm_run("lgtm", seed, influence="meta", influence_share=0.5)
        yield lgtm_run("lgtm", seed, influence="printed", observe=seed == 0)
        yield lgtm_run("lgtm", seed, influence="released", observe=seed == 0)
        yield lgtm_run("lgtm", seed, feedback_from="validation", feedback_fraction=0.0)
        yield lgtm_run("lgtm", seed, feedback_fraction=0.05)
        for saving in SAVINGS:
            yield lgtm_run("lgtm", seed, influence="meta", influence_share=0.5, **saving)
    yield lgtm_run("lgtm", 0, influence="meta", observe=True)  # one, to see how large its term is at a weight of 1


def lgtm_run(method: str, seed: int, **changes) -> RunConfig:
    """A run of chapter 7: data, steps and teacher at the start as in chapter 5, whose records it reads as well."""
    settings = {**META_SETTINGS, "teacher_epochs": 12, "teacher_alpha": 0.6, "teaching_rate": LGTM_RATE}
    return runs.configure(task="mini-mnli", method=method, seed=seed, **{**settings, **changes})


SHARED_SETTINGS = {"device": "cpu", "output_dir": str(WORK)}
TEACHER_SETTINGS = {**SHARED_SETTINGS, "epochs": 12, "batch_size": 32, "learning_rate": 5e-4}
STUDENT_SETTINGS = {**SHARED_SETTINGS, "student": "tiny-2x32", "epochs": 8, "batch_size": 64, "learning_rate": 2e-3}
ONLINE_SETTINGS = {**STUDENT_SETTINGS, "alpha": 0.5, "temperature": 1.0, "evaluate_every": 21}
ONLINE_RATES = {
    "fine_tune": (2e-3, None),
    "kd": (2e-3, None),
    "prokt": (2e-3, 1e-3),
    "dml": (2e-3, 1e-3),
}
"""Learning rates of the student and of a teacher while it teaches, in chapter 4; see `online_candidates`."""
META_SETTINGS = {
    **SHARED_SETTINGS,
    "teacher": "tiny-2x64",
    "student": "tiny-2x32",
    "max_train": 2000,
    "feedback_fraction": 0.1,
    "epochs": 6,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "alpha": 0.5,
    "temperature": 2.0,
}
FEEDBACK_STUDENT_RATES = {"mini-sst2": 2e-3, "mini-mnli": 2e-3}
FEEDBACK_RATES = {(task, weight): 1e-4 for task in TEACHER_TASKS for weight in (0.0, 0.5, 1.0)}
"""Of the students, and of the teacher while it teaches for each weight γ of the exam, in chapter 6; see
`feedback_candidates`.  On mini-mnli 3e-5 was ahead for γ = 0 and γ = 0.5 together by one answer of 4,800, which is no
reason for another rate than everywhere else.
"""
PKD_WEIGHT = 3.0
FEW_LABELS = {
    "labelled_course": False,
    "alpha": 0.0,
    "max_train": 4000,
    "feedback_fraction": 0.25,
    "teacher_epochs": 24,
    "epochs": 4,
}
"""Only the feedback split has labels, a quarter of the sentences; the teacher learns them, the student its answers."""
META_SWEEPS = {
    "student": ("tiny-1x32", "tiny-2x64"),
    "alpha": (0.0, 0.9),
    "temperature": (1.0, 8.0),
}
"""What chapter 5 changes in META_SETTINGS, one field at a time."""
META_STUDENT_RATES = {"mini-sst2": 4e-3, "mini-mnli": 2e-3}
META_RATES = {"mini-sst2": 3e-5, "mini-mnli": 1e-5}
"""Of the students, and of the teacher while it teaches, in chapter 5; see `meta_candidates`."""
FAIR_PILOT = {"pilot_rule": "adamw", "observe": True, "max_grad_norm": 1e9, "teacher_max_grad_norm": 1e9}
"""Copy and student take the same step: both AdamW's, and neither clips its gradient (JSON has no infinity)."""
STANDSTILL = 1e-12
"""The rate of a teacher that stays where it is; AdamW's rate must be positive."""
SAVINGS = ({"tangent": "forward-difference"}, {"feedback_every": 2}, {"feedback_layers": 1})
"""What makes a step of LGTM cheaper; chapter 7 compares each with the same runs without it."""
LGTM_RATE = 3e-4
"""Of an online teacher and of all LGTM's teachers in chapter 7; see `lgtm_candidates`."""
EXPERIMENTS = {
    "01_distillation": chapter_01,
    "04_online_distillation": chapter_04,
    "05_pilot_updates": chapter_05,
    "06_student_feedback": chapter_06,
    "07_good_teachers": chapter_07,
}


def candidates() -> Iterator[RunConfig]:
    """Students alone at several learning rates, with seeds that no record uses."""
    for task, rate, seed in itertools.product(TEACHER_TASKS, (1e-3, 2e-3, 3e-3, 5e-3), CHOOSING):
        settings = {**STUDENT_SETTINGS, "learning_rate": rate, "output_dir": str(WORK / "candidates")}
        yield runs.configure(task=task, method="fine_tune", seed=seed, **settings)


def online_candidates() -> Iterator[RunConfig]:
    """Chapter 4's ways to train a student at three rates, and the online teachers' around them; seeds of no record.

    The two online methods differ by the order of the updates only and share their rates.
    """
    folder = {"output_dir": str(WORK / "online_candidates")}
    pairs = [*itertools.product((2e-3, 4e-3), (1e-3, 2e-3)), (1e-3, 1e-3), (2e-3, 5e-4)]
    for task, seed in itertools.product(TEACHER_TASKS, CHOOSING):
        for rate, method in itertools.product((1e-3, 2e-3, 4e-3), ("fine_tune", "kd")):
            yield online_run(task, method, seed, learning_rate=rate, **folder)
        for (rate, teaching_rate), method in itertools.product(pairs, ("prokt", "dml")):
            yield online_run(task, method, seed, learning_rate=rate, teaching_rate=teaching_rate, **folder)


def meta_candidates() -> Iterator[RunConfig]:
    """Chapter 5's student at four rates and its teacher at six, three seeds that no record uses.

    The student's rate is the best on average for a fixed teacher and for MetaDistil, which is tried at two of them with
    a teacher's rate of 3e-5.  The teacher's is the best on average for MetaDistil's ways, so that these differ by the
    pilot alone.
    """
    folder = {"output_dir": str(WORK / "meta_candidates")}
    for task in TEACHER_TASKS:
        for rate, seed in itertools.product((1e-3, 2e-3, 4e-3, 8e-3), CHOOSING):
            yield meta_run(task, "kd", seed, learning_rate=rate, **folder)
        for rate, seed in itertools.product({2e-3, 4e-3} - {META_STUDENT_RATES[task]}, CHOOSING):
            yield meta_run(task, "metadistil", seed, learning_rate=rate, teaching_rate=3e-5, **folder)
        ways = [{}, {"pilot_update": False}] + [{"pilot_rule": "adamw"}] * (task == "mini-mnli")
        for way, rate, seed in itertools.product(ways, (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3), CHOOSING):
            yield meta_run(task, "metadistil", seed, teaching_rate=rate, **way, **folder)


def feedback_candidates() -> Iterator[RunConfig]:
    """Chapter 6's student at four rates, its teacher at three for each γ, and PKD's weight; seeds that no record uses.

    The student's rate is chosen with a fixed teacher, and first.  γ = 0 and γ = 0.5 share a teacher's rate, the best
    for both on average, so that they differ by the feedback alone.
    """
    folder = {"output_dir": str(WORK / "feedback_candidates")}
    for task, rate, seed in itertools.product(TEACHER_TASKS, (1e-3, 2e-3, 4e-3, 8e-3), CHOOSING):
        yield feedback_run(task, "kd", seed, learning_rate=rate, **folder)
    for task, weight, rate in itertools.product(TEACHER_TASKS, (0.0, 0.5, 1.0), (3e-5, 1e-4, 3e-4)):
        for seed in CHOOSING:
            yield feedback_run(task, "ikd", seed, meta_weight=weight, teaching_rate=rate, **folder)
    for weight, seed in itertools.product((0.3, 1.0, 3.0), CHOOSING):
        yield feedback_run("mini-sst2", "kd", seed, teacher="tiny-4x32", pkd_weight=weight, **folder)


def lgtm_candidates() -> Iterator[RunConfig]:
    """Chapter 7's teacher at three rates, online and with LGTM's terms; three seeds that no record uses.

    All share the rate that is best for them on average, so that they differ by the influence term alone.
    """
    folder = {"output_dir": str(WORK / "lgtm_candidates")}
    half_as_long = {"influence": "meta", "influence_share": 0.5}
    terms = [half_as_long, *({"influence": kind} for kind in ("weighted", "printed", "released"))]
    ways = [("prokt", {}), *(("lgtm", term) for term in terms)]
    for (method, way), rate, seed in itertools.product(ways, (1e-4, 3e-4, 1e-3), CHOOSING):
        yield lgtm_run(method, seed, teaching_rate=rate, **way, **folder)


CANDIDATES = {
    "01_distillation": (candidates, ("task", "learning_rate")),
    "04_online_distillation": (online_candidates, ("task", "method", "learning_rate", "teaching_rate")),
    "05_pilot_updates": (
        meta_candidates,
        ("task", "method", "pilot_update", "pilot_rule", "learning_rate", "teaching_rate"),
    ),
    "06_student_feedback": (
        feedback_candidates,
        ("task", "method", "learning_rate", "meta_weight", "teaching_rate", "pkd_weight"),
    ),
    "07_good_teachers": (lgtm_candidates, ("task", "method", "influence", "teaching_rate")),
}
"""For each chapter what was tried before its records were made, and the fields that tell the trials apart."""
TUTOR_KD = "09_tutor_kd"
"""Its trials are `tutor_records.trials`."""


def choose(pool: Pool, chapter: str) -> None:
    """Write what the validation split says of a chapter's candidates; the test split is not looked at."""
    table = tutor_records.choose(pool) if chapter == TUTOR_KD else tried(pool, chapter)
    CHOICES.mkdir(exist_ok=True)
    files.write_text(CHOICES / f"{chapter}.csv", table.round(5).to_csv())


def tried(pool: Pool, chapter: str) -> pd.DataFrame:
    """Mean, standard deviation and number of the seeds' accuracies for each of a chapter's candidates."""
    configs, by = CANDIDATES[chapter]
    records = tqdm(pool.imap(runs.run, configs()), chapter, total=len(list(configs())))
    rows = [{name: r.config.get(name) for name in by} | validated(r) for r in records]
    grouped = pd.DataFrame(rows).groupby(list(by), dropna=False)
    return grouped["accuracy"].agg(["mean", "std", "count"]).join(grouped["teacher"].mean())


def validated(record: runs.RunRecord) -> dict[str, float]:
    """The student's accuracy on the validation split, and that of a teacher that was trained along with it."""
    return {
        "accuracy": record.metrics["validation/accuracy"],
        "teacher": record.metrics.get("teacher/validation/accuracy", float("nan")),
    }


def make_teacher(config: RunConfig) -> None:
    """Fine-tune a teacher and store it, in half precision, with its record."""
    record = runs.run(config)
    task = config.glue_task
    tokenizer = models.load_tokenizer(config.student)
    network = models.load(str(record.folder / engine.STUDENT), task, tokenizer)
    engine.save_pretrained(network.half(), tokenizer, TEACHERS / task.name)
    keep(record, "teachers")


def make_record(job: tuple[str, RunConfig]) -> str:
    """Compute one run and keep its record; return a line about it."""
    chapter, config = job
    record = runs.run(config)
    keep(record, chapter)
    shutil.rmtree(record.folder)
    return f"{chapter}  {record.run_id}  {record.seconds:.0f} s  {record.metrics}"


def keep(record: runs.RunRecord, chapter: str) -> None:
    """Write a record to data/runs/<chapter>/<run id>.json, without the folder of this machine."""
    folder = RECORDS / chapter
    folder.mkdir(parents=True, exist_ok=True)
    fields = {name: value for name, value in vars(record).items() if name != "folder"}
    fields["config"] = {**fields["config"], "output_dir": "_runs"}
    files.write_text(folder / f"{record.run_id}.json", json.dumps(fields, indent=1) + "\n")


def make_records(pool: Pool) -> None:
    """Make the teachers and records that are missing."""
    pool.map(make_teacher, [t for t in teachers() if not (TEACHERS / t.task / "config.json").exists()], 1)
    jobs = [
        (chapter, config)
        for chapter, configs in EXPERIMENTS.items()
        for config in configs()
        if not (RECORDS / chapter / f"{config.run_id}.json").exists()
    ]
    for line in pool.imap_unordered(make_record, jobs):
        print(line, flush=True)
    if not tutor_records.has_teacher():
        print(pool.apply(tutor_records.make_teacher), flush=True)
    for module in (influence_records, static_records, loss_records, tutor_records):
        for line in pool.imap_unordered(module.make, module.missing()):
            print(line, flush=True)


def main() -> None:
    """Make what is missing; with --force, everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="compute runs again that have a record")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side")
    parser.add_argument("--choose", nargs="+", choices=[*CANDIDATES, TUTOR_KD], help="try settings, then stop")
    arguments = parser.parse_args()
    if arguments.force:
        for folder in (RECORDS, TEACHERS, WORK):
            shutil.rmtree(folder, ignore_errors=True)
    with get_context("spawn").Pool(arguments.processes) as pool:
        if arguments.choose:
            for chapter in arguments.choose:
                choose(pool, chapter)
        else:
            make_records(pool)
        pool.close()
        pool.join()


if __name__ == "__main__":
    main()
