"""Sentence classification data: GLUE, MiniGLUE, or any data set of one or two texts with a class or a score.

`load` is the one door.  It checks everything that can be checked before training starts, so that a broken mirror or a
stray label is named with its row instead of surfacing an hour later as an odd loss.
"""

import difflib
import glob
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from datasets import ClassLabel, Dataset, Value
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlib import miniglue
from kdlib.progress import bar

HIDDEN = -1
"""The label of a test row whose label is not published; nowhere else is it allowed."""


@dataclass(frozen=True)
class Task:
    """What a data set asks: its columns, its classes or its score, its metrics and its splits.

    `label_names` holds one name per class; () means regression; None means that `load` takes the names from the data.
    The first of `metrics` selects the best checkpoint.  `config` is the name of the data set's configuration or
    subfolder, None where there is just one.  The labels of `test_splits` may be hidden.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    train_split: str = "train"
    evaluation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)
    label_column: str = "label"
    score_range: tuple[float, float] | None = None
    config: str | None = None
    allow_empty_text: bool = False

    @property
    def is_regression(self) -> bool:
        """Whether the labels are scores."""
        return self.label_names == ()

    @property
    def num_labels(self) -> int:
        """The width of the model's head: the number of classes, 1 for regression."""
        if self.label_names is None:
            raise ValueError(
                f"the classes of task {self.name!r} are read from the data: use the task that load returns"
            )
        return len(self.label_names) or 1


def _task(name: str, texts: str, labels: str, metrics: str, **other) -> Task:
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
    test_splits: Sequence[str] = (),
    **other,
) -> Task:
    """Describe a data set that is not in TASKS; `other` are further fields of Task.

    Leave `label_names` out and they are read from the data; give () for a score.  The metrics default to accuracy, or
    to Pearson and Spearman correlation for a score.

    Raises ValueError unless there are one or two text columns and none or at least two classes.
    """
    columns = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns)
    if len(columns) not in (1, 2):
        raise ValueError(f"task {name!r} has text columns {columns}; expected one or two")
    names = None if label_names is None else tuple(label_names)
    if names is not None and (len(names) == 1 or len(set(names)) < len(names)):
        raise ValueError(f"task {name!r} has label names {names}; expected different names of two or more classes")
    chosen = tuple(metrics or (("pearson", "spearmanr") if names == () else ("accuracy",)))
    return Task(name, columns, names, chosen, test_splits=tuple(test_splits), **other)


@dataclass(frozen=True)
class TaskData:
    """The splits of a task.  Each has a column `row`: where the example stands in the published split."""

    task: Task
    train: Dataset
    evaluation: dict[str, Dataset]
    test: dict[str, Dataset]
    feedback: Dataset | None = None


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
) -> TaskData:
    """Load a task from `source`, check every row and return its splits.

    `source` is "miniglue", the id of a data set on the Hugging Face hub, or a local folder: a copy of a hub data set,
    or files named `<split>.parquet`, `.jsonl`, `.json` or `.csv` in it or in its subfolder `task.config`.  A folder is
    read into memory anew each time, so a file that has changed is never mistaken for its old self.  Only a hub id uses
    the network.

    Labels may be class numbers, the names in `task.label_names`, or scores; they come back as class numbers or float32.
    The train split is cut to `max_train` rows and each evaluation split to `max_evaluation`, drawn with `seed` (a
    smaller limit gives a subset of a larger one's rows).  Then `feedback_fraction` of train is set aside as `feedback`,
    see `feedback_split`.  Test splits are never cut: a submission needs every row.

    Raises ValueError for an unknown task, a missing split or column, an empty text, a label out of range or a score
    that is NaN, all with split and row; OSError for data that cannot be had: FileNotFoundError for missing files,
    ConnectionError for an unreachable hub, plain OSError for damaged files.
    """
    task = task_for(task) if isinstance(task, str) else task
    for what, limit in (("max_train", max_train), ("max_evaluation", max_evaluation)):
        if limit is not None and limit < 1:
            raise ValueError(f"{what} is {limit}; expected at least 1, or None for all rows")
    loaded = _read(source, task)
    for split in (task.train_split, *task.evaluation_splits, *task.test_splits):
        if split not in loaded:
            raise ValueError(
                f"{source} has no split {split!r} for task {task.name!r}, it has {', '.join(loaded)}: complete the "
                "data, or name other splits with generic_task (train_split, evaluation_splits, test_splits)"
            )
    if task.label_names is None:
        task = replace(task, label_names=_label_names(loaded[task.train_split], task))
    train = _prepared(loaded[task.train_split], task, task.train_split)
    evaluation = {split: _prepared(loaded[split], task, split) for split in task.evaluation_splits}
    test = {split: _prepared(loaded[split], task, split) for split in task.test_splits}

    train = _subset(train, max_train, seed)
    evaluation = {split: _subset(rows, max_evaluation, seed) for split, rows in evaluation.items()}
    feedback = None
    if feedback_fraction:
        train, feedback = feedback_split(train, feedback_fraction, seed, task.label_column)
    return TaskData(task, train, evaluation, test, feedback)


