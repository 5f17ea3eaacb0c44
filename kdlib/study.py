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

This room reads such files; `kdlib.cluster` computes what they ask for.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pandas as pd
import yaml

from kdlib import pretraining, runs
from kdlib.compare import Decision, Plan, decide, family
from kdlib.configuration import RunConfig
from kdlib.pretraining import PretrainingConfig
from kdlib.records import NOT_IDENTITY, RunRecord, read_record
from kdlib.settings import ConfigurationError, Name, Positive, Size, checked, names, nearest, settings

CHOSEN = "chosen"
"""The value of a parameter that the table of choices decides."""
NOTES = ("like", "seeds", "then", "measure", "note")
"""What an arm says besides parameters."""
LONGEST_NAME = 200
"""Bytes of a record's name; file systems take 255, and a file that is being written has a longer one."""


@settings
class Claim:
    """Two cells of a study that are compared, seed by seed."""

    arm: Name
    against: Name
    where: dict[str, Any] | None = None
    """which cells of the arms, by the values of their axes; without it, all that both have"""
    metric: Name
    """as in a record: "test/accuracy", "validation/loss", …"""
    margin: Positive
    """differences below it count as none"""
    lower_is_better: bool = False


@settings
class Choosing:
    """Settings that are tried before anything else, with seeds of their own."""

    arms: dict[str, dict[str, Any]]
    """what is tried, in the form of the study's arms"""
    seeds: str | int
    by: list[str]
    """the parameters that tell the trials apart: the columns of the table"""
    metric: Name = "validation/accuracy"
    rule: Literal["best mean", "best worst seed"] = "best worst seed"
    higher_is_better: bool = True


