"""Sentence classification data: GLUE, MiniGLUE, or any data set of one or two texts with a class or a score.

`load` is the one door.  It checks everything that can be checked before training starts, so that a broken mirror or a
stray label is named with its row instead of surfacing an hour later as an odd loss.
"""

import difflib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Value
from datasets.fingerprint import generate_random_fingerprint
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from kdlib import files, metrics, miniglue, sources, tables
from kdlib.batches import Encoded, unknown_id, unknown_share, unknown_words
from kdlib.progress import bar, notice
from kdlib.tables import Table

HIDDEN = -1
"""The label of a test row whose label is not published; nowhere else is it allowed."""


@dataclass(frozen=True)
class Task:
    """What a data set asks: its columns, its classes or its score, its metrics and its splits.

    `label_names` holds one name per class; () means regression; None means that `load` takes the names from the data.
    The first of `metrics` selects the best checkpoint.  `config` is the name of the data set's configuration or
    subfolder, None where there is just one.  The labels of `test_splits` may be hidden; None means the split "test" if
    there is one, which `load` finds out.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    train_split: str = "train"
    evaluation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] | None = ("test",)
    label_column: str = "label"
    score_range: tuple[float, float] | None = None
    config: str | None = None
    allow_empty_text: bool = False

    @property
    def is_regression(self) -> bool:
        """Whether the labels are scores."""
        return self.label_names == ()

    @property
    def row_column(self) -> str:
        """The column in which `load` numbers the rows: `row`, or `row_` if a text or the label is called that."""
        name = "row"
        while name in (*self.text_columns, self.label_column):
            name += "_"
        return name

    @property
    def num_labels(self) -> int:
        """The width of the model's head: the number of classes, 1 for regression."""
        return len(self.class_names) or 1

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class, () for regression.  Raises ValueError where `load` has yet to take them from the data."""
        if self.label_names is None:
            raise ValueError(
                f"the classes of task {self.name!r} are read from the data: use the task that load returns"
            )
        return self.label_names


def _task(name: str, texts: str, labels: str, metrics: str, **other: Any) -> Task:
    return Task(name, tuple(texts.split()), tuple(labels.split()), tuple(metrics.split()), config=name, **other)


_MATCHED = {
    "evaluation_splits": ("validation_matched", "validation_mismatched"),
    "test_splits": ("test_matched", "test_mismatched"),
}
_SIMILARITY = {"score_range": (0.0, 5.0)}

# fmt: off
TASKS = {task.name: task for task in (
    _task("cola", "sentence", "unacceptable acceptable", "matthews_correlation"),
    _task("sst2", "sentence", "negative positive", "accuracy"),
    _task("mrpc", "sentence1 sentence2", "not_equivalent equivalent", "f1 accuracy"),
    _task("stsb", "sentence1 sentence2", "", "pearson spearmanr", **_SIMILARITY),
    # QQP is published with a few empty questions, among them rows 310121 and 362225 of train.
    _task("qqp", "question1 question2", "not_duplicate duplicate", "f1 accuracy", allow_empty_text=True),
    _task("mnli", "premise hypothesis", "entailment neutral contradiction", "accuracy", **_MATCHED),
    _task("qnli", "question sentence", "entailment not_entailment", "accuracy"),
    _task("rte", "sentence1 sentence2", "entailment not_entailment", "accuracy"),
    _task("wnli", "sentence1 sentence2", "not_entailment entailment", "accuracy"),
    _task("mini-sst2", "sentence", "negative positive", "accuracy"),
    _task("mini-mrpc", "sentence1 sentence2", "not_equivalent equivalent", "f1 accuracy"),
    _task("mini-mnli", "premise hypothesis", "entailment neutral contradiction", "accuracy"),
    _task("mini-stsb", "sentence1 sentence2", "", "pearson spearmanr", **_SIMILARITY),
)}
DIAGNOSTICS = Task(
    "ax", ("premise", "hypothesis"), TASKS["mnli"].class_names, ("accuracy",), evaluation_splits=(), config="ax"
)
"""GLUE's diagnostic pairs, a test split alone, which a model of MNLI answers; see `load_test`."""
# fmt: on