def feedback_split(
    train: Dataset, fraction: float = 0.1, seed: int = 0, label_column: str = "label"
) -> tuple[Dataset, Dataset]:
    """Cut `train` into what the student trains on and a feedback set of `fraction` of the rows; they share no row.

    Stratified: every class, or every fifth of the scores, gives its share to within one row.

    Raises ValueError if either part would be empty.
    """
    size = round(fraction * len(train))
    if not 0 < size < len(train):
        raise ValueError(
            f"a feedback split of {fraction} of {len(train)} training rows has {size} rows and leaves "
            f"{len(train) - size}: choose a fraction between 0 and 1 that leaves rows on both sides"
        )
    generator = np.random.default_rng([seed, 1])
    strata = np.asarray(train.with_format("numpy")[label_column][:])
    if strata.dtype.kind == "f":
        strata = np.searchsorted(np.quantile(strata, (0.2, 0.4, 0.6, 0.8)), strata)
    # Shuffle within the strata, lay them end to end, and take every (n / size)-th row from a random start.
    order = np.lexsort((generator.random(len(train)), strata))
    taken = order[((np.arange(size) + generator.random()) * len(train) / size).astype(int)]
    rest = np.setdiff1d(np.arange(len(train)), taken)
    return train.select(rest), train.select(np.sort(taken))


def _read(source: str | Path, task: Task) -> Mapping[str, Dataset]:
    """The raw splits, from wherever `source` says."""
    if source == "miniglue":
        if task.name not in miniglue.TASK_NAMES:
            raise ValueError(
                f"task {task.name!r} is not part of 'miniglue', which has {', '.join(miniglue.TASK_NAMES)}: "
                "give a hub id such as 'nyu-mll/glue' or a local folder as the source"
            )
        return _read_folder(miniglue.folder(), task)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _read_folder(folder, task)
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise FileNotFoundError(f"there is no folder {str(source)!r} (looked in {Path.cwd()}): give the path of one")
    try:
        return datasets.load_dataset(source, task.config)
    except Exception as error:  # the hub client has dozens of ways to fail; one message serves them all
        reason = f"{type(error).__name__}: {_one_line(error)}"
        if isinstance(error, ValueError):
            raise ValueError(
                f"cannot read {source!r} from the hub with configuration {task.config!r}: {reason}"
            ) from error
        raise ConnectionError(
            f"cannot get data set {source!r} from the Hugging Face hub, and there is no folder of that name here. "
            "Without a network, give a local folder in the same layout as the source, or 'miniglue', which ships with "
            f"the book. The reason: {reason}"
        ) from error


