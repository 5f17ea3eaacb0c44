"""Where the splits of a data set are: in MiniGLUE, in a local folder of one of many layouts, or on the hub.

`find` says which splits there are and how each is read; nothing is read before it is asked for.  Only a hub id uses the
network: a local folder whose data card points elsewhere is refused.
"""

import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from kdlib import miniglue, tables
from kdlib.tables import COPY_AGAIN, Table

# `datasets` reports each use of a reader, for local files too, to a server on the internet and waits for the answer.
# Nothing that is here needs the network, so this is switched off for the whole process before anything is read.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


@dataclass(frozen=True)
class Wanted:
    """What is asked of a data set: `splits`, train first, and the columns `texts` and `others`, the label first.

    `task` is its name in messages, `config` its configuration or subfolder, None where there is just one.
    """

    task: str
    config: str | None
    splits: tuple[str, ...]
    texts: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """The splits of a data set, by name: `parts` read them.

    `promised` holds the rows that its data card promises, `classes` the names that the card gives the labels.
    """

    parts: dict[str, Callable[[], Table]]
    promised: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None


def also(split: str) -> tuple[str, ...]:
    """The names that a split may have; for "validation_matched" they are "dev_matched" and so on."""
    if not split.startswith("validation"):
        return (split,)
    return tuple(split.replace("validation", name, 1) for name in ("validation", "dev", "valid", "val", "eval"))


def name_of(split: str, present: Collection[str], where: object) -> str | None:
    """The name under which a split is there.  Raises ValueError if it could be either of several."""
    names = [name for name in also(split) if name in present]
    if len(names) > 1 and names[0] != split:
        raise ValueError(f"{where} has {' and '.join(names)}, and no split {split!r}: rename the one that is meant")
    return names[0] if names else None


def find(source: str | Path, wanted: Wanted) -> Source:
    """The splits, from wherever `source` says."""
    if source == "miniglue":
        if wanted.task not in miniglue.TASK_NAMES:
            raise ValueError(
                f"task {wanted.task!r} is not part of 'miniglue', which has {', '.join(miniglue.TASK_NAMES)}: "
                "give a hub id such as 'nyu-mll/glue' or a local folder as the source"
            )
        return _find_in_folder(miniglue.folder(), wanted)
    folder = local_path(source)
    if folder.is_dir():
        return _find_in_folder(folder, wanted)
    if folder.is_file():
        raise ValueError(f"{source} is a file: give the folder that holds it, with files named train, validation, test")
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise FileNotFoundError(f"there is no folder {str(source)!r} (looked in {Path.cwd()}): give the path of one")
    try:
        loaded = datasets.load_dataset(source, wanted.config)
    except Exception as error:  # the hub client has dozens of ways to fail; one message serves them all
        instead = "a local folder in the same layout as the source, or 'miniglue'"
        part = f"{source!r} from the hub with configuration {wanted.config!r}"
        raise not_from_hub(error, f"data set {source!r}", part, instead) from error
    return Source({split: partial(_table, rows, wanted) for split, rows in loaded.items()})


def not_from_hub(error: Exception, what: str, part: str, instead: str) -> ValueError | ConnectionError:
    """That `what` cannot be had from the hub, or a `part` of it not be read, as an error that says what to do."""
    reason = f"{type(error).__name__}: {tables.one_line(error)}"
    if isinstance(error, ValueError):
        return ValueError(f"cannot read {part}: {reason}")
    return ConnectionError(
        f"cannot get {what} from the Hugging Face hub, and nothing of that name is here. Without a network, give "
        f"{instead}, which ships with the book. The reason: {reason}"
    )


def local_path(source: str | Path) -> Path:
    """The path that `source` would be, `~` expanded.

    Raises ValueError for what no data can be in: nothing, the root of a file system, or somebody's whole home.
    """
    if not isinstance(source, str | Path) or not str(source).strip():
        raise ValueError(f"source is {source!r}; expected a folder, the id of a data set, or a name such as 'miniglue'")
    try:
        path, home = Path(source).expanduser(), Path.home().resolve()
    except RuntimeError as error:
        raise FileNotFoundError(f"there is no folder {str(source)!r}: {error}") from error
    if path.is_dir():
        whole = path.resolve()
        if whole in (home, Path(whole.anchor)) or re.fullmatch(r"~[^/\\]*[/\\]*", str(source)):
            what = "root of a file system" if whole == Path(whole.anchor) else "home folder"
            raise ValueError(f"source {str(source)!r} is a {what}: give the folder in it that holds the data")
    return path