def task_for(name: str) -> Task:
    """The task called `name`.

    Raises ValueError for an unknown name, with the nearest ones.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower(), TASKS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(
            f"unknown task {name!r}: {hint}The tasks are {', '.join(TASKS)}; describe any other data with generic_task"
        )
    return TASKS[name]


def generic_task(
    name: str,
    text_columns: str | Sequence[str],
    label_names: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    test_splits: Sequence[str] | None = None,
    **other: Any,
) -> Task:
    """Describe a data set that is not in TASKS; `other` are further fields of Task.

    Leave `label_names` out and they are read from the data; give () for a score.  The metrics default to accuracy, or
    to Pearson and Spearman correlation for a score; the first one chooses the best checkpoint.  Leave `test_splits` out
    and the split "test" is read if there is one; give () to leave it alone.

    Raises ValueError unless there are one or two text columns, none of them the label's, none or at least two classes,
    metrics that exist for this kind of task, and names of which a file's name can be made.
    """
    columns = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns)
    if len(columns) not in (1, 2):
        raise ValueError(f"task {name!r} has text columns {columns}; expected one or two")
    names = None if label_names is None else tuple(label_names)
    if names is not None and (len(names) == 1 or len(set(names)) < len(names)):
        raise ValueError(f"task {name!r} has label names {names}; expected different names of two or more classes")
    chosen = tuple(metrics or (("pearson", "spearmanr") if names == () else ("accuracy",)))
    tests = None if test_splits is None else tuple(test_splits)
    task = Task(name, columns, names, chosen, test_splits=tests, **other)
    _check_task(task)
    return task


def _check_task(task: Task) -> None:
    """Raise ValueError for what cannot work with any data."""
    columns = (*task.text_columns, task.label_column)
    for column in columns:
        if not column.strip():
            raise ValueError(f"task {task.name!r} has a column without a name among {columns}: name each of them")
        if columns.count(column) > 1:
            what = "the label column too" if column == task.label_column else "another text column too"
            raise ValueError(
                f"task {task.name!r} has the text column {column!r}, which is {what}: give text_columns and "
                "label_column different names"
            )
    metrics.check(task.metrics, task.is_regression)
    for split in task.test_splits or ("test",):
        _predictions_name(task.name, split)


@dataclass(frozen=True)
class TaskData:
    """The splits of a task, each with the text columns, the label and a column that numbers the rows.

    That column is called `row` (see `Task.row_column`) and says where the example stands in the published split, from
    0.  Other columns of the data are left out, but for what MiniGLUE's oracle knows.  `notes` says, a sentence each,
    what `load` had to decide, such as which file it took for validation; `carved` names the evaluation splits that were
    cut out of the published train split because there were no others: their rows have train's numbers.
    """

    task: Task
    train: Dataset
    evaluation: dict[str, Dataset]
    test: dict[str, Dataset]
    feedback: Dataset | None = None
    notes: tuple[str, ...] = ()
    carved: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(
    source: str | Path,
    task: str | Task,
    *,
    max_train: int | None = None,
    max_evaluation: int | None = None,
    feedback_fraction: float = 0.0,
    seed: int = 0,
    want_test: bool = True,
) -> TaskData:
    """Load a task from `source`, check every row and return its splits.

    `source` is "miniglue", the id of a data set on the Hugging Face hub, or a local folder: a copy of a hub data set,
    or files named `<split>.parquet`, `.jsonl`, `.json`, `.csv` or `.tsv` in it or in its subfolder `task.config`; how
    they are read says `tables.read` (tab-separated files without quoting, each line a row).  A folder is read into
    memory anew each time, so a file that has changed is never mistaken for its old self.  Only a hub id uses the
    network.  What is called dev, valid, val or eval is taken for validation.  Where data of your own have none, a tenth
    of train, of each class alike and the same at every call, is cut out for it.  Without `want_test`, a test split that
    is not there is no error.  What was decided here is printed, and stands in the result's `notes`.

    Labels may be class numbers, the names in `task.label_names`, or scores; they come back as class numbers or float32.
    If `task.label_names` is None the classes are those that occur in train: names in the order of the alphabet, numbers
    in their own order, whatever they are (1 and 2 become the classes 0 and 1, which keep "1" and "2" as their names).

    The train split is cut to `max_train` rows and each evaluation split to `max_evaluation`, drawn with `seed` (a
    smaller limit gives a subset of a larger one's rows).  Then `feedback_fraction` of train is set aside as `feedback`,
    see `feedback_split`.  Test splits are never cut: a submission needs every row.

    Raises ValueError for an unknown task, a missing split or column, an empty text, a label that is missing, out of
    range or of another kind than the others, an identifier taken for a label, or a score that is NaN, all with split
    and row, and for files that cannot be understood, with file and line; OSError for data that cannot be had:
    FileNotFoundError for missing files, ConnectionError for an unreachable hub, plain OSError for damaged files.
    """
    task = task_for(task) if isinstance(task, str) else task
    if not isinstance(task, Task):
        raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}, or what generic_task returns")
    for what, limit in (("max_train", max_train), ("max_evaluation", max_evaluation)):
        if limit is not None and (not isinstance(limit, Integral) or limit < 1):
            raise ValueError(f"{what} is {limit}; expected at least 1, or None for all rows")
    _check_task(task)
    notes: list[str] = []
    found, task = _splits(source, task, want_test, notes)
    by_name = task.label_names is None  # labels that are numbers are then the names of classes, not their places
    if by_name:
        task = replace(task, label_names=_label_names(found[task.train_split], task, notes))
        by_name = task.label_column not in found[task.train_split].classes
        if "f1" in task.metrics and task.num_labels != 2:
            raise ValueError(
                f"metric 'f1' is for two classes, and task {task.name!r} has {task.num_labels}: use 'macro_f1', "
                "'micro_f1' or another one"
            )
    prepared = {split: _prepared(rows, task, split, by_name) for split, rows in found.items()}
    train = prepared[task.train_split]
    carved: tuple[str, ...] = ()
    if missing := [split for split in task.evaluation_splits if split not in prepared]:
        train, prepared[missing[0]] = _carve(train, task, notes)
        carved = (missing[0],)
    for note in notes:
        notice(note)

    train = _subset(train, max_train, seed)
    evaluation = {split: _subset(prepared[split], max_evaluation, seed) for split in task.evaluation_splits}
    test = {split: prepared[split] for split in task.test_splits or ()}
    feedback = None
    if feedback_fraction:
        train, feedback = feedback_split(train, feedback_fraction, seed, task.label_column)
    return TaskData(task, train, evaluation, test, feedback, tuple(notes), carved)


def load_test(source: str | Path, task: Task) -> Dataset:
    """The only test split of a task, checked as `load` does, whether or not there is anything to train on.

    Raises what `load` raises.
    """
    (split,) = task.test_splits or ("test",)
    wanted = sources.Wanted(task.name, task.config, (split,), task.text_columns, (task.label_column,))
    found = sources.find(source, wanted)
    name = sources.name_of(split, found.parts, source)
    if name is None:
        raise ValueError(f"{source} has no split {split!r} for task {task.name!r}, it has {', '.join(found.parts)}")
    return _prepared(found.parts[name](), task, split, by_name=False)


def feedback_split(
    train: Dataset, fraction: float = 0.1, seed: int = 0, label_column: str = "label"
) -> tuple[Dataset, Dataset]:
    """Cut `train` into what the student trains on and a feedback set of `fraction` of the rows; they share no row.

    Stratified: every class, or every fifth of the scores, gives its share to within one row.

    Raises ValueError if either part would be empty.
    """
    size = round(fraction * len(train)) if math.isfinite(fraction) else 0
    if not 0 < size < len(train):
        raise ValueError(
            f"a feedback split of {fraction} of {len(train)} training rows has {size} rows and leaves "
            f"{len(train) - size}: choose a fraction between 0 and 1 that leaves rows on both sides"
        )
    labels = np.asarray(train.with_format("numpy")[label_column][:])
    taken = _stratified(labels, size, np.random.default_rng([seed, 1]))
    return _cut(train, taken)


def _cut(train: Dataset, taken: np.ndarray) -> tuple[Dataset, Dataset]:
    """What is left of `train`, and the rows at the places `taken`, both in their order."""
    return train.select(np.setdiff1d(np.arange(len(train)), taken)), train.select(np.sort(taken))


def _stratified(labels: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """`size` places, of which every class, or every fifth of the scores, has its share to within one."""
    strata = labels
    if strata.dtype.kind == "f":
        strata = np.searchsorted(np.quantile(strata, (0.2, 0.4, 0.6, 0.8)), strata)
    # Shuffle within the strata, lay them end to end, and take every (n / size)-th row from a random start.
    order = np.lexsort((generator.random(len(labels)), strata))
    return order[((np.arange(size) + generator.random()) * len(labels) / size).astype(int)]


def _carve(train: Dataset, task: Task, notes: list[str]) -> tuple[Dataset, Dataset]:
    """What is left of train, and a tenth of it for validation.  The same rows every time: the split is the data's."""
    labels = np.asarray(train.with_format("numpy")[task.label_column][:])
    often = np.arange(len(labels))
    if not task.is_regression:  # the only row of a class stays: a class that train never shows cannot be learnt
        often = np.flatnonzero(np.bincount(labels)[labels] > 1)
    if len(often) < 2:
        raise ValueError(
            f"task {task.name!r} has no validation split, and its {len(train)} training rows are too few to cut one "
            "out: add a file named validation beside train"
        )
    taken = often[_stratified(labels[often], max(1, round(len(often) / 10)), np.random.default_rng([0, 2]))]
    notes.append(
        f"task {task.name!r} has no validation split (nothing is called {', '.join(sources.also('validation'))}): "
        f"{len(taken)} of its {len(train)} training rows are set aside for validation, the same ones at every run"
    )
    return _cut(train, taken)


def fingerprint(data: TaskData) -> str:
    """16 hex digits that name what a run reads: the texts, labels, classes and splits, and the order of all of them.

    Where the data were, in which format and in which order of columns does not matter; any other text, label, order of
    rows, class name or split gives another fingerprint.
    """
    digest = hashlib.sha256()

    def add(what: str, content: bytes | memoryview) -> None:
        # With its length, so that nothing can move from one place to the next without a trace.
        digest.update(f"{what} {len(content)}\n".encode())
        digest.update(content)

    add("classes", json.dumps(data.task.label_names).encode())
    feedback = {} if data.feedback is None else {"feedback": data.feedback}
    parts = {"train": {data.task.train_split: data.train, **feedback}, "evaluation": data.evaluation, "test": data.test}
    number = np.dtype("<f4" if data.task.is_regression else "<i8")
    for part, splits in parts.items():
        for split, rows in splits.items():
            add(part, split.encode())
            columns = rows.with_format("arrow")[:]
            for column in data.task.text_columns:
                # Of several chunks the one string of bytes is the same however the chunks are cut.
                texts = pa.concat_arrays([chunk.cast(pa.large_binary()) for chunk in columns[column].chunks])
                add("lengths", pc.binary_length(texts).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
                add("texts", b"".join(texts.to_pylist()))
            add("labels", columns[data.task.label_column].to_numpy().astype(number).tobytes())
            ours = {*data.task.text_columns, data.task.label_column, data.task.row_column}
            for column in sorted({*miniglue.ORACLE} & {*rows.column_names} - ours):
                add(column, json.dumps(columns[column].to_pylist()).encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def _is_own(task: Task) -> bool:
    """Whether the data are the user's: none of TASKS, or one with columns of its own."""
    return task.name not in TASKS or task.config != task.name


def _splits(source: str | Path, task: Task, want_test: bool, notes: list[str]) -> tuple[dict[str, Table], Task]:
    """The splits as they are in the source, and the task with the test splits that are there.

    Raises ValueError for one that is missing; a validation split of the user's own data may be.
    """
    tests = ("test",) if task.test_splits is None else task.test_splits
    splits = (task.train_split, *task.evaluation_splits, *tests)
    oracle = miniglue.ORACLE if task.name in miniglue.TASK_NAMES and not _is_own(task) else ()
    wanted = sources.Wanted(task.name, task.config, splits, task.text_columns, (task.label_column, *oracle))
    found = sources.find(source, wanted)
    may_miss = {*(tests if task.test_splits is None or not want_test else ())}
    if _is_own(task) and task.evaluation_splits == ("validation",):
        may_miss.add("validation")
    loaded = {}
    for split in splits:
        name = sources.name_of(split, found.parts, source)
        promised = sources.name_of(split, found.promised, "the data card")
        if name is None and promised and (want_test or split not in tests):
            raise FileNotFoundError(
                f"no file of split {split!r}, which README.md lists, is in {source}. {tables.COPY_AGAIN}"
            )
        if name is None and split in may_miss:
            continue
        if name is None:
            remedy = f"add a file named {split}"
            if split in tests:
                remedy += ", or do without predictions (predict_test=False; of load, want_test=False)"
            raise ValueError(
                f"{source} has no split {split!r} for task {task.name!r}, it has {', '.join(found.parts)}: {remedy}. "
                "In Python, generic_task can name other splits (train_split, evaluation_splits, test_splits)"
            )
        loaded[split] = table = found.parts[name]()
        if promised and len(table) != found.promised[promised]:
            raise OSError(
                f"split {split!r} of task {task.name!r} in {source} has {len(table)} rows, its README.md promises "
                f"{found.promised[promised]}. {tables.COPY_AGAIN}, or correct the README"
            )
        if found.classes and task.label_column not in table.classes:
            loaded[split] = _with_classes(table, task.label_column, found.classes)
        if name != split:
            notes.append(f"task {task.name!r}: what is called {name!r} in {source} is taken for the split {split!r}")
    return loaded, replace(task, test_splits=tuple(split for split in tests if split in loaded))


def _with_classes(table: Table, column: str, names: tuple[str, ...]) -> Table:
    """Name the classes where the file has plain numbers, or these names; they are checked later, with their rows."""
    values = {value for value in table.columns.get(column, ()) if isinstance(value, str | int) and value != ""}
    if any(isinstance(value, str) for value in values) and not values <= set(names):
        return table
    return replace(table, classes={**table.classes, column: names})


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def _prepared(table: Table, task: Task, split: str, by_name: bool) -> Dataset:
    """Checked texts, labels as class numbers or float32 scores, and the number of each row."""
    unlabelled = split in (task.test_splits or ()) and task.label_column not in table.present
    for column in (*task.text_columns, *(() if unlabelled else (task.label_column,))):
        if column not in table.columns:
            name = "label_column" if column == task.label_column else "text_columns"
            raise ValueError(
                f"split {split!r} of task {task.name!r} has no column {column!r}; it has {', '.join(table.present)}: "
                f"give one of them as {name}"
            )
    if not len(table):
        raise ValueError(f"split {split!r} of task {task.name!r} has no rows: add some, or remove its file")
    for column in task.text_columns:
        _check_texts(table.columns[column], column, task, split)
    if unlabelled:
        labels = np.full(len(table), HIDDEN)
    else:
        labels = _labels(table, task, split, by_name)
    feature = Value("float32") if task.is_regression else ClassLabel(names=list(task.class_names))
    labels = labels.astype(np.float32 if task.is_regression else np.int64)
    columns = {name: pa.array(table.columns[name], pa.string()) for name in task.text_columns}
    oracle = [name for name in table.columns if name not in (*task.text_columns, task.label_column)]
    columns |= {name: pa.array(table.columns[name]) for name in oracle}
    columns |= {task.label_column: pa.array(labels), task.row_column: pa.array(np.arange(len(labels)))}
    whole = pa.table(columns)
    types = datasets.Features({**datasets.Features.from_arrow_schema(whole.schema), task.label_column: feature})
    named = datasets.NamedSplit(split) if re.fullmatch(r"\w+(\.\w+)*", split) else None  # encode tells which one it is
    # `datasets` would take the hash of all rows for a name, which takes longer than to read them.
    return Dataset(whole, datasets.DatasetInfo(features=types), named, fingerprint=generate_random_fingerprint())


def _check_texts(texts: list[Any], column: str, task: Task, split: str) -> None:
    for row, text in enumerate(texts):
        if not isinstance(text, str | None):
            raise ValueError(
                f"column {column!r} of split {split!r} holds {_shown(text)} in row {row}; expected text: give another "
                "column as text_columns, or write its values as text"
            )
    bad = [row for row, text in enumerate(texts) if text is None or not (task.allow_empty_text or text.strip())]
    if bad:
        remedy = "write '' for a text that is empty on purpose" if task.allow_empty_text else (
            "fill or drop these rows (in Python, generic_task(..., allow_empty_text=True) takes them as they are)"
        )  # fmt: skip
        raise ValueError(
            f"empty text in column {column!r}, row {bad[0]} of split {split!r} (task {task.name!r}, {len(bad)} such "
            f"rows): {remedy}"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) < 60 else text[:60] + '…'} ({type(value).__name__})"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" … ({len(names)} in all)" if len(names) > 20 else "")


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or (
        isinstance(value, str) and not value.strip()
    )  # fmt: skip


def _is_number(value: Any) -> bool:
    """Whether a label is a number, or a text that reads as one."""
    if isinstance(value, str):
        return bool(tables.NUMBER.fullmatch(value))
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _class_name(value: Any) -> str:
    """The name of a label's class: 2, 2.0, "2" and " 2 " are the class "2", and True is "True"."""
    if not _is_number(value):
        return str(value).strip()
    if isinstance(value, str):
        value = tables.number(value)
    return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)


def _check_present(values: list[Any], task: Task, split: str) -> None:
    missing = [row for row, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise ValueError(
            f"the label in row {missing[0]} of split {split!r} (task {task.name!r}, {len(missing)} such rows) is "
            "missing: fill or drop these rows"
        )


def _check_kinds(values: list[Any], task: Task, split: str) -> None:
    """Raise ValueError for labels of several kinds, and for what is no label at all, with the row."""
    first: dict[str, int] = {}
    for row, value in enumerate(values):
        if _is_missing(value):
            continue
        kind = "a truth value" if isinstance(value, bool) else (
            "a text" if isinstance(value, str) else "a number" if isinstance(value, int | float | Decimal) else None
        )  # fmt: skip
        if kind is None:
            raise ValueError(
                f"label {_shown(value)} in row {row} of split {split!r} (task {task.name!r}): expected one class, a "
                "number or a name, or one score"
            )
        first.setdefault(kind, row)
    if len(first) > 1:
        kinds = " and ".join(f"{kind} in row {row}, {values[row]!r}" for kind, row in first.items())
        raise ValueError(
            f"the labels of split {split!r} (task {task.name!r}) are of several kinds: {kinds}. Write all of them alike"
        )


def _labels(table: Table, task: Task, split: str, by_name: bool) -> np.ndarray:
    """The labels as numbers; HIDDEN only in test splits.  Raises ValueError with the first bad value and its row."""
    values, declared = table.columns[task.label_column], table.classes.get(task.label_column)
    if declared and declared != task.label_names and not by_name:
        expected = "a score" if task.is_regression else f"the classes {', '.join(task.class_names)}, in this order"
        raise ValueError(
            f"the labels of split {split!r} are the classes {', '.join(declared)}, but task {task.name!r} expects "
            f"{expected}: describe this data set with generic_task (in the form, with text_columns)"
        )
    hidden = split in (task.test_splits or ())
    if not hidden:
        _check_present(values, task, split)
    _check_kinds(values, task, split)
    if task.is_regression:
        known, expected = _scores(set(values), task)
    else:
        numbers, expected = _class_numbers(set(values), task, by_name)
        known = {**numbers}
    if hidden:
        unknown = {value for value in known if known[value] is None}
        hide = {value for value in unknown if _is_missing(value) or _class_name(value) == str(HIDDEN)}
        known |= dict.fromkeys(hide, HIDDEN)
        # NaN is no key that can be found again, it differs from itself.
        values = [None if _is_missing(value) else value for value in values]
        known[None] = HIDDEN
    bad = [row for row, value in enumerate(values) if known[value] is None]
    if bad:
        raise ValueError(
            f"label {values[bad[0]]!r} in row {bad[0]} of split {split!r} (task {task.name!r}, {len(bad)} such rows): "
            f"expected {expected}"
        )
    return np.array([known[value] for value in values], dtype=np.float64)


def _scores(values: set[Any], task: Task) -> tuple[dict[Any, float | None], str]:
    """The score that each label stands for, None for none, and what was expected."""
    low, high = task.score_range or (-math.inf, math.inf)
    known: dict[Any, float | None] = {}
    for value in values:
        try:
            score = float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        known[value] = score if math.isfinite(score) and low <= score <= high else None
    return known, f"a score between {low:g} and {high:g}" if task.score_range else "a finite score"


def _class_numbers(values: set[Any], task: Task, by_name: bool) -> tuple[dict[Any, int | None], str]:
    """The class that each label stands for, None for none, and what was expected.

    Text is the name of a class.  A number is its place, or with `by_name` its name, as a text is: 2, 2.0 and "2" then
    are the same.
    """
    names = {name: number for number, name in enumerate(task.class_names)}
    known: dict[Any, int | None] = {}
    for value in values:
        if by_name or isinstance(value, str):
            name = _class_name(value) if by_name else value
            known[value] = names.get(value, names.get(name, names.get(str(value).strip())))
        else:
            place = value is not None and value in range(task.num_labels)
            known[value] = int(value) if place else None
    if by_name:
        return known, f"one of {_listed(task.class_names)}, the classes that occur in {task.train_split!r}"
    if all(isinstance(value, str | None) for value in values):
        return known, f"one of {_listed(task.class_names)}"
    return known, f"a class number, 0 … {task.num_labels - 1}"


def _label_names(train: Table, task: Task, notes: list[str]) -> tuple[str, ...]:
    """The names of the classes: the data set's own, else those that occur in train, in order.

    Raises ValueError for labels that are scores or identifiers rather than classes, or that are all the same.
    """
    split, column = task.train_split, task.label_column
    where = f"column {column!r} of split {split!r} (task {task.name!r})"
    if column not in train.columns:
        raise ValueError(
            f"cannot read the classes of task {task.name!r} from column {column!r}, which is missing; the columns are "
            f"{', '.join(train.present)}: give one of them as label_column"
        )
    values = train.columns[column]
    declared = train.classes.get(column)
    if declared:
        unseen = [name for place, name in enumerate(declared) if place not in values and name not in values]
        if unseen and len(declared) > 1:
            notes.append(f"{where} never shows {_listed(unseen)}, of the classes that the data declare")
        if len(declared) > 1:
            return declared
    _check_present(values, task, split)
    _check_kinds(values, task, split)
    words = [row for row, value in enumerate(values) if not _is_number(value) and not isinstance(value, bool)]
    if 0 < len(words) < len(values) / 2:
        rows = ", ".join(f"row {row} ({values[row]!r})" for row in words[:5])
        raise ValueError(
            f"{where} holds words among numbers: {rows}{' …' if len(words) > 5 else ''} ({len(words)} such rows). Drop "
            "or correct these rows; if they are classes, give all classes names that are words"
        )
    if not words and not isinstance(values[0], bool):
        for row, value in enumerate(values):
            if not _class_name(value).lstrip("-").isdigit():
                raise ValueError(
                    f"{where} holds {value!r} in row {row}, which is a score and no class: set regression=True (in "
                    "Python, label_names=()); if they are classes, write whole numbers, or words such as 'v1.5'"
                )
    counts = Counter(map(_class_name, values))
    numbers = not words and not isinstance(values[0], bool)
    names = tuple(sorted(counts, key=int if numbers else None))
    if len(names) < 2:
        raise ValueError(
            f"{where} holds one class only, {names[0]!r}, in all {len(values)} rows: nothing can be learnt"
        )
    if len(names) > 10 and len(names) > len(values) / 2:
        raise ValueError(
            f"{where} holds {len(names)} different labels in {len(values)} rows, {_listed(names[:5])} …: that is an "
            "identifier or a score rather than a class. Give another label_column, or set regression=True (in Python, "
            "label_names=())"
        )
    if numbers and names != tuple(map(str, range(len(names)))):
        notes.append(
            f"{where} holds the labels {_listed(names)}: they become the classes 0 … {len(names) - 1}, in this order, "
            "and keep their numbers as names"
        )
    return names


def _subset(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng([seed, 0]).permutation(len(dataset))[:limit]))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def encode(dataset: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> Encoded:
    """Tokenise a split once; texts longer than `max_length` tokens are cut, of a pair the longer text first.

    Raises ValueError if `max_length` leaves no room for the texts, the tokenizer has no padding token, or more than
    half of the word pieces are unknown to it.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text_columns) == 2)
    if max_length < special + len(task.text_columns):
        raise ValueError(f"max_length is {max_length}; {special} special tokens leave no room for the text")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no padding token; use a BERT-like tokenizer")
    ids, types = [], []
    lengths: list[int] = []
    for start in bar(range(0, len(dataset), 1000), "tokenising"):
        texts = dataset[start : start + 1000]
        columns = [texts[column] for column in task.text_columns]
        tokens = tokenizer(
            *(columns if len(columns) == 1 else (_shortened(column, tokenizer, max_length) for column in columns)),
            truncation=True,
            max_length=max_length,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        ids.append(np.fromiter(chain.from_iterable(tokens["input_ids"]), np.int32))
        types.append(np.fromiter(chain.from_iterable(tokens["token_type_ids"]), np.int8))
        lengths += map(len, tokens["input_ids"])
    input_ids = np.concatenate([np.empty(0, np.int32), *ids])
    unknown = unknown_share(
        int((input_ids == unknown_id(tokenizer)).sum()),
        len(input_ids) - special * len(dataset),
        f"split {str(dataset.split)!r} of task {task.name!r}" if dataset.split else f"task {task.name!r}",
        tokenizer,
        lambda: unknown_words(chain.from_iterable(dataset[column] for column in task.text_columns), tokenizer),
    )
    return Encoded(
        input_ids=torch.from_numpy(input_ids),
        token_type_ids=torch.from_numpy(np.concatenate([np.empty(0, np.int8), *types])),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        labels=torch.tensor(dataset[task.label_column][:], dtype=torch.float32 if task.is_regression else torch.int64),
        rows=torch.tensor(dataset[task.row_column][:], dtype=torch.int64),
        pad_token_id=tokenizer.pad_token_id,
        unknown=unknown,
    )


def _shortened(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """The texts, very long ones cut behind the word that holds token `max_length`; the ids to come are the same.

    To cut a pair the tokenizer makes all pairs of the pieces that it cuts off, which takes seconds for two long texts.
    """
    texts = list(texts)
    long = [place for place, text in enumerate(texts) if len(text) > 20 * max_length]
    if not long or not tokenizer.is_fast:
        return texts
    options = {"add_special_tokens": False, "truncation": True, "max_length": max_length}
    whole = tokenizer([texts[place] for place in long], return_offsets_mapping=True, **options)
    for place, ids, offsets in zip(long, whole["input_ids"], whole["offset_mapping"], strict=True):
        end = re.compile(r"\s").search(texts[place], offsets[-1][1]) if len(ids) == max_length else None
        # Not every tokenizer takes words one by one, so look.
        if end and tokenizer(texts[place][: end.end()], **options)["input_ids"] == ids:
            texts[place] = texts[place][: end.end()]
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# Submissions

_SUBMISSION_FILES = {
    "cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "qnli": "QNLI", "rte": "RTE",
    "wnli": "WNLI", "mnli-test_matched": "MNLI-m", "mnli-test_mismatched": "MNLI-mm", "ax": "AX",
}  # fmt: skip
_SUBMITTED_AS_NUMBERS = {"cola", "sst2", "mrpc", "qqp", "wnli", "mini-sst2", "mini-mrpc"}


def write_predictions(
    folder: str | Path, task: Task, outputs: Float[np.ndarray, "samples outputs"], split: str = "test"
) -> Path:
    """Write the predictions for a test split as the GLUE server wants them; return the file's path.

    Tab-separated `index` and `prediction`, without quoting: class numbers or names as GLUE asks for each task, scores
    cut to their range with three decimals.  If a class name holds a tab or a line break, all names are written with
    these, and backslashes, as Python writes them.  The files are CoLA.tsv, MNLI-m.tsv and so on, for other tasks
    `<task>.tsv`.  A file appears complete or not at all.

    Raises ValueError for outputs of another width than the task's or that hold NaN, and for names of a task or a split
    of which no file's name can be made.
    """
    name = _predictions_name(task.name, split)
    outputs = np.asarray(outputs)
    if outputs.ndim != 2 or outputs.shape[1] != task.num_labels:
        raise ValueError(f"outputs have shape {outputs.shape}; task {task.name!r} needs (samples, {task.num_labels})")
    if not np.isfinite(outputs).all():
        raise ValueError(f"the outputs for split {split!r} hold NaN or infinity: the model has diverged")
    if task.is_regression:
        predictions = [f"{score:.3f}" for score in np.clip(outputs[:, 0], *(task.score_range or (None, None)))]
    else:
        classes, names = outputs.argmax(axis=1).tolist(), _one_line_each(task.class_names)
        predictions = classes if task.name in _SUBMITTED_AS_NUMBERS else [names[c] for c in classes]
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["index\tprediction", *(f"{row}\t{prediction}" for row, prediction in enumerate(predictions))]
    files.write_text(path, "\n".join(lines) + "\n")
    return path


def _predictions_name(task: str, split: str) -> str:
    """The name of the file of predictions.  Raises ValueError for names that could lead out of its folder."""
    for what, name in (("task", task), ("split", split)):
        bad = re.search(r"[/\\\x00-\x1f\x7f\ud800-\udfff]|^\.*$", name)
        if bad or len(name.encode("utf-8", "replace")) > 100:
            reason = f"{bad[0]!r}" if bad and bad[0] else "no letter" if bad else "more than 100 bytes"
            raise ValueError(
                f"{what} name {name if len(name) < 60 else name[:60] + '…'!r} has {reason} in it, and files are named "
                "after it: choose a short name of letters, digits, '-' and '_'"
            )
    name = task if split == "test" else f"{task}-{split}"
    return f"{_SUBMISSION_FILES.get(name, name)}.tsv"


def _one_line_each(names: Sequence[str]) -> Sequence[str]:
    """The names of classes, as they are unless one of them would break the lines of a table."""
    if not any(re.search(r"[\t\r\n]", name) for name in names):
        return names
    codes = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    return [name.translate(codes) for name in names]
