"""The data of the book's own chapters, which are in the repository and not in an installed package."""

from pathlib import Path

import pandas as pd

import kdlib
from kdlib.records import RunRecord, is_record, read_record
from kdlib.study import Study


def read_records(chapter: str) -> list[RunRecord]:
    """The committed records of runs that a chapter reads, `data/runs/<chapter>/*.json`, in the order of their names.

    Raises FileNotFoundError in an installation without the repository's data.
    """
    folder = Path(kdlib.__file__).resolve().parents[1] / "data" / "runs" / chapter
    paths = [path for path in sorted(folder.glob("*.json")) if is_record(path)]
    if not paths:
        raise FileNotFoundError(f"no run records in {folder}: `make experiments` writes them")
    return [read_record(path) for path in paths]


def study(name: str) -> Study:
    """The study file experiments/<name>.yml: its arms, the table of its records, and what they decide.

    Raises ConfigurationError in an installation without the repository's experiments.
    """
    return Study(Path(kdlib.__file__).resolve().parents[1] / "experiments" / f"{name}.yml")


def choices(chapter: str) -> pd.DataFrame:
    """What was tried before a chapter's records were made, `data/choices/<chapter>.csv`: a row for each setting.

    Columns: the settings, then mean and std (fractions) of the validation accuracy over the seeds that choose, and
    their count; for teachers that learn also the teacher's mean accuracy.

    Raises FileNotFoundError in an installation without the repository's data.
    """
    path = Path(kdlib.__file__).resolve().parents[1] / "data" / "choices" / f"{chapter}.csv"
    if not path.exists():
        raise FileNotFoundError(
            f"no table of choices {path}: `python -m kdlib study experiments/{chapter}.yml --choose` writes it"
        )
    return pd.read_csv(path)


def benchmark(name: str) -> pd.DataFrame:
    """What a program of `benchmarks/` measured, `data/benchmarks/<name>.csv`.

    Raises FileNotFoundError in an installation without the repository's data.
    """
    path = Path(kdlib.__file__).resolve().parents[1] / "data" / "benchmarks" / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(f"no table {path}: `python benchmarks/{name}.py --write` measures it")
    return pd.read_csv(path)


def published(task: str | None = None, folder: Path | str | None = None) -> pd.DataFrame:
    """The papers' printed results, one number a row; only those of `task` if it is given.

    Columns: paper, table, split, method, student, task, metric, value (a string, as printed), teacher, setting.  Read
    from `data/published/`; an installation without the repository has none and gets an empty table.
    """
    where = Path(folder) if folder is not None else Path(kdlib.__file__).parents[1] / "data" / "published"
    tables = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in sorted(where.glob("*.csv"))]
    if not tables:
        return pd.DataFrame(columns=["paper", "table", "split", "method", "student", "task", "metric", "value"])
    table = pd.concat(tables, ignore_index=True)
    return table if task is None else table[table["task"] == task].reset_index(drop=True)
