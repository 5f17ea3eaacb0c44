"""A study: one small file that says which runs, with which seeds, and what they are to decide.

    question: Does a teacher that learns teach better than one that stays as it is?
    common: {teacher: tiny-2x64, student: tiny-2x32, epochs: 6}
    rules:
      - {where: {task: mini-sst2}, learning_rate: 4.0e-3}
    arms:
      fixed: {method: kd, task: [mini-sst2, mini-mnli]}
      meta: {like: fixed, method: metadistil, teaching_rate: chosen}
    seeds: 0-29
    looks: [5, 10, 20, 30]
    claims:
      - {arm: meta, against: fixed, where: {task: mini-mnli}, metric: test/accuracy, margin: 0.005}

A list in an arm is an axis: the arm has a *cell* for each combination.  The parameters of a cell are those of `common`,
as far as its method reads them, then those of every rule that holds for it, then its own.  `seed` and `seed + 50` are
numbers that follow the seed.  A unit is a cell with a seed: usually a run, as in chapters 11 and 12, or a run and what
comes after it (`then`), or a function of one's own (`measure`).

`kdlib.sheet` has the form of such a file, this room what it asks for and what the records say of it; `kdlib.cluster`
computes them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from kdlib import pretraining, runs
from kdlib.compare import Decision, Plan, decide, family
from kdlib.configuration import RunConfig
from kdlib.engine import STUDENT
from kdlib.pretraining import PretrainingConfig
from kdlib.records import NOT_IDENTITY, RunRecord, read_record
from kdlib.settings import ConfigurationError, nearest
from kdlib.sheet import (
    CHOSEN,
    Choosing,
    Claim,
    agree,
    arm_of,
    cells_of,
    claims_of,
    parameters_of,
    read,
    seeds_in,
    with_seed,
)

LONGEST_NAME = 200
"""Bytes of a record's name; file systems take 255, and a file that is being written has a longer one."""


class NotChosenError(ConfigurationError):
    """A parameter of the study is to be chosen, and its trials have not been run yet; nothing else is wrong."""


@dataclass(frozen=True)
class Unit:
    """One thing that is computed: a cell of a study, with a seed."""

    arm: str
    seed: int
    axes: dict[str, Any]
    """the values that tell the cell from the others of its arm"""
    parameters: dict[str, Any]
    then: tuple[dict[str, Any], ...] = ()
    """runs on tasks whose student is the one that this run leaves"""
    measure: str | None = None
    """module:function(job) that returns a record of its own form, in place of a run"""

    @cached_property
    def config(self) -> RunConfig | PretrainingConfig:
        """The run's configuration.  Raises ConfigurationError for parameters that are wrong."""
        kind = pretraining if pretraining.is_text(self.parameters) else runs
        return kind.configure(**self.parameters)

    def after(self, student: str = STUDENT, **here: Any) -> list[RunConfig]:
        """The runs that come after it, with the folder of its student and what else is known only then.

        Seed and device are its own.
        """
        shared: dict[str, Any] = {n: v for n, v in self.parameters.items() if n in ("seed", "device")}
        shared["method"] = "fine_tune"
        return [runs.configure(**{**shared, **settings, "student": student, **here}) for settings in self.then]

    @property
    def asked(self) -> dict[str, Any]:
        """What its record cannot tell by its name, as the record keeps it.

        Of what comes after a run all settings that count; of a measurement what the study says.
        """
        if self.measure is None:
            after = [{n: v for n, v in one.identity.items() if v is not None} for one in self.after()]
            return {"then": json.loads(json.dumps(after))} if after else {}
        own = {name: value for name, value in self.parameters.items() if name not in NOT_IDENTITY}
        return {"measure": self.measure, **own, **({"then": list(self.then)} if self.then else {})}

    @property
    def name(self) -> str:
        """The name of its record: the run's own, or arm and seed where there is more to it than one run."""
        if self.measure is None and not self.then:
            return self.config.asked_id
        told = [self.arm, *(f"{name}-{value}" for name, value in self.axes.items()), f"seed{self.seed}"]
        return "-".join(re.sub(r"[^\w.]+", "-", word) for word in told)


Cell: TypeAlias = tuple[str, tuple[tuple[str, Any], ...]]
"""An arm and the values of its axes."""


def cell_of(unit: Unit) -> Cell:
    """Which cell a unit is of."""
    return unit.arm, tuple(unit.axes.items())


