"""The record of a finished run: what it was, what came of it, and tables over many of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

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
    bytes: int | None = None
    """of the student's weights on disk"""
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
    between records, seeds aside.  Runs that trained on different numbers of rows, as they do where some methods keep
    some for feedback, are never put together: there is a column training_rows then.  The result has these fields
    as columns, then metric, mean, std (with n − 1; NaN for one seed) and n.  An empty folder gives an empty table.
    """
    records = [read_record(path) for path in sorted(Path(folder).rglob("*.json")) if is_record(path)]
    if not records:
        return pd.DataFrame(columns=["task", "method", "metric", "mean", "std", "n"])
    configs = pd.DataFrame([record.config | {ROWS: record.samples.get("train")} for record in records])
    if by is None:
        ignored = {"seed", *NOT_IDENTITY}
        differing = [c for c in configs if c not in ignored and configs[c].nunique(dropna=False) > 1]
        by = [*dict.fromkeys(["task", "method", *differing])]
    elif configs[ROWS].nunique(dropna=False) > 1:
        by = [*by, ROWS]
    rows = [
        {**{name: config.get(name) for name in by}, "metric": metric, "value": value}
        for record, config in zip(records, configs.to_dict("records"), strict=True)
        for metric, value in {**record.metrics, **{f"oracle/{k}": v for k, v in record.oracle.items()}}.items()
    ]
    table = pd.DataFrame(rows).groupby([*by, "metric"], dropna=False, sort=True)["value"]
    return table.agg(mean="mean", std="std", n="count").reset_index()


def is_record(path: Path) -> bool:
    """Whether a file holds a `RunRecord`; a chapter may keep records of its own form beside them."""
    return path.name == RECORD or (path.suffix == ".json" and '"run_id"' in path.read_text()[:40])