@settings
class Sheet:
    """A study file, as it is written."""

    question: str = ""
    """what is asked, for readers"""
    common: dict[str, Any]
    """parameters of all runs"""
    rules: list[dict[str, Any]] | None = None
    """more parameters, each with `where`, the values of others for which they hold; later ones go first"""
    arms: dict[str, dict[str, Any]]
    """what is compared, by names of one's own"""
    seeds: str | int
    """a range such as 0-9, or one seed"""
    looks: list[Size] | None = None
    """after how many seeds the claims are looked at; None: once, after all"""
    choose: Choosing | None = None
    claims: list[dict[str, Any]] | None = None
    records: Name | None = None
    """the folder of the records, from the file's own; None: the file's name without its ending"""
    keep_folders: bool = True
    """whether networks and predictions of finished runs stay where they are"""
    choices: Name | None = None
    """the table of what was tried; None: choices.csv among the records"""


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

    def after(self, **here: Any) -> list[RunConfig]:
        """The runs that come after it, with `here` for what is known only then; seed and device are its own."""
        shared: dict[str, Any] = {n: v for n, v in self.parameters.items() if n in ("seed", "device")}
        shared["method"] = "fine_tune"
        return [runs.configure(**{**shared, **settings, **here}) for settings in self.then]

    @property
    def asked(self) -> dict[str, Any]:
        """What a measurement is asked, as its record keeps it."""
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
        self.sheet = _sheet(self.path)
        self.records = self._beside(self.sheet.records or self.name)
        self.choices = self._beside(self.sheet.choices) if self.sheet.choices else self.records / "choices.csv"
        self.seeds = _seeds(self.sheet.seeds)
        _check(self.sheet, self.path)
        self.claims = [_claim(one, self.sheet) for one in self.sheet.claims or []]

    def _beside(self, name: str) -> Path:
        return (self.path.parent / Path(name).expanduser()).resolve()

    @cached_property
    def units(self) -> list[Unit]:
        """Everything that the file asks for, seed by seed, so that what is there at any moment can be compared."""
        return _by_seed(self._units(self.sheet.arms, self.seeds, self._chosen))

    @cached_property
    def trials(self) -> list[Unit]:
        """What is tried before."""
        choosing = self.sheet.choose
        if choosing is None:
            return []
        found = _by_seed(self._units(choosing.arms, _seeds(choosing.seeds), None))
        if problems := _mixed(found, choosing):
            raise ConfigurationError(f"choose of the study {self.path} is wrong:\n  - {problems}")
        return found

    def _units(self, arms: Mapping[str, Any], seeds: list[int], table: pd.DataFrame | None) -> list[Unit]:
        found, problems = [], []
        for arm in arms:
            try:
                notes, own = _apart(_with_its_model(arm, arms, self.sheet.arms))
                _check_arm(notes, own)
                mine = _seeds(notes["seeds"]) if "seeds" in notes else seeds
                for axes, point in _cells(own):
                    parameters = self._parameters(point, table)
                    for seed in mine:
                        found.append(_unit(arm, seed, axes, parameters, notes))
            except ValueError as error:
                problems.append(f"arm {arm!r}: {error}")
        problems += [f"arm {unit.arm!r}{_at(unit)}: {said}" for unit, said in _wrong(found)]
        problems += [] if problems else _alike(found)
        if problems:
            raise ConfigurationError(f"the study {self.path} is wrong:\n" + "\n".join(f"  - {p}" for p in problems))
        return found

    def _parameters(self, point: Mapping[str, Any], table: pd.DataFrame | None) -> dict[str, Any]:
        """Of a cell: common, rules, its own; what is to be chosen is looked up last."""
        found = {**self.sheet.common, **point}
        ruled: dict[str, Any] = {}
        for rule in self.sheet.rules or ():
            if all(_is(found.get(name), value) for name, value in rule["where"].items()):
                ruled |= {name: value for name, value in rule.items() if name != "where"}
                found = {**self.sheet.common, **ruled, **point}
        reading = pretraining.readable if pretraining.is_text(found) else runs.readable
        read = reading(found, found.get("method", ""))
        found = {**{name: value for name, value in self.sheet.common.items() if name in read}, **ruled, **point}
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
            raise ValueError(f"{name} is {CHOSEN!r}, and there is no {self.choices} yet: run the study with --choose")
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

    def check_records(self) -> None:
        """Raise ValueError, naming the record, if one of a run and what comes after it was made by another file.

        The record of a run alone has a name that says what it was made from.
        """
        for unit in self.units:
            path = self.record(unit)
            if unit.measure is not None and path.exists() and record_of(path).get("asked", unit.asked) != unit.asked:
                raise ValueError(
                    f"{path} was measured with {record_of(path)['asked']}, and the study now says {unit.asked}: "
                    "move the record away, or give the arm another name"
                )
            if unit.then and unit.measure is None and path.exists():
                then = record_of(path).get("config", {})
                now = {name: value for name, value in unit.config.flat.items() if name not in NOT_IDENTITY}
                if changed := [name for name, value in now.items() if name in then and then[name] != value]:
                    raise ValueError(
                        f"{path} was made with {changed[0]} = {then[changed[0]]!r}, and the study now says "
                        f"{now[changed[0]]!r}: move the record away, or give the arm another name"
                    )

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
                [cell for cell in cells if cell[0] == name and _agree(dict(cell[1]), claim.where or {})]
                for name in (claim.arm, claim.against)
            )
            axes = {name for arm, place in cells if arm in (claim.arm, claim.against) for name, _ in place}
            if strange := [name for name in claim.where or {} if name not in axes]:
                raise ConfigurationError(
                    f"{self.path}: the claim {claim.arm!r} against {claim.against!r} says where {strange[0]} is what, "
                    f"which is no axis of these arms{nearest(strange[0], axes)}"
                )
            pairs = [(a, b) for a in ours for b in theirs if _agree(dict(a[1]), dict(b[1]))]
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


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no annotations
    """YAML in which a key stands once, and 1e-3 is the number 1.0e-3."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+$"), [*"+-0123456789"]
)


def _sheet(path: Path) -> Sheet:
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    if not isinstance(given, dict):
        raise ConfigurationError(f"{path} should hold a study: common, arms, seeds")
    arms = given.get("arms")
    if isinstance(arms, dict) and (odd := [name for name in arms if not isinstance(name, str)]):
        raise ConfigurationError(f"{path}: an arm is called {odd[0]!r}, which is no text: put its name in quotes")
    return _made(Sheet, {**given, **_choosing(path, given)}, f"the study {path}")


def _check(sheet: Sheet, path: Path) -> None:
    rules = [rule for rule in sheet.rules or () if not isinstance(rule.get("where"), dict)]
    problems = [f"a rule needs `where`: {rule}" for rule in rules]
    problems += [
        f"{place} says seed: {one['seed']!r}, which a study gives: see seeds"
        for place, one in [("common", sheet.common), *(("a rule", rule) for rule in sheet.rules or ())]
        if "seed" in one
    ]
    problems += [f"{place} are none" for place, arms in _places(sheet) if not arms]
    if idle := [
        rule["where"] for rule in sheet.rules or () if isinstance(rule.get("where"), dict) and _idle(rule, sheet)
    ]:
        problems.append(f"a rule where {idle[0]} holds for no arm: it does nothing")
    if sheet.choose is not None and (both := {*_seeds(sheet.choose.seeds)} & {*_seeds(sheet.seeds)}):
        problems.append(
            f"choose has seed {min(both)}, which is one of the study's: what is chosen by it looks too good"
        )
    looks = sheet.looks or []
    if any(look < 2 for look in looks) or looks != sorted(set(looks)):
        problems.append(f"looks are {looks}; expected increasing numbers of seeds, from two on")
    if problems:
        raise ConfigurationError(f"the study {path} is wrong:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _idle(rule: Mapping[str, Any], sheet: Sheet) -> bool:
    """Whether no arm can have what a rule asks: a parameter that nobody gives, or a value."""
    given: list[Mapping[str, Any]] = [sheet.common, *(sheet.rules or ())]
    given += [arm for _, arms in _places(sheet) for arm in arms.values()]
    for name, wanted in rule["where"].items():
        values = [one[name] for one in given if name in one]
        found = [value for one in values for value in (one if isinstance(one, list) else [one])]
        if not any(_is(value, wanted) for value in found):
            return True
    return False


def _places(sheet: Sheet) -> list[tuple[str, Mapping[str, Any]]]:
    return [("arms", sheet.arms)] + ([("arms of choose", sheet.choose.arms)] if sheet.choose else [])


def _check_arm(notes: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError for what an arm says in a form that nobody reads."""
    then, measure = notes.get("then", []), notes.get("measure")
    if not isinstance(then, list) or not all(isinstance(one, dict) for one in then):
        raise ValueError(f"then is {then!r}; expected a list of runs, such as [{{task: mini-mnli}}]")
    if twice := [task for task, count in Counter(str(one.get("task")) for one in then).items() if count > 1]:
        raise ValueError(f"then has the task {twice[0]} twice: its numbers would stand in one place")
    if measure is not None and not (isinstance(measure, str) and re.fullmatch(r"[\w.]+:\w+", measure)):
        raise ValueError(f"measure is {measure!r}; expected module:function")
    if "seed" in own:
        raise ValueError(f"seed is {own['seed']!r}, which a study gives: see seeds")
    for name, value in own.items():
        if value == []:
            raise ValueError(f"{name} is an empty list: give it a value, or leave it out")
        if isinstance(value, dict) or (name == "method" and not isinstance(value, (str, list))):
            raise ValueError(f"{name} is {value!r}; expected a value, or a list of values")


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
        if known and choosing.metric.rpartition("/")[2] not in known:
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


