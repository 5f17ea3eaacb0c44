"""The runs of a study, side by side: on the cores of one machine or on a cluster, by dask.distributed.

A worker computes a run with one thread (or on one device) and hands its record back; this process alone writes it to
the study's folder.  What has a record is not computed again; a run that was interrupted goes on from its checkpoint,
which it finds in `output_dir`, a folder that all workers must see.  So whatever is killed, the same command goes on.
"""

import argparse
import atexit
import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import psutil
import torch
from dask.distributed import CancelledError, Client, Future, LocalCluster, as_completed
from distributed.deploy.spec import close_clusters
from distributed.security import Security

from kdlib import configuration, files, pretraining, progress, runs
from kdlib.configuration import RunConfig
from kdlib.engine import STUDENT
from kdlib.pretraining import PretrainingConfig
from kdlib.records import RunRecord, read_record
from kdlib.study import Cell, NotChosenError, Study, Unit, cell_of, deciding_metric, record_of

MEMORY_OF_A_RUN = 2 * 2**30
"""Bytes that a worker of this machine counts on; BERT-base with a batch of 32 takes more, see --workers."""

Config = RunConfig | PretrainingConfig


@dataclass(frozen=True)
class Job:
    """A unit as a worker needs it: a folder for a measurement, and those that stand for the sources it names."""

    unit: Unit
    folder: Path
    folders: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def config(self) -> Config:
        """The run as it is computed here."""
        return _here(self.unit.config, self.folders)

    @property
    def teachers(self) -> list[RunConfig]:
        """The runs that make the teacher, the first of a chain first."""
        found: list[RunConfig] = []
        following = None if self.unit.measure else self.config
        while isinstance(following, RunConfig) and (following := configuration.teachers_config(following)) is not None:
            found.insert(0, following)
        return found


PLACES = ("source", "corpus", "teacher", "student", "output_dir")
"""Parameters that may be a folder."""


def _here(config: Config, folders: Mapping[str, str]) -> Config:
    """With the folders of this machine in the place of a hub's names, and none that depends on where one is."""
    places = {name: getattr(config, name, None) for name in PLACES}
    found = {name: folders.get(value, value) for name, value in places.items() if value is not None}
    absolute = {name: str(Path(value).expanduser().resolve()) for name, value in found.items()}
    there: dict[str, Any] = {n: v for n, v in absolute.items() if n == "output_dir" or Path(v).is_dir()}
    if isinstance(config, RunConfig) and (named := config.settings.networks):
        assistants = ",".join(folders.get(name, name) for name in named)
        there["settings"] = dataclasses.replace(config.settings, assistants=assistants)
    return dataclasses.replace(config, **there)