def _table(rows: Dataset, wanted: Wanted) -> Table:
    """A split that `datasets` has read."""
    present = tuple(rows.column_names)
    names = [name for name in (*wanted.texts, *wanted.others) if name in present]
    features = {name: rows.features[name] for name in names}
    classes = {name: tuple(kind.names) for name, kind in features.items() if isinstance(kind, ClassLabel)}
    # A column that nobody wants may be anything, an image to decode included.
    rows = rows.select_columns(names)
    return Table({name: rows[name][:] for name in names}, present, classes)


def _find_in_folder(folder: Path, wanted: Wanted) -> Source:
    """The splits of a local folder, and what its README.md promises."""
    info = card_of(folder).get(wanted.config or "default")
    home = folder / wanted.config if wanted.config and (folder / wanted.config).is_dir() else folder
    parts: dict[str, Callable[[], Table]] = {}
    for split in chain.from_iterable(map(also, wanted.splits)):
        name = re.compile(re.escape(split) + r"(-\d{5}-of-\d{5}.*)?")
        files = sorted(
            path for path in home.iterdir()
            if tables.format_of(path) and name.fullmatch(Path(path.name.removesuffix(".gz")).stem) and path.is_file()
        )  # fmt: skip
        if len({tables.format_of(path) for path in files}) > 1:
            raise ValueError(
                f"split {split!r} has files of several kinds in {home}: {', '.join(p.name for p in files)}: keep one"
            )
        if files:
            parts[split] = partial(_read_files, home, split, files, wanted)
    if name_of(wanted.splits[0], parts, folder) is None:
        # `datasets` knows further layouts, such as data/train-00000-of-00001.parquet.
        parts = _find_by_layout(folder, home, wanted)
    label = ((info and info.features) or {}).get(wanted.others[0])
    promised = {split: promise.num_examples for split, promise in ((info and info.splits) or {}).items()}
    return Source(parts, promised, tuple(label.names) if isinstance(label, ClassLabel) else None)


def _read_files(folder: Path, split: str, files: list[Path], wanted: Wanted) -> Table:
    check_files(folder, split, files)
    return tables.read(files, wanted.texts, wanted.others)


def card_of(folder: Path) -> DatasetInfosDict:
    """What the folder's data card says of its data sets.

    Raises ValueError for a card that cannot be read, or that sends the reader elsewhere: local data stay local.
    """
    infos = DatasetInfosDict()
    for path in (folder / name for name in ("dataset_infos.json", "README.md", ".huggingface.yaml")):
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix == ".json":
                fields_of = {name: datasets.DatasetInfo.from_dict(info) for name, info in json.loads(text).items()}
                infos = DatasetInfosDict(fields_of)
                continue
            if path.suffix == ".yaml":
                text = f"---\n{text}\n---\n"
            if not text.lstrip().startswith("---"):
                continue  # a README for people
            card = DatasetCard(text).data.to_dict()
            MetadataConfigs.from_dataset_card_data(DatasetCardData(**card))
            infos |= DatasetInfosDict.from_dataset_card_data(DatasetCardData(**card))
        except Exception as error:  # YAML alone has a dozen: a garbled file, another encoding, a field of another type
            raise ValueError(
                f"the data card {path} cannot be read ({type(error).__name__}: {tables.one_line(error)}): mend the "
                "block between the lines '---' at its top, or move the file out of the folder"
            ) from error
        elsewhere = [text for text in _texts_in(card.get("configs")) if "://" in text]
        if elsewhere:
            raise ValueError(
                f"the data card {path} says that the data are at {elsewhere[0]!r}; a local folder is read without the "
                "network: copy the files into the folder and name them in the card, or remove its data_files"
            )
    return infos


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts_in(inner)