def _choosing(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given.get("choose"), dict):
        return {}
    return {"choose": _made(Choosing, given["choose"], f"choose of the study {path}")}


def _made(kind: type, given: Mapping[str, Any], what: str) -> Any:
    """An object of a settings class; every problem in one message."""
    valid = names(kind)
    problems = [f"unknown field {name!r}{nearest(str(name), valid)}" for name in given if name not in valid]
    one, wrong = checked(kind, {name: value for name, value in given.items() if name in valid})
    if problems := problems + wrong:
        raise ConfigurationError(f"{what} is wrong:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return one


def _seeds(given: str | int) -> list[int]:
    """A range "0-9" or one seed."""
    found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(given))
    seeds = [] if found is None else [*range(int(found[1]), int(found[2] or found[1]) + 1)]
    if not seeds:
        raise ConfigurationError(f"seeds are {given!r}; expected a range such as 0-9, or one number")
    return seeds


def _claim(given: Mapping[str, Any], sheet: Sheet) -> Claim:
    claim = _made(Claim, given, f"the claim {dict(given)}")
    for name in (claim.arm, claim.against):
        if name not in sheet.arms:
            raise ConfigurationError(f"a claim is about arm {name!r}, which there is not{nearest(name, sheet.arms)}")
    return claim


def _with_its_model(name: str, *places: Mapping[str, Any]) -> dict[str, Any]:
    """An arm with what it takes from the one that it is `like`, and so on; a trial may be like the arm of its name."""
    found: dict[str, Any] = {}
    seen: list[int] = []
    path, following = [name], name
    while following is not None:
        if not isinstance(following, str):
            raise ValueError(f"is like {following!r}; expected the name of an arm")
        named = [arms[following] for arms in places if following in arms]
        own = next((arm for arm in named if id(arm) not in seen), None)
        if own is None and named:
            raise ValueError(f"is like itself: {' → '.join(path)}")
        if own is None:
            raise ValueError(f"is like {following!r}, which is no arm{nearest(following, places[-1])}")
        seen.append(id(own))
        found = {**own, **found}
        following = own.get("like")
        path.append(following)
    return found