def _read_folder(folder: Path, task: Task) -> dict[str, Dataset]:
    """All splits of a local folder, compared with what its README.md promises."""
    splits = (task.train_split, *task.evaluation_splits, *task.test_splits)
    home = folder / task.config if task.config and (folder / task.config).is_dir() else folder
    loaded = {}
    for split in splits:
        name = re.compile(re.escape(split) + r"(-\d{5}-of-\d{5}.*)?")
        files = sorted(path for path in home.iterdir() if path.suffix in _FORMATS and name.fullmatch(path.stem))
        formats = {_FORMATS[path.suffix] for path in files}
        if len(formats) > 1:
            raise ValueError(
                f"split {split!r} has files of several kinds in {home}: {', '.join(p.name for p in files)}"
            )
        for kind in formats:
            # Each split on its own: a test split without labels has other columns than train.
            options = _csv_options(task) if kind == "csv" else {}
            options["data_files"] = {split: [glob.escape(str(path)) for path in files]}
            loaded |= _read_files(folder, task, kind, **options)
    # No file is named after a split: `datasets` knows further layouts, such as data/train-00000-of-00001.parquet.
    loaded = loaded or _read_files(folder, task, str(folder), task.config)

    info = datasets.info.DatasetInfosDict.from_directory(str(folder)).get(task.config or "default")
    for split, promised in ((info and info.splits) or {}).items():
        if split in splits and split not in loaded:
            raise FileNotFoundError(f"no file of split {split!r}, which README.md lists, is in {home}. {_COPY_AGAIN}")
        if split in loaded and len(loaded[split]) != promised.num_examples:
            raise OSError(
                f"split {split!r} of task {task.name!r} in {folder} has {len(loaded[split])} rows, its README.md "
                f"promises {promised.num_examples}. {_COPY_AGAIN}, or correct the README"
            )
    label = ((info and info.features) or {}).get(task.label_column)
    if isinstance(label, ClassLabel):
        loaded = {split: _with_label_names(rows, task.label_column, label) for split, rows in loaded.items()}
    return loaded


def _with_label_names(rows: Dataset, column: str, label: ClassLabel) -> Dataset:
    """Name the classes where the file format has plain numbers; the numbers are checked later, with their rows."""
    if rows.features.get(column) != Value("int64"):
        return rows
    return Dataset(rows.data, datasets.DatasetInfo(features=datasets.Features({**rows.features, column: label})))


_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def _csv_options(task: Task) -> dict[str, Any]:
    """Text is text even where it reads "null" or "17"; one chunk, so that a column has one type throughout."""
    text = dict.fromkeys(task.text_columns, str)
    return {"converters": text, "keep_default_na": False, "na_values": [""], "chunksize": 1 << 30}


def _read_files(folder: Path, task: Task, *arguments, **options) -> dict[str, Dataset]:
    """`datasets.load_dataset` of local files into memory, its complaints put in words that name file and remedy.

    The cache that it insists on is thrown away at once.
    """
    with tempfile.TemporaryDirectory(prefix="kdlib-") as cache, _quiet():
        options["cache_dir"] = cache
        try:
            builder = datasets.load_dataset_builder(*arguments, **options)
        except ValueError as error:
            raise ValueError(
                f"folder {folder} has no configuration {task.config!r} for task {task.name!r}: {_one_line(error)}"
            ) from error
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"folder {folder} holds no data files for task {task.name!r}: {_one_line(error)}"
            ) from error
        for split, files in (builder.config.data_files or {}).items():
            _check_files(folder, split, [Path(path) for path in files])
        try:
            loaded = datasets.load_dataset(*arguments, **options, verification_mode="no_checks", keep_in_memory=True)
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            reason = _one_line(error.__cause__ or error)
            raise OSError(
                f"cannot read the files of task {task.name!r} in {folder}: {reason}. {_COPY_AGAIN}"
            ) from error
    return dict(loaded)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


_COPY_AGAIN = "The folder is damaged or half copied: copy it again"


