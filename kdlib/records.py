"""The record of a finished run: what it was, what came of it, and tables over many of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from kdlib import files

RECORD = "record.json"
NOT_IDENTITY = ("output_dir", "cache_dir", "resume", "device", "checkpoint_every", "max_seconds", "log_with")
"""Parameters that say where a run is computed, kept, how often it is saved and who follows it, not what is computed."""


@dataclass
class RunRecord:
    """What is known of a finished run; stored as `record.json` in its folder."""

    run_id: str
    config: dict[str, Any]
    metrics: dict[str, float]
    """of the best checkpoint, by split and metric: "validation/accuracy" … ; also on the test split where labelled"""
    best_step: int
    history: list[dict[str, float]]
    """one row an evaluation"""
    seconds: float
    """of the training alone, evaluations included, interruptions not"""
    samples: dict[str, int]
    parameters: int
    teacher: str | None
    """the teacher's run, if it was fine-tuned here"""
    oracle: dict[str, float]
    """against MiniGLUE's true posterior; empty elsewhere"""
    environment: dict[str, str]
    git_commit: str | None
    finished: str
    contents: dict[str, str] = field(default_factory=dict)
    """what data and networks from outside the package were, see `contents`"""
    unknown: dict[str, float] = field(default_factory=dict)
    """the share of word pieces that the vocabulary does not have, by split; only where there are any"""
    notes: list[str] = field(default_factory=list)
    """what was decided when the data were read, see `glue.load`"""
    embeddings: int | None = None
    """how many of the parameters are tables of embeddings; None in records from before, as the next one"""
    stored_bytes: int | None = None
    """of the student's weights on disk"""
    asked: dict[str, Any] = field(default_factory=dict)
    """what a study asked for where that is more than this run, see `study.Unit`"""
    folder: Path = field(default=Path(), compare=False)

    @property
    def history_frame(self) -> pd.DataFrame:
        """The history as a pandas frame."""
        return pd.DataFrame(self.history)


def write_record(record: RunRecord) -> None:
    """Write `record.json` atomically."""
    fields = {name: value for name, value in vars(record).items() if name != "folder"}
    path = record.folder / RECORD
    files.write_text(path, json.dumps(fields, indent=1) + "\n")


def read_record(folder: Path | str) -> RunRecord:
    """Read a run's record from its folder, or from a record file.

    Raises ValueError that names the file if it is damaged.
    """
    path = Path(folder)
    path = path / RECORD if path.is_dir() else path
    try:
        return RunRecord(**json.loads(path.read_text()), folder=path.parent)
    except (ValueError, TypeError, IsADirectoryError) as error:  # not UTF-8 and not JSON are ValueErrors
        raise ValueError(f"{path} is not a complete run record ({error}): delete it and run again") from error


ROWS = "training_rows"
"""The column of `results` that says on how many rows a student trained."""


def results(folder: Path | str, by: Sequence[str] | None = None) -> pd.DataFrame:
    """Read all records below `folder` into one table: mean, standard deviation and n over seeds.

    Records are grouped by the configuration fields `by`; None takes task, method and every other field that differs
    between records, seeds aside, see `arms`.  Where runs trained on different numbers of rows, as they do where some
    methods keep some for feedback, there is a column training_rows.  The result has these fields as columns, then
    metric, mean, std (with n − 1; NaN for one seed) and n.  An empty folder gives an empty table.

    Raises ValueError where `by` would put runs of different settings together, with the fields and their values, and
    where two runs of an arm have one seed.
    """
    records = [read_record(path) for path in sorted(Path(folder).rglob("*.json")) if is_record(path)]
    if not records:
        return pd.DataFrame(columns=["task", "method", "metric", "mean", "std", "n"])
    found, rows = arms(records, by), []
    for arm in found:
        values: dict[str, list[float]] = {}
        for record in arm.records:
            for metric, value in {**record.metrics, **{f"oracle/{k}": v for k, v in record.oracle.items()}}.items():
                values.setdefault(metric, []).append(value)
        for metric, each in values.items():
            spread = {"mean": np.mean(each), "std": pd.Series(each).std(), "n": len(each)}
            rows.append({**arm.settings, "metric": metric, **spread})
    return pd.DataFrame(rows).sort_values([*found[0].settings, "metric"], ignore_index=True)


_ALWAYS = ("method", "metric", "mean", "n")