def _apart(arm: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an arm says besides parameters, and its parameters."""
    return {n: v for n, v in arm.items() if n in NOTES}, {n: v for n, v in arm.items() if n not in NOTES}


def _agree(ours: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether the values of axes are those that are wanted, as far as there are such axes."""
    return all(_is(value, wanted[name]) for name, value in ours.items() if name in wanted)


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


def _is(value: Any, wanted: Any) -> bool:
    """Whether a parameter has the value that a rule names, or one of several."""
    return value in wanted if isinstance(wanted, list) else value == wanted


def _cells(parameters: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The combinations of an arm's lists: the values on its axes, and all of its parameters."""
    axes = {name: value for name, value in parameters.items() if isinstance(value, list)}
    for values in itertools.product(*axes.values()):
        place = dict(zip(axes, values, strict=True))
        yield place, {**parameters, **place}


def _unit(arm: str, seed: int, axes: dict[str, Any], parameters: Mapping[str, Any], notes: Mapping[str, Any]) -> Unit:
    own = {name: _with_seed(value, seed) for name, value in parameters.items()}
    then = tuple({name: _with_seed(value, seed) for name, value in one.items()} for one in notes.get("then", ()))
    return Unit(arm, seed, axes, {**own, "seed": seed}, then, notes.get("measure"))


def _with_seed(value: Any, seed: int) -> Any:
    """`seed`, `seed + 50` as numbers; 1e-3, which YAML takes for a text, too."""
    if not isinstance(value, str):
        return value
    if related := re.fullmatch(r"\s*seed\s*(?:\+\s*(\d+)\s*)?", value):
        return seed + int(related[1] or 0)
    return float(value) if re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, re.IGNORECASE) else value


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
                _ = None if unit.measure else (unit.config, unit.after(student=unit.parameters.get("student")))
            except ValueError as error:
                yield unit, str(error).replace("\n", "\n    ")


def _at(unit: Unit) -> str:
    return "".join(f", {name} {value}" for name, value in unit.axes.items())