def _find_by_layout(folder: Path, home: Path, wanted: Wanted) -> dict[str, Callable[[], Table]]:
    """The splits of a folder that `datasets` knows to take apart; it reads what `tables` does not."""
    if (home / "dataset_dict.json").is_file():
        try:
            loaded = datasets.load_from_disk(str(home), keep_in_memory=True)
        except Exception as error:  # its files may lack anything
            raise tables.cannot_read(home, error) from error
        return {split: partial(_table, rows, wanted) for split, rows in loaded.items()}
    if (home / "state.json").is_file():
        raise ValueError(
            f"{home} holds a single Dataset that was saved by save_to_disk, without splits: save a "
            "DatasetDict(train=..., validation=...) instead, or files train.parquet and validation.parquet"
        )
    try:
        builder = layout_of(folder, wanted.config)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"folder {folder} holds no data files for task {wanted.task!r}: {tables.one_line(error)}. Expected "
            "files named train, validation (or dev) and test, each .csv, .tsv, .jsonl, .json or .parquet"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"folder {folder} has no configuration {wanted.config!r} for task {wanted.task!r}: {tables.one_line(error)}"
        ) from error
    files = {str(split): [Path(path) for path in paths] for split, paths in (builder.config.data_files or {}).items()}
    if reads_as_we_do(builder.config) and all(tables.format_of(path) for path in chain.from_iterable(files.values())):
        return {split: partial(_read_files, folder, split, paths, wanted) for split, paths in files.items()}
    for split, paths in files.items():
        check_files(folder, split, paths)
    loaded = _read_by_datasets(folder, wanted)
    return {split: partial(_table, rows, wanted) for split, rows in loaded.items()}


def layout_of(folder: Path, config: str | None) -> datasets.DatasetBuilder:
    """What `datasets` finds in a folder; nothing is read yet.  Raises FileNotFoundError and ValueError as it does."""
    with tempfile.TemporaryDirectory(prefix="kdlib-") as unused, quiet():
        # By its whole path: a folder that is called csv would be taken for the reader of that name.
        return datasets.load_dataset_builder(str(folder.resolve()), config, cache_dir=unused)


def reads_as_we_do(config: datasets.BuilderConfig) -> bool:
    """Whether the data card asks for no way of reading of its own, such as another separator."""
    ours = {"name", "version", "data_dir", "data_files", "description", "features", "sep"}
    usual = type(config)()
    differing = {f.name for f in fields(config) if getattr(config, f.name) != getattr(usual, f.name)}
    return differing <= ours and getattr(config, "sep", ",") in (",", "\t")


def _read_by_datasets(folder: Path, wanted: Wanted) -> dict[str, Dataset]:
    """The folder read into memory by `datasets`; the cache that it insists on is thrown away at once."""
    with tempfile.TemporaryDirectory(prefix="kdlib-") as cache, quiet():
        try:
            return dict(
                datasets.load_dataset(
                    str(folder.resolve()),
                    wanted.config,
                    cache_dir=cache,
                    verification_mode="no_checks",
                    keep_in_memory=True,
                )
            )
        except Exception as error:  # one reader for each of a dozen formats, each with errors of its own
            raise tables.cannot_read(f"the files of task {wanted.task!r} in {folder}", error) from error


def check_files(folder: Path, split: str, files: list[Path]) -> None:
    """Raise OSError for missing shards, Git LFS pointers and truncated parquet files, before anything is parsed."""
    if not files:
        raise FileNotFoundError(f"no file of split {split!r} is in {folder}. {COPY_AGAIN}")
    shards = [match for path in files if (match := re.search(r"-(\d{5})-of-(\d{5})", path.name))]
    if len(shards) == len(files) and len(files) < (expected := int(shards[0][2])):
        raise FileNotFoundError(f"split {split!r} in {folder} has {len(files)} of {expected} files. {COPY_AGAIN}")
    for path in files:
        with path.open("rb") as file:
            start = file.read(40)
            file.seek(max(0, path.stat().st_size - 4))
            end = file.read()
        if start.startswith(b"version https://git-lfs"):
            raise OSError(f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in its repository")
        if not start and path.suffix != ".parquet":
            raise OSError(f"{path} is empty (0 bytes): write it anew, or copy it again if it is not empty elsewhere")
        if not start or (path.suffix == ".parquet" and (start[:4], end) != (b"PAR1", b"PAR1")):
            raise OSError(f"{path} is empty or cut short ({path.stat().st_size} bytes). {COPY_AGAIN}")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of `datasets` inside: reading a local folder takes a moment, and they would end in notebooks."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