def _check_files(folder: Path, split: str, files: list[Path]) -> None:
    """Raise OSError for missing shards, Git LFS pointers and truncated parquet files, before anything is parsed."""
    if not files:
        raise FileNotFoundError(f"no file of split {split!r} is in {folder}. {_COPY_AGAIN}")
    shards = [re.search(r"-(\d{5})-of-(\d{5})", path.name) for path in files]
    if all(shards) and len(shards) < (expected := int(shards[0][2])):
        raise FileNotFoundError(f"split {split!r} in {folder} has {len(files)} of {expected} files. {_COPY_AGAIN}")
    for path in files:
        with path.open("rb") as file:
            start = file.read(40)
            file.seek(max(0, path.stat().st_size - 4))
            end = file.read()
        if start.startswith(b"version https://git-lfs"):
            raise OSError(f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in its repository")
        if not start or (path.suffix == ".parquet" and (start[:4], end) != (b"PAR1", b"PAR1")):
            raise OSError(f"{path} is empty or cut short ({path.stat().st_size} bytes). {_COPY_AGAIN}")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of `datasets` inside: reading a local folder takes a moment, and they would end in notebooks."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# ---------------------------------------------------------------------------------------------------------------------
# Checking

_TEXT = ("string", "large_string")


def _prepared(dataset: Dataset, task: Task, split: str) -> Dataset:
    """Checked texts, labels as class numbers or float32 scores, and the column `row`."""
    present = dataset.column_names
    unlabelled = split in task.test_splits and task.label_column not in present
    for column in (*task.text_columns, *(() if unlabelled else (task.label_column,))):
        if column not in present:
            raise ValueError(
                f"split {split!r} of task {task.name!r} has no column {column!r}; it has {', '.join(present)}"
            )
    for column in task.text_columns:
        if dataset.features[column].dtype not in _TEXT:
            raise ValueError(f"column {column!r} of split {split!r} holds {dataset.features[column]}; expected text")
        texts = _series(dataset, column)
        bad = texts.isna() if task.allow_empty_text else texts.fillna("").str.strip() == ""
        if bad.any():
            raise ValueError(
                f"empty text in column {column!r}, row {bad.argmax()} of split {split!r} (task {task.name!r}, "
                f"{bad.sum()} such rows): fill or drop these rows, or set allow_empty_text in generic_task"
            )
    if unlabelled:
        labels = np.full(len(dataset), HIDDEN)
    else:
        labels = _labels(_series(dataset, task.label_column), dataset.features[task.label_column], task, split)
    feature = Value("float32") if task.is_regression else ClassLabel(names=list(task.label_names))
    labels = labels.astype(np.float32 if task.is_regression else np.int64)
    dataset = dataset.remove_columns([name for name in (task.label_column, "row") if name in present])
    return dataset.add_column(task.label_column, labels, feature=feature).add_column("row", np.arange(len(labels)))


def _labels(column: pd.Series, feature: ClassLabel | Value, task: Task, split: str) -> np.ndarray:
    """The labels as numbers; HIDDEN only in test splits.  Raises ValueError with the first bad value and its row."""
    hidden = split in task.test_splits
    if isinstance(feature, ClassLabel) and tuple(feature.names) != task.label_names:
        expected = "a score" if task.is_regression else f"the classes {', '.join(task.label_names)}, in this order"
        raise ValueError(
            f"the labels of split {split!r} are the classes {', '.join(feature.names)}, but task {task.name!r} expects "
            f"{expected}: describe this data set with generic_task"
        )
    if task.is_regression:
        low, high = task.score_range or (-np.inf, np.inf)
        expected = f"a score between {low:g} and {high:g}" if task.score_range else "a finite score"
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)
        bad = ~(np.isfinite(numbers) & (low <= numbers) & (numbers <= high))
    else:
        numbers, expected = column, f"a class number, 0 … {task.num_labels - 1}"
        if feature.dtype in _TEXT:
            numbers = column.map({name: number for number, name in enumerate(task.label_names)})
            expected = f"one of {', '.join(task.label_names)}"
        numbers = pd.to_numeric(numbers, errors="coerce").to_numpy(float, na_value=np.nan)
        bad = ~np.isin(numbers, np.arange(task.num_labels))
    if hidden:
        unknown = column.isna().to_numpy() | (numbers == HIDDEN)
        numbers, bad = np.where(unknown, HIDDEN, numbers), bad & ~unknown
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"label {column.tolist()[row]!r} in row {row} of split {split!r} (task {task.name!r}, {bad.sum()} such "
            f"rows): expected {expected}"
        )
    return numbers