@dataclass(frozen=True)
class Pair:
    """Two cells that a claim compares."""

    claim: Claim
    arm: Cell
    against: Cell

    def __str__(self) -> str:
        ours, theirs = dict(self.arm[1]), dict(self.against[1])
        shared = ", ".join(f"{value}" for name, value in ours.items() if theirs.get(name) == value)
        names = [
            " ".join([cell[0], *(str(value) for name, value in cell[1] if other.get(name) != value)])
            for cell, other in ((self.arm, theirs), (self.against, ours))
        ]
        return f"{' − '.join(names)}, {self.claim.metric}" + (f", {shared}" if shared else "")

    def __hash__(self) -> int:
        return hash((str(self), self.arm, self.against))


class Study:
    """A study file, read and checked as a whole.

    Raises ConfigurationError that lists the problems of all arms, with the file's name; nothing is computed.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.name = self.path.stem
        self.sheet = read(self.path)
        self.records = self._beside(self.sheet.records or self.name)
        self.choices = self._beside(self.sheet.choices) if self.sheet.choices else self.records / "choices.csv"
        self.seeds = seeds_in(self.sheet.seeds)
        self.claims = claims_of(self.sheet)

    def _beside(self, name: str) -> Path:
        return (self.path.parent / Path(name).expanduser()).resolve()

    @cached_property
    def units(self) -> list[Unit]:
        """Everything that the file asks for, seed by seed, so that what is there at any moment can be compared.

        Raises NotChosenError where trials have to come first, ConfigurationError for what is wrong.
        """
        return _by_seed(self._units(self.sheet.arms, self.seeds, self._chosen))

    @cached_property
    def trials(self) -> list[Unit]:
        """What is tried before."""
        choosing = self.sheet.choose
        if choosing is None:
            return []
        found = _by_seed(self._units(choosing.arms, seeds_in(choosing.seeds), None))
        if problems := _mixed(found, choosing):
            raise ConfigurationError(f"choose of the study {self.path} is wrong:\n  - {problems}")
        return found

    def _units(self, arms: Mapping[str, Any], seeds: list[int], table: pd.DataFrame | None) -> list[Unit]:
        found, problems, waiting = [], [], 0
        for arm in arms:
            try:
                notes, own = arm_of(arm, arms, self.sheet.arms)
                mine = seeds_in(notes["seeds"]) if "seeds" in notes else seeds
                for axes, point in cells_of(own):
                    parameters = self._parameters(point, table)
                    for seed in mine:
                        found.append(_unit(arm, seed, axes, parameters, notes))
            except ValueError as error:
                problems.append(f"arm {arm!r}: {error}")
                waiting += isinstance(error, NotChosenError)
        problems += [f"arm {unit.arm!r}{_at(unit)}: {said}" for unit, said in _wrong(found)]
        problems += [] if problems else _alike(found)
        if problems:
            kind, what = (NotChosenError, "waits") if waiting == len(problems) else (ConfigurationError, "is wrong")
            raise kind(f"the study {self.path} {what}:\n" + "\n".join(f"  - {p}" for p in problems))
        return found

    def _parameters(self, point: Mapping[str, Any], table: pd.DataFrame | None) -> dict[str, Any]:
        """Of a cell, with what did best in the place of what is to be chosen."""
        found = parameters_of(self.sheet, point)
        for name in [name for name, value in found.items() if value == CHOSEN]:
            found[name] = self._best(name, found, table)
        return found

    @cached_property
    def _chosen(self) -> pd.DataFrame:
        if self.sheet.choose is None or not self.choices.exists():
            return pd.DataFrame()
        return pd.read_csv(self.choices)

    def _best(self, name: str, found: Mapping[str, Any], table: pd.DataFrame | None) -> Any:
        """The value of `name` that did best among the trials that agree with this cell in everything else."""
        choosing = self.sheet.choose
        if choosing is None or name not in choosing.by:
            raise ValueError(f"{name} is {CHOSEN!r}, but no trial tells its values apart: name it in choose: by")
        if table is None:
            raise ValueError(f"{name} is {CHOSEN!r} in a trial: a trial gives the values that are tried")
        if table.empty:
            raise NotChosenError(
                f"{name} is {CHOSEN!r}, and there is no {self.choices} yet: run the study with --choose"
            )
        told = {one: found[one] for one in choosing.by if one != name and found.get(one, CHOSEN) != CHOSEN}
        rows = table[[all(row.get(one) == value for one, value in told.items()) for _, row in table.iterrows()]]
        rows = rows.dropna(subset=[name])
        if rows.empty:
            raise ValueError(f"{name} is {CHOSEN!r}, but {self.choices} has no trial with {told}: add one to choose")
        if len(rows) > rows[name].nunique():
            unlike = [one for one in choosing.by if one not in {name, *told} and rows[one].nunique(dropna=False) > 1]
            raise ValueError(
                f"{name} is {CHOSEN!r}, but {self.choices} has several trials for one value, which differ in "
                f"{', '.join(unlike) or 'nothing'}: say in the arm which"
            )
        score = rows.groupby(name)["mean" if choosing.rule == "best mean" else "worst"].mean()
        best = score.idxmax() if choosing.higher_is_better else score.idxmin()
        return best.item() if hasattr(best, "item") else best

    def record(self, unit: Unit, trying: bool = False) -> Path:
        """Where the record of a unit is; those of trials are with the runs, apart from what the study reports."""
        return (self.work / "trials" if trying else self.records) / f"{unit.name}.json"

    def check_records(self, trying: bool = False) -> None:
        """Raise ValueError, naming the record, if one of more or something else than a run was made by another file.

        The record of a run alone has a name that says what it was made from.  `trying` looks at what is tried before.
        """
        for unit in self.trials if trying else self.units:
            path = self.record(unit, trying)
            if (unit.measure is not None or unit.then) and path.exists():
                problem = (_run_problem if unit.measure is None else _measurement_problem)(unit, record_of(path))
                if problem:
                    raise ValueError(f"{path} was {problem}: move the record away, or give the arm another name")

    @property
    def work(self) -> Path:
        """Where trials have their records, and measurements their folders: beside the runs."""
        return Path(self.sheet.common.get("output_dir", "_runs")).expanduser() / self.name

    @cached_property
    def pairs(self) -> list[Pair]:
        """The pairs of cells that the claims compare: those that agree in all axes that both arms have.

        Raises ConfigurationError for a claim that compares nothing, or one cell with several.
        """
        cells = list(dict.fromkeys(cell_of(unit) for unit in self.units))
        found = []
        for claim in self.claims:
            ours, theirs = (
                [cell for cell in cells if cell[0] == name and agree(dict(cell[1]), claim.where or {})]
                for name in (claim.arm, claim.against)
            )
            axes = {name for arm, place in cells if arm in (claim.arm, claim.against) for name, _ in place}
            if strange := [name for name in claim.where or {} if name not in axes]:
                raise ConfigurationError(
                    f"{self.path}: the claim {claim.arm!r} against {claim.against!r} says where {strange[0]} is what, "
                    f"which is no axis of these arms{nearest(strange[0], axes)}"
                )
            pairs = [(a, b) for a in ours for b in theirs if agree(dict(a[1]), dict(b[1]))]
            if not pairs or len({a for a, _ in pairs}) < len(pairs):
                what = "nothing" if not pairs else "one cell with several: say in `where` which"
                raise ConfigurationError(
                    f"{self.path}: the claim {claim.arm!r} against {claim.against!r} compares {what}"
                )
            found += [Pair(claim, *pair) for pair in pairs]
        for pair in found:
            self._check_pair(pair)
        counts = Counter((frozenset([str(pair.arm), str(pair.against)]), pair.claim.metric) for pair in found)
        if any(count > 1 for count in counts.values()):
            raise ConfigurationError(f"{self.path}: two claims compare the same cells: leave one of them out")
        return found

    def _check_pair(self, pair: Pair) -> None:
        """Raise ConfigurationError for a claim that no record could decide."""
        if len(seeds := self.seeds_of(pair)) < 2:
            raise ConfigurationError(
                f"{self.path}: the claim {pair} has {len(seeds)} seeds that both cells have; give them two at least"
            )
        units = [next(u for u in self.units if cell_of(u) == cell) for cell in (pair.arm, pair.against)]
        if units[0].name == units[1].name:
            raise ConfigurationError(f"{self.path}: the claim {pair} compares a run with itself")
        for unit in units:
            known = _metrics_of(unit)
            if known and pair.claim.metric.rpartition("/")[2] not in known:
                examples = [f"test/{name}" for name in known]
                raise ConfigurationError(
                    f"{self.path}: the claim {pair} is about {pair.claim.metric!r}, which runs of arm {unit.arm!r} do "
                    f"not have; expected {' or '.join(examples)}, or another split"
                )

    def seeds_of(self, pair: Pair) -> list[int]:
        """The seeds that both cells of a pair have."""
        ours, theirs = (
            {unit.seed for unit in self.units if cell_of(unit) == cell} for cell in (pair.arm, pair.against)
        )
        return sorted(ours & theirs)

    def looks_of(self, pair: Pair) -> tuple[int, ...]:
        """After how many of these seeds the claim is looked at."""
        count = len(self.seeds_of(pair))
        return (*(look for look in self.sheet.looks or () if look < count), count)

    def decisions(self) -> dict[Pair, Decision]:
        """What the records that are there say of the claims; those that wait for their first look are left out."""
        found = {}
        for pair in self.pairs:
            seeds, looks = self.seeds_of(pair), self.looks_of(pair)
            plan = Plan(margin=pair.claim.margin, looks=looks, lower_is_better=pair.claim.lower_is_better)
            values = [self._values(cell, pair.claim.metric, seeds) for cell in (pair.arm, pair.against)]
            there = [seed for seed in seeds if all(seed in one for one in values)]
            whole = next((n for n, seed in enumerate(seeds) if seed not in there), len(seeds))
            if whole >= looks[0]:
                ours, theirs = ({seed: one[seed] for seed in seeds[:whole]} for one in values)
                found[pair] = decide(plan, ours, theirs)
        return found

    def verdicts(self) -> pd.DataFrame:
        """The claims as a family, a row for each: see `compare.family`; those that wait have no row."""
        return family({str(pair): decision for pair, decision in self.decisions().items()})

    def _values(self, cell: Cell, metric: str, seeds: Iterable[int]) -> dict[int, float]:
        found = {}
        for unit in self.units:
            path = self.record(unit)
            if cell_of(unit) == cell and unit.seed in seeds and path.exists():
                found[unit.seed] = _metric(record_of(path), metric, path)
        return found

    def results(self) -> dict[tuple[str, tuple[tuple[str, Any], ...], int], RunRecord]:
        """The records of runs that are there, by arm, axes and seed."""
        return {
            (unit.arm, tuple(unit.axes.items()), unit.seed): read_record(self.record(unit))
            for unit in self.units
            if unit.measure is None and self.record(unit).exists()
        }

    def table(self, *metrics: str) -> pd.DataFrame:
        """A row for each finished run: arm, the axes of all arms, seed, and a column for each metric.

        Raises ValueError that names the metrics there are, where a record has not the one asked for.
        """
        rows = []
        for (arm, axes, seed), record in self.results().items():
            missing = [metric for metric in metrics if metric not in record.metrics]
            if missing:
                raise ValueError(f"{record.run_id} has no {missing[0]}: it has {', '.join(record.metrics)}")
            rows.append(
                {"arm": arm, **dict(axes), "seed": seed, **{metric: record.metrics[metric] for metric in metrics}}
            )
        axes_of_all = dict.fromkeys(name for unit in self.units for name in unit.axes)
        return pd.DataFrame(rows, columns=["arm", *axes_of_all, "seed", *metrics])


def _alike(units: Sequence[Unit]) -> list[str]:
    """What is wrong with the names of records: a cell that is there twice, two that share a record, a long one."""
    problems, owners = [], dict[str, Cell]()
    for unit in units:
        ours = unit.measure is not None or bool(unit.then)
        if ours and len(unit.name.encode()) > LONGEST_NAME:
            problems.append(
                f"arm {unit.arm!r}: its record's name has more than {LONGEST_NAME} bytes: shorten the arm's"
            )
        elif ours and owners.setdefault(unit.name, cell_of(unit)) != cell_of(unit):
            problems.append(
                f"arm {unit.arm!r}{_at(unit)} and arm {owners[unit.name][0]!r} would share {unit.name}.json"
            )
    counts = Counter((str(cell_of(unit)), unit.seed) for unit in units)
    twice = dict.fromkeys(cell_of(unit) for unit in units if counts[str(cell_of(unit)), unit.seed] > 1)
    problems += [f"arm {arm!r} has the cell {dict(place)} twice" for arm, place in twice]
    return list(dict.fromkeys(problems))


def _mixed(trials: Sequence[Unit], choosing: Choosing) -> str:
    """What is wrong with how trials are told apart and compared: the first problem, or nothing."""
    cells: dict[tuple[str, ...], Unit] = {}
    for unit in trials:
        if unit.measure is not None:
            continue
        told = unit.config.flat
        if strange := [name for name in choosing.by if name not in told]:
            return f"by names {strange[0]!r}, which is no parameter of arm {unit.arm!r}{nearest(strange[0], told)}"
        known = _metrics_of(unit)
        if choosing.metric is None and not known:
            return f"metric is missing: arm {unit.arm!r} is no run on a task, which would have one of its own"
        if choosing.metric is not None and known and choosing.metric.rpartition("/")[2] not in known:
            return f"metric is {choosing.metric!r}, which arm {unit.arm!r} does not have; it has {', '.join(known)}"
        other = cells.setdefault((str(unit.seed), *(repr(told[name]) for name in choosing.by)), unit)
        if other.name != unit.name:
            before = other.config.flat
            unlike = [n for n in told if n not in NOT_IDENTITY and told[n] != before.get(n)]
            return (
                f"by {', '.join(choosing.by)} does not tell trials apart that differ in {', '.join(unlike)}: add "
                f"{'one of them' if len(unlike) > 1 else 'it'}"
            )
    return ""


def _metrics_of(unit: Unit) -> tuple[str, ...]:
    """The last parts of the names of a run's metrics; none where only the record knows."""
    if unit.measure is not None or not isinstance(unit.config, RunConfig):
        return ()
    return tuple(dict.fromkeys(name for one in (unit.config, *unit.after()) for name in one.glue_task.metrics))