def by_task(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What `results` returns as a table for each task, to be read: only what differs among its runs has a column.

    Runs on plain text, which have no task, are together in "text".  All cells are strings, "" for what a run does not
    have.
    """
    found = {}
    for task, rows in table.groupby("task", dropna=False, sort=False):
        told = [n for n in rows if n in _ALWAYS or (n != "task" and rows[n].map(repr).nunique() > 1)]
        found[task if isinstance(task, str) else "text"] = rows[told].map(_cell)
    return found


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}"
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seeds."""

    name: str
    """what sets it apart from the other arms on its task: its method, and fields that the method does not imply"""
    settings: dict[str, Any]
    """the fields by which the arms were told apart, task and method first; None for one that the run does not have"""
    records: list[RunRecord]
    """in the order of the seeds"""

    def values(self, metric: str) -> pd.Series:
        """A metric by seed, for `compare.paired`.

        Raises ValueError if a record does not have it.
        """
        lacking = [record.run_id for record in self.records if metric not in record.metrics]
        if lacking:
            known = ", ".join(sorted({name for record in self.records for name in record.metrics}))
            raise ValueError(f"{', '.join(lacking)} has no metric {metric!r}; there are {known}")
        return pd.Series({record.config["seed"]: record.metrics[metric] for record in self.records})


def arms(records: Sequence[RunRecord], by: Sequence[str] | None = None) -> list[Arm]:
    """Put records together that differ in nothing but their seeds, in the order of their first records.

    They are told apart by the configuration fields `by`; None takes task, method and every other field that differs.
    training_rows, and what outside the package a run was made from, are such fields, too.  The teacher's seed goes with
    the student's, unless one seed was run with several.  A record that is there twice counts once.

    Raises ValueError where `by` would put different settings together, with the fields and their values, for a field
    that is no setting, and where two runs of an arm have one seed.
    """
    records = list({(record.run_id, repr(record.metrics)): record for record in records}.values())
    for with_seed in (("seed", "teacher_seed"), ("seed",)):
        settings = [_settings(record, with_seed) for record in records]
        names = dict.fromkeys(["task", "method", *(name for one in settings for name in one)])
        differing = [name for name in names if len({repr(one.get(name)) for one in settings}) > 1]
        groups = _grouped(settings, differing)
        twice = [g for g in groups if len({records[n].config.get("seed") for n in g}) < len(g)]
        if not twice:
            break
    else:
        same = ", ".join(f"{records[n].run_id} in {records[n].folder}" for n in twice[0])
        raise ValueError(f"some of these runs have the same seed and the same settings, keep one of them: {same}")
    if by is not None:
        fields = {name for record in records for name in record.config} - {"seed", *NOT_IDENTITY}
        if strange := [name for name in by if name not in {"task", "method", ROWS, *fields, *names}]:
            raise ValueError(f"no run has a setting {', '.join(strange)}; there are {', '.join(sorted(fields))}")
        _refuse_mixtures(settings, by, [name for name in differing if name != ROWS])
    columns = dict.fromkeys(by if by is not None else ["task", "method", *differing])
    columns |= dict.fromkeys([ROWS] if ROWS in differing else [])
    told = {
        method: _telling([one for one in settings if one.get("method") == method], differing)
        for method in {one.get("method") for one in settings}
    }
    found = []
    for group in groups:
        first = settings[group[0]]
        own = [f"{name} {first[name]}" for name in told[first.get("method")] if name in first]
        members = sorted((records[n] for n in group), key=lambda record: record.config.get("seed", 0))
        name = ", ".join([str(first.get("method")), *own])
        found.append(Arm(name, {name: first.get(name) for name in columns}, members))
    return found


def _settings(record: RunRecord, seeds: Sequence[str]) -> dict[str, Any]:
    """What a run depends on besides its seeds, fields that it does not have left out."""
    given = {**record.config, **{f"contents of {name}": value for name, value in record.contents.items()}}
    given[ROWS] = record.samples.get("train")
    return {name: v for name, v in given.items() if v is not None and name not in (*NOT_IDENTITY, *seeds)}


def _grouped(settings: list[dict[str, Any]], names: Sequence[str]) -> list[list[int]]:
    """The places of the settings that agree in these fields."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, one in enumerate(settings):
        groups.setdefault(tuple(repr(one.get(name)) for name in names), []).append(place)
    return [*groups.values()]


def _refuse_mixtures(settings: list[dict[str, Any]], by: Sequence[str], differing: Sequence[str]) -> None:
    for group in _grouped(settings, by):
        mixed = {name: dict.fromkeys(repr(settings[n].get(name)) for n in group) for name in differing}
        said = [f"{name} ({', '.join(values)})" for name, values in mixed.items() if len(values) > 1]
        if said:
            raise ValueError(f"by {', '.join(by)} would put runs together that differ in {'; '.join(said)}: add to it")


def _telling(settings: list[dict[str, Any]], differing: Sequence[str]) -> list[str]:
    """The fewest fields, the first ones where there is a choice, that tell the arms of a method apart on every task."""
    arms = len(_grouped(settings, differing))
    told = [name for name in differing if name != "task"]
    for name in reversed(told):
        fewer = [other for other in told if other != name]
        if len(_grouped(settings, ["task", *fewer])) == arms:
            told = fewer
    return told


def scoreboard(arms: Sequence[Arm], metric: str, scale: float = 100.0, digits: int = 1) -> pd.DataFrame:
    """A table of arms × tasks: "mean ± half the 95 % interval (seeds)", "mean (1)" for one seed, "" for none.

    `scale` makes per cent of fractions.  The intervals are those of each mean; two arms are compared by their
    differences, see `compare.paired`.

    Raises ValueError for a metric that a record does not have.
    """
    cells: dict[str, dict[str, str]] = {}
    for arm in arms:
        values = scale * arm.values(metric)
        n, task = len(values), str(arm.records[0].config.get("task"))
        reach = stats.t.ppf(0.975, n - 1) * values.std() / np.sqrt(n) if n > 1 else None
        spread = "" if reach is None else f" ± {reach:.{digits}f}"
        cells.setdefault(task, {})[arm.name] = f"{values.mean():.{digits}f}{spread} ({n})"
    return pd.DataFrame(cells, index=[*dict.fromkeys(arm.name for arm in arms)]).fillna("")


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, its index as the first column."""
    rows = [["", *table], ["---"] * (1 + table.shape[1]), *(list(row) for row in table.itertuples())]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
)


def latex(table: pd.DataFrame) -> str:
    """A table in LaTeX, its index as the first column; the preamble needs `\\usepackage{booktabs}`."""
    head, *body = [
        " & ".join(str(cell).translate(_LATEX) for cell in row) + r" \\" for row in (["", *table], *table.itertuples())
    ]
    lines = [rf"\begin{{tabular}}{{l{'r' * table.shape[1]}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def is_record(path: Path) -> bool:
    """Whether a file holds a `RunRecord`; a chapter may keep records of its own form beside them."""
    return path.name == RECORD or (path.suffix == ".json" and '"run_id"' in path.read_text()[:40])
