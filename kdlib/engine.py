"""A run is prepared, trained and finished, once, whatever it trains: the same for GLUE and for plain text.

A run has a folder of its own, named after what it computes.  Its record is written last and marks it as finished; until
then a run that was interrupted goes on from its checkpoint.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypedDict

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib import files, machine, models, processes, trackers, trainer
from kdlib.folders import alone_in, prepare_folder, writing_to
from kdlib.records import RECORD, RunRecord, read_record, write_record
from kdlib.trainer import Result, Training

STUDENT, TEACHER_FOLDER = "student", "teacher"
"""The networks that a run leaves, as folders for `from_pretrained`."""
ADAPTER = "adapter.safetensors"
"""What a run leaves of a teacher of which only a part has learned."""


class Config(Protocol):
    """What the engine must know of a run's configuration."""

    @property
    def flat(self) -> dict[str, Any]:
        """All parameters as one dict."""

    @property
    def identity(self) -> dict[str, Any]:
        """Those that decide the result."""

    @property
    def contents(self) -> dict[str, str]:
        """What data and networks from outside the package are."""

    @property
    def run_id(self) -> str:
        """The name of what is computed."""

    @property
    def folder(self) -> Path:
        """Where it is kept."""

    @property
    def max_seconds(self) -> float | None:
        """How long it may take."""

    @property
    def log_with(self) -> trackers.Tracker | None:
        """Who follows it while it trains."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a kind of run says of itself in its record; the fields are those of `RunRecord`."""

    metrics: dict[str, float]
    samples: dict[str, int]
    parameters: int
    embeddings: int | None = None
    stored_bytes: int | None = None
    teacher: str | None = None
    oracle: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """A run before its first step: everything is loaded and checked.

    `finish` writes the networks and whatever else is left in the folder, but for the record.
    """

    training: Training
    finish: Callable[[Result], Findings]


def name_of(what: str, identity: Mapping[str, Any]) -> str:
    """A readable name that is unique for an identity."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{what.replace('/', '-')}-{digest[:8]}"


def run(config: Config, prepare: Callable[[], Prepared]) -> RunRecord:
    """The record of a run, computed unless it is there.

    While it is computed, others who want the same run wait.  What a finished run whose record is gone has left is
    removed before: it may be of other data.  Of several processes that compute the run together the first one writes.

    Raises what `prepare` and the trainer raise; CheckpointError if the folder cannot be written.
    """
    folder = config.folder
    if _finished(folder):
        return read_record(folder)  # without a lock, which a folder that is only read could not hold
    with alone_in(folder):
        if _finished(folder):
            return read_record(folder)
        prepare_folder(folder)
        processes.once(lambda: _clear(folder))
        return _compute(config, prepare)


def _finished(folder: Path) -> bool:
    with writing_to(folder):  # a name that is too long for a file is an error here already
        return processes.once((folder / RECORD).exists)


def _compute(config: Config, prepare: Callable[[], Prepared]) -> RunRecord:
    started = time.perf_counter()
    trackers.check(config.log_with)
    prepared = prepare()
    accelerator = prepared.training.kept.accelerator
    left = None if config.max_seconds is None else config.max_seconds - (time.perf_counter() - started)
    identity = {**config.identity, **config.contents}
    with trackers.following(accelerator, config.log_with, config.folder, config.identity):
        result = trainer.train(prepared.training, config.folder, identity, max_seconds=left)
    record = RunRecord(
        run_id=config.run_id,
        config=config.flat,
        best_step=result.best_step,
        history=result.history.to_dict("records"),
        seconds=round(result.seconds, 1),
        environment=machine.environment(accelerator.device),
        git_commit=machine.git_commit(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        contents=config.contents,
        folder=config.folder,
        **{f.name: getattr(found, f.name) for found in [prepared.finish(result)] for f in dataclasses.fields(found)},
    )
    processes.once(lambda: _record(record))
    return record


def _record(record: RunRecord) -> None:
    """Mark the run as finished, and remove what only an interrupted one needs."""
    write_record(record)
    for leftover in (trainer.CHECKPOINT, trainer.BEST):
        (record.folder / leftover).unlink(missing_ok=True)


def forget(folder: Path) -> None:
    """Remove what a run left in `folder`, the record first; nothing else.  Waits for a process that computes it.

    Raises CheckpointError if the folder cannot be written.
    """
    if processes.once(folder.exists):
        with alone_in(folder):
            processes.once(lambda: _remove(folder))


def _remove(folder: Path) -> None:
    (folder / RECORD).unlink(missing_ok=True)
    _clear(folder)
    shutil.rmtree(folder / trackers.TRACKED, ignore_errors=True)
    for state in (trainer.CHECKPOINT, trainer.BEST):
        (folder / state).unlink(missing_ok=True)
    for anchor in folder.glob(f"{trainer.ANCHOR}*"):
        anchor.unlink()


def _clear(folder: Path) -> None:
    """Remove what only a finished run has: networks, predictions, logits."""
    for network in (STUDENT, TEACHER_FOLDER):
        shutil.rmtree(folder / network, ignore_errors=True)
    for left in (*folder.glob(f"{trainer.LOGITS}*"), *folder.glob("*.tsv"), *folder.glob(ADAPTER)):
        left.unlink()


class Sizes(TypedDict):
    """How large a network is: its parameters, those of them in tables of embeddings, bytes of its weights on disk."""

    parameters: int
    embeddings: int
    stored_bytes: int


def sizes(network: nn.Module, folder: Path) -> Sizes:
    """How large a network is that was saved in `folder`."""

    def count(modules: Iterable[nn.Module]) -> int:
        return sum(p.numel() for p in {p for module in modules for p in module.parameters()})

    tables = (module for module in network.modules() if isinstance(module, nn.Embedding))

    def stored() -> int:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    return {"parameters": count([network]), "embeddings": count(tables), "stored_bytes": processes.once(stored)}


def save_pretrained(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer as a folder for `from_pretrained`, complete or not at all."""

    def write() -> None:
        with files.written(folder) as temporary, models.quiet():
            network.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)

    processes.once(write)