def deciding_metric(unit: Unit, choosing: Choosing) -> str:
    """The name of the metric by which a trial is compared with others."""
    if choosing.metric is not None:
        return choosing.metric
    assert isinstance(unit.config, RunConfig)
    task = unit.config.glue_task
    return f"{task.evaluation_splits[0]}/{task.metrics[0]}"


def _measurement_problem(unit: Unit, record: Mapping[str, Any]) -> str:
    """What a measurement was asked that is not asked now, or nothing."""
    then, now = record.get("asked", unit.asked), unit.asked
    return "" if then == now else f"measured with {then}, and the study now says {now}"


def _run_problem(unit: Unit, record: Mapping[str, Any]) -> str:
    """What made a run and those after it that is not asked now, or nothing."""
    now = {name: value for name, value in unit.config.flat.items() if name not in NOT_IDENTITY}
    if changed := _changed({n: v for n, v in record.get("config", {}).items() if n in now}, now):
        return f"made with {changed}"
    then, wanted = _by_task(record.get("asked", {})), _by_task(unit.asked)
    tasks = list(then or _tasks(record))
    if {*tasks} != {*wanted}:
        return f"made with then on {', '.join(tasks) or 'nothing'}, and the study now says {', '.join(wanted)}"
    for task, settings in then.items():
        both = dict.fromkeys([*wanted[task], *settings])
        if changed := _changed({**both, **settings}, {**both, **wanted[task]}):
            return f"made with then on {task} with {changed}"
    return ""


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first of the values that are not the same any more."""
    told = [f"{n} = {value!r}, and the study now says {now[n]!r}" for n, value in then.items() if now[n] != value]
    return told[0] if told else ""


def _by_task(asked: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {settings["task"]: settings for settings in asked.get("then", ())}


def _tasks(record: Mapping[str, Any]) -> list[str]:
    """The tasks after a run by the names of its metrics, for records that do not say what they were asked."""
    parts = [name.split("/") for name in record.get("metrics", {})]
    return [name for name in dict.fromkeys(part[0] for part in parts if len(part) > 2) if name != "teacher"]


def _metric(record: Mapping[str, Any], metric: str, path: Path) -> float:
    """A number of a record, by its name among the metrics, or, in a record of another form, by its path in it."""
    found: Any = record.get("metrics", {}).get(metric)
    if found is None:
        found = record
        for name in metric.split("/"):
            found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, (int, float)):
        raise ValueError(f"{path} has no {metric!r}: it has {', '.join(record.get('metrics', record))}")
    return float(found)


def record_of(path: Path) -> dict[str, Any]:
    """A record of any form.  Raises ValueError that names the file if it is damaged."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it is computed again") from error
    return found


def _unit(arm: str, seed: int, axes: dict[str, Any], parameters: Mapping[str, Any], notes: Mapping[str, Any]) -> Unit:
    own = {name: with_seed(value, seed) for name, value in parameters.items()}
    then = tuple({name: with_seed(value, seed) for name, value in one.items()} for one in notes.get("then", ()))
    return Unit(arm, seed, axes, {**own, "seed": seed}, then, notes.get("measure"))


def _by_seed(units: Iterable[Unit]) -> list[Unit]:
    return sorted(units, key=lambda unit: unit.seed)  # stable: the order of the file within a seed


def _wrong(units: Iterable[Unit]) -> Iterator[tuple[Unit, str]]:
    """What is wrong with the cells, each said once: their first seed stands for all."""
    seen: set[str] = set()
    for unit in units:
        cell = f"{unit.arm} {unit.axes}"
        if cell not in seen:
            seen.add(cell)
            try:
                _ = None if unit.measure else (unit.config, unit.after())
            except ValueError as error:
                yield unit, str(error).replace("\n", "\n    ")


def _at(unit: Unit) -> str:
    return "".join(f", {name} {value}" for name, value in unit.axes.items())