@contextlib.contextmanager
def local(count: int | None = None, dashboard: bool = False) -> Iterator[Client]:
    """Workers on this machine, a process and a thread each: as many as it has cores, and memory for.

    What they say to each other is encrypted, so that no other user of the machine can give them work.

    Raises ImportError for a dashboard without bokeh, which draws it.
    """
    if dashboard and importlib.util.find_spec("bokeh") is None:
        raise ImportError("the dashboard needs bokeh: pip install bokeh")
    fitting = max(1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // MEMORY_OF_A_RUN))
    made = {"n_workers": count or fitting, "threads_per_worker": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    made |= {"dashboard_address": f"127.0.0.1:{8787 if dashboard else 0}", "worker_dashboard_address": "127.0.0.1:0"}
    made |= {"security": Security.temporary()}
    try:
        begun = LocalCluster(**made)
    except KeyboardInterrupt:
        atexit.unregister(close_clusters)  # it fails on a cluster that is half there; the workers end with this process
        raise
    with begun as cluster, Client(cluster) as client:
        yield client


@contextlib.contextmanager
def connected(address: str) -> Iterator[Client]:
    """The workers of a scheduler that is running.  Raises OSError if nobody answers."""
    with Client(address, timeout="30s") as client:
        yield client


@contextlib.contextmanager
def queued(system: str, jobs: int) -> Iterator[Client]:
    """Workers that are jobs of a batch system, as dask-jobqueue's own configuration describes them.

    Raises ImportError that says what to install.
    """
    try:
        import dask_jobqueue.local
    except ImportError as error:
        raise ImportError("a batch system needs dask-jobqueue: pip install 'kdlib[cluster]'") from error
    kind = dask_jobqueue.local.LocalCluster if system == "local" else getattr(dask_jobqueue, f"{system.upper()}Cluster")
    with kind() as cluster, Client(cluster) as client:
        cluster.scale(jobs=jobs)
        yield client


def workers(asked: argparse.Namespace) -> AbstractContextManager[Client]:
    """Those that the command line asks for; what goes wrong among them is told by what fails, not by their logs."""
    for name in [*logging.root.manager.loggerDict]:
        if name.startswith(("distributed", "tornado")):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    if asked.scheduler:
        return connected(asked.scheduler)
    if asked.queue:
        return queued(asked.queue, asked.jobs)
    return local(asked.workers, asked.dashboard)


def computed(job: Job, *teachers: object) -> str:
    """On a worker: the record of a unit as JSON; `teachers` only have to be there."""
    _alone()
    unit = job.unit
    if unit.measure is not None:
        found = _measuring(unit.measure)(job)
        if isinstance(found, dict):
            found = {**found, "asked": unit.asked}
        try:
            return json.dumps(found, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{unit.measure} returns what JSON cannot hold: {error}") from error
    record = _run(job.config)
    later: dict[str, float] = {}
    for after in unit.after(student=str(record.folder / STUDENT), output_dir=str(record.folder.parent)):
        later |= {f"{after.task}/{name}": value for name, value in _run(_here(after, job.folders)).metrics.items()}
    # What was asked, in the place of what it is called here.
    names = {name: value for name, value in unit.config.flat.items() if name in PLACES and name != "output_dir"}
    told = {**flat_record(record, run_id=unit.name, names=names, metrics=later), "asked": unit.asked}
    if record.teacher is not None and isinstance(unit.config, RunConfig):
        teacher = configuration.teachers_config(unit.config)
        told["teacher"] = teacher and teacher.asked_id
    return json.dumps(told, indent=1)


def _measuring(measure: str) -> Callable[[Job], Any]:
    """The function that a study names.  Raises ValueError if there is none."""
    module, _, name = measure.partition(":")
    try:
        found: Callable[[Job], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"measure is {measure!r}, and there is no such function: {error}") from error
    return found


def _ready(study: Study, units: Iterable[Unit], trying: bool) -> None:
    """Before hours are spent: raise ValueError or OSError for functions that there are not and for folders of records
    in which nothing can be written."""
    for measure in dict.fromkeys(unit.measure for unit in units if unit.measure is not None):
        _measuring(measure)
    for folder in dict.fromkeys(study.record(unit, trying).parent for unit in units):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def flat_record(
    record: RunRecord,
    run_id: str | None = None,
    names: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """A run's record without this machine's folders: `names` stand in their place, `metrics` are added."""
    here = {"output_dir": "_runs"} | ({"cache_dir": None} if "cache_dir" in record.config else {})
    told = {"run_id": run_id or record.run_id, "metrics": {**record.metrics, **(metrics or {})}}
    told["config"] = {**record.config, **here, **(names or {})}
    return {name: value for name, value in {**vars(record), **told}.items() if name != "folder"}


def fine_tuned(config: RunConfig, *teachers: object) -> str:
    """On a worker: a teacher's run; its name."""
    _alone()
    return _run(config).run_id


def _alone() -> None:
    os.environ["KDLIB_PROGRESS"] = "0"
    torch.set_num_threads(1)


def _run(config: Config) -> RunRecord:
    return pretraining.run(config) if isinstance(config, PretrainingConfig) else runs.run(config)


@dataclass(frozen=True)
class Failed:
    """A unit that has no record, and why."""

    unit: Unit
    error: BaseException

    def __str__(self) -> str:
        return f"{self.unit.name} ({self.unit.arm}, seed {self.unit.seed}): {type(self.error).__name__}: {self.error}"


def missing(study: Study, units: Iterable[Unit], trying: bool = False) -> list[Unit]:
    """Those of the units that have no record, each once though several arms may ask for it, in their order."""
    wanted = {unit.name: unit for unit in units}
    return [unit for unit in wanted.values() if not study.record(unit, trying).exists()]


def conduct(
    study: Study,
    units: Sequence[Unit],
    client: Client,
    folders: Mapping[str, str] | None = None,
    resources: Mapping[str, float] | None = None,
    trying: bool = False,
) -> list[Failed]:
    """Compute the units that have no record, and write their records; what failed, when all others are done.

    A teacher is computed once, before the first of its students.  Runs start in the order of the units.
    `resources` are what each run takes of a worker's, {"GPU": 1} for instance.  What is tried before a study has its
    records elsewhere (`trying`).

    Raises ConnectionError if the scheduler is gone: the same call goes on with what is there.  Raises ValueError or
    OSError, before anything is computed, for a measure that there is not or a folder that takes no records.
    """
    waiting: dict[Future[str], Job] = {}
    teachers: dict[str, Future[str]] = {}
    options: dict[str, Any] = {"pure": False, "resources": dict(resources or {})}
    todo = missing(study, units, trying)
    _ready(study, todo, trying)
    for place, unit in enumerate(todo):
        job = Job(unit, study.work.resolve() / unit.name, folders or {})
        needed: list[Future[str]] = []
        for config in job.teachers:
            name = config.asked_id
            if name not in teachers:
                teachers[name] = client.submit(
                    fine_tuned, config, *needed, key=f"{name}-teaches", priority=-place, **options
                )
            needed = [teachers[name]]
        future = client.submit(computed, job, *needed, key=unit.name, priority=-place, **options)
        waiting[future] = job
    failed = []
    for future in progress.bar(as_completed(waiting), study.name, total=len(waiting)):
        job, error = waiting.pop(future), _error(future, client)
        if error is None:
            _keep(study, job, future.result(), trying)
        else:
            failed.append(Failed(job.unit, error))
    return failed


def _error(future: Future[str], client: Client) -> BaseException | None:
    """What a run failed with.  Raises ConnectionError if nobody knows."""
    try:
        error: BaseException | None = future.exception()
    except CancelledError as cancelled:
        error = cancelled
    if isinstance(error, CancelledError) or client.status != "running":
        raise ConnectionError("the scheduler is gone: the same command goes on with what is missing") from error
    return error


def _keep(study: Study, job: Job, record: str, trying: bool) -> None:
    """Write a record, then remove what the run has left, if nobody wants it."""
    path = study.record(job.unit, trying)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, record + "\n")
    if not study.sheet.keep_folders:
        shutil.rmtree(job.folder if job.unit.measure else job.config.folder, ignore_errors=True)


def choose(study: Study, client: Client, **how: Any) -> list[Failed]:
    """Compute what is tried before the study and write the table of choices, unless something failed."""
    study.check_records(trying=True)
    failed = conduct(study, study.trials, client, trying=True, **how)
    if not failed and study.trials:
        study.choices.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(study.choices, tried(study).to_csv(index=False))
    return failed


def tried(study: Study) -> pd.DataFrame:
    """A row for each setting that was tried: mean, standard deviation, worst seed and number of seeds of the metric.

    For teachers that learn also the mean of the teacher's own metric.
    """
    choosing = study.sheet.choose
    assert choosing is not None
    rows = []
    for unit in study.trials:
        record = read_record(study.record(unit, trying=True))
        metric = deciding_metric(unit, choosing)
        teacher = record.metrics.get(f"teacher/{metric}", math.nan)
        told = {name: record.config.get(name) for name in choosing.by}
        rows.append({**told, "value": record.metrics[metric], "teacher": teacher})
    grouped = pd.DataFrame(rows).groupby(choosing.by, dropna=False)
    table = grouped["value"].agg(
        mean="mean", std="std", count="count", worst="min" if choosing.higher_is_better else "max"
    )
    return table.join(grouped["teacher"].mean()).round(5).reset_index()  # the settings are not rounded


def _expected(study: Study, units: Sequence[Unit], trying: bool = False) -> tuple[float, int]:
    """Seconds that those without a record will take one after the other, and how many are like none that has one.

    Alike are runs of one arm, else of one method and task.
    """
    known: dict[str, list[float]] = {}
    for unit in units:
        path = study.record(unit, trying)
        if path.exists():
            for kind in _kinds(unit):
                known.setdefault(kind, []).append(record_of(path)["seconds"])
    todo = missing(study, units, trying)
    found = [next((median(known[kind]) for kind in _kinds(unit) if kind in known), None) for unit in todo]
    return sum(seconds for seconds in found if seconds is not None), found.count(None)


def _kinds(unit: Unit) -> list[str]:
    return [unit.arm, f"{unit.parameters.get('task')} {unit.parameters.get('method')}"]


def plan(study: Study, choosing: bool = False) -> str:
    """For people: what there is of a study, what is to do and about how long that takes.

    Where trials have to come first, it is about these.
    """
    try:
        units = study.trials if choosing else study.units
        _ = None if choosing else study.pairs  # claims are checked, too
    except NotChosenError:
        return (
            f"{plan(study, choosing=True)}\nThese are what --choose tries; which runs follow is known when it has "
            f"written {study.choices}"
        )
    todo = missing(study, units, choosing)
    rows = [
        {
            "arm": arm,
            "cells": len({str(unit.axes) for unit in mine}),
            "seeds": len({unit.seed for unit in mine}),
            "done": sum(study.record(unit, choosing).exists() for unit in mine),
            "to do": sum(not study.record(unit, choosing).exists() for unit in mine),
        }
        for arm in dict.fromkeys(unit.arm for unit in units)
        for mine in [[unit for unit in units if unit.arm == arm]]
    ]
    lines = [f"{study.name}: {study.sheet.question}".strip(), pd.DataFrame(rows).to_string(index=False)]
    if todo:
        seconds, unlike = _expected(study, units, choosing)
        known = f"about {seconds / 60:.0f} minutes one after the other" if unlike < len(todo) else ""
        guess = f"{unlike} are like no run that has a record" if unlike else ""
        lines.append(f"{len(todo)} runs to do: " + "; ".join(filter(None, (known, guess))))
    return "\n".join(lines)


def to_do(study: Study) -> list[Unit]:
    """What is to be computed next: for cells that no claim is about all their seeds, for others up to the next look.

    Cells whose claims are all decided need no more.
    """
    study.check_records()
    decisions = study.decisions()
    seeds: dict[Cell, set[int]] = {}
    for pair in study.pairs:
        look = decisions[pair].next_look if pair in decisions else study.looks_of(pair)[0]
        for cell in (pair.arm, pair.against):
            seeds.setdefault(cell, set()).update(study.seeds_of(pair)[: look or 0])
    wanted = [unit for unit in study.units if unit.seed in seeds.get(cell_of(unit), [unit.seed])]
    return missing(study, wanted)


def check_contents(study: Study, folders: Mapping[str, str] | None = None) -> None:
    """Raise ValueError, naming the record, if data or networks from outside have changed since it was made."""
    seen = set()
    for unit in study.units:
        if unit.measure is None and cell_of(unit) not in seen and study.record(unit).exists():
            seen.add(cell_of(unit))
            then = read_record(study.record(unit)).contents
            if then and (now := Job(unit, Path(), folders or {}).config.contents) != then:
                raise ValueError(
                    f"{study.record(unit)} was made from {then}, and now there is {now}: move the records away, or "
                    "give the study another folder for them (records)"
                )


def finished(study: Study, choosing: bool = False) -> bool:
    """Whether there is nothing to do."""
    if not choosing:
        return not to_do(study)
    study.check_records(trying=True)
    return not missing(study, study.trials, trying=True) and study.choices.exists()


def carry_out(study: Study, client: Client, **how: Any) -> list[Failed]:
    """Everything that a study asks for, look by look; what failed, after which nothing more is begun.

    Raises what `check_contents` and `conduct` raise.
    """
    check_contents(study, how.get("folders"))
    while wanted := to_do(study):
        if failed := conduct(study, wanted, client, **how):
            return failed
    return []


def verdicts(study: Study) -> str:
    """For people: what the records say of the claims."""
    if not study.pairs:
        return ""
    table = study.verdicts()
    waiting = len(study.pairs) - len(table)
    shown = table[["mean", "low", "high", "seeds", "p", "holm", "alone", "verdict"]].round(4).to_string()
    return (shown if len(table) else "") + (f"\n{waiting} claims wait for their first look" if waiting else "")