def _label_names(train: Dataset, task: Task) -> tuple[str, ...]:
    """The names of the classes: the data set's own, else the sorted strings, else the numbers 0 … maximum of train."""
    feature = train.features.get(task.label_column)
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    dtype = getattr(feature, "dtype", "missing")
    values = set() if feature is None else set(_series(train, task.label_column).dropna())
    if dtype in _TEXT:
        names = tuple(sorted(values))
    elif dtype == "bool" or "int" in dtype:
        names = tuple(str(number) for number in range(int(max(values, default=0)) + 1))
    else:
        raise ValueError(
            f"cannot read the classes of task {task.name!r} from column {task.label_column!r}, which is {dtype}; the "
            f"columns are {', '.join(train.column_names)}. Give label_names, or label_names=() if it is a score"
        )
    if len(names) < 2:
        raise ValueError(f"column {task.label_column!r} of task {task.name!r} holds one class only: {names}")
    return names


def _series(dataset: Dataset, column: str) -> pd.Series:
    return dataset.select_columns([column]).to_pandas()[column]


def _subset(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng([seed, 0]).permutation(len(dataset))[:limit]))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and batches


@dataclass(frozen=True)
class Encoded:
    """A tokenised split, without padding: sample i owns the tokens `offsets[i]` to `offsets[i + 1]`.

    `labels` are int64 classes or float32 scores, `rows` the places in the published split.
    """

    input_ids: Int[Tensor, "tokens"]
    token_type_ids: Int[Tensor, "tokens"]
    offsets: Int[Tensor, "samples_and_one"]
    labels: Shaped[Tensor, "samples"]
    rows: Int[Tensor, "samples"]
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Int[Tensor, "samples"]:
        """Tokens per sample, special tokens included."""
        return self.offsets.diff()


def encode(dataset: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> Encoded:
    """Tokenise a split once; texts longer than `max_length` tokens are cut, of a pair the longer text first.

    Raises ValueError if `max_length` leaves no room for the texts or the tokenizer has no padding token.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text_columns) == 2)
    if max_length < special + len(task.text_columns):
        raise ValueError(f"max_length is {max_length}; {special} special tokens leave no room for the text")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no padding token; use a BERT-like tokenizer")
    ids, types, lengths = [], [], []
    for start in bar(range(0, len(dataset), 1000), "tokenising"):
        texts = dataset[start : start + 1000]
        tokens = tokenizer(
            *(texts[column] for column in task.text_columns),
            truncation=True,
            max_length=max_length,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        ids.append(np.fromiter(chain.from_iterable(tokens["input_ids"]), np.int32))
        types.append(np.fromiter(chain.from_iterable(tokens["token_type_ids"]), np.int8))
        lengths += map(len, tokens["input_ids"])
    return Encoded(
        input_ids=torch.from_numpy(np.concatenate([np.empty(0, np.int32), *ids])),
        token_type_ids=torch.from_numpy(np.concatenate([np.empty(0, np.int8), *types])),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        labels=torch.tensor(dataset[task.label_column][:], dtype=torch.float32 if task.is_regression else torch.int64),
        rows=torch.tensor(dataset["row"][:], dtype=torch.int64),
        pad_token_id=tokenizer.pad_token_id,
    )


def collate(encoded: Encoded, indices: Sequence[int]) -> dict[str, Tensor]:
    """The samples at `indices`, padded to the longest of them.

    Returns input_ids, attention_mask and token_type_ids `(batch, tokens)`, labels and rows `(batch,)`; int64 except
    for float32 scores.
    """
    chosen = torch.as_tensor(indices)
    lengths = encoded.lengths[chosen][:, None]
    position = torch.arange(int(lengths.max()))
    mask = position < lengths
    # Past a sample's end this points into its neighbours; the mask throws that away.
    where = (encoded.offsets[chosen][:, None] + position).clamp(max=len(encoded.input_ids) - 1)
    return {
        "input_ids": encoded.input_ids[where].long().masked_fill(~mask, encoded.pad_token_id),
        "attention_mask": mask.long(),
        "token_type_ids": encoded.token_type_ids[where].long().masked_fill(~mask, 0),
        "labels": encoded.labels[chosen],
        "rows": encoded.rows[chosen],
    }


def to_device(batch: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The same batch on `device`."""
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}


def length_grouped_batches(
    lengths: Int[Tensor, "samples"], batch_size: int, generator: torch.Generator, group: int = 50
) -> list[list[int]]:
    """Cut a random order into batches of samples of similar length, so that little is padded; the batches are shuffled.

    Samples are sorted by length within groups of `group` batches (fewer if that would leave less than four groups).
    Every sample is in exactly one batch, and only one batch may be smaller than `batch_size`.
    """
    lengths = torch.as_tensor(lengths)
    order = torch.randperm(len(lengths), generator=generator)
    group_size = batch_size * max(1, min(group, len(lengths) // (4 * batch_size)))
    grouped = [part[lengths[part].argsort(stable=True)] for part in order.split(group_size)]
    # transformers has such a sampler, but it leaves each group's batches in order of length, longest first.
    batches = [batch.tolist() for part in grouped for batch in part.split(batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def sequential_batches(lengths: Int[Tensor, "samples"], batch_size: int) -> list[list[int]]:
    """All samples once, shortest first, for evaluation; the caller puts the outputs back in order."""
    return [batch.tolist() for batch in torch.as_tensor(lengths).argsort(stable=True).split(batch_size)]


# ---------------------------------------------------------------------------------------------------------------------
# Submissions

_SUBMISSION_FILES = {
    "cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "qnli": "QNLI", "rte": "RTE",
    "wnli": "WNLI", "mnli-test_matched": "MNLI-m", "mnli-test_mismatched": "MNLI-mm",
}  # fmt: skip
_SUBMITTED_AS_NUMBERS = {"cola", "sst2", "mrpc", "qqp", "wnli", "mini-sst2", "mini-mrpc"}


def write_predictions(
    folder: str | Path, task: Task, outputs: Float[np.ndarray, "samples outputs"], split: str = "test"
) -> Path:
    """Write the predictions for a test split as the GLUE server wants them; return the file's path.

    Tab-separated `index` and `prediction`: class numbers or names as GLUE asks for each task, scores cut to their range
    with three decimals.  The files are CoLA.tsv, MNLI-m.tsv and so on, `<task>.tsv` for other tasks.  A file appears
    complete or not at all.

    Raises ValueError for outputs of another width than the task's or that hold NaN.
    """
    outputs = np.asarray(outputs)
    if outputs.ndim != 2 or outputs.shape[1] != task.num_labels:
        raise ValueError(f"outputs have shape {outputs.shape}; task {task.name!r} needs (samples, {task.num_labels})")
    if not np.isfinite(outputs).all():
        raise ValueError(f"the outputs for split {split!r} hold NaN or infinity: the model has diverged")
    if task.is_regression:
        predictions = [f"{score:.3f}" for score in np.clip(outputs[:, 0], *(task.score_range or (None, None)))]
    else:
        classes = outputs.argmax(axis=1)
        predictions = classes if task.name in _SUBMITTED_AS_NUMBERS else [task.label_names[c] for c in classes]
    name = task.name if split == "test" else f"{task.name}-{split}"
    path = Path(folder) / f"{_SUBMISSION_FILES.get(name, name)}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        table = pd.DataFrame({"index": range(len(outputs)), "prediction": predictions})
        table.to_csv(partial, sep="\t", index=False, lineterminator="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
