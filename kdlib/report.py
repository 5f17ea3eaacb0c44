"""What a distilled student saves: teacher and student side by side, in size, latency, memory and score.

    print(report.report("_runs/mini-mnli-kd-seed0-ea234739").table.T)

Sizes, scores and training times come from the records.  Latency and memory are measured when asked for, on this machine
and on sentences of the run's own validation split.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from transformers import PreTrainedModel

from kdlib import engine, exports, metrics, models, runs
from kdlib.batches import Encoded, collate, sequential_batches, to_device
from kdlib.glue import encode
from kdlib.learner import Batch
from kdlib.machine import busy, processor
from kdlib.progress import notice
from kdlib.records import RECORD, RunRecord, read_record

Logits = Callable[[Batch], Any]
"""What a network or an exported file is here: a function of a batch."""
MIB = 2**20


@dataclass(frozen=True)
class Latency:
    """Seconds that a sentence takes in batches of `batch_size`, padded to `tokens`: median and interquartile range."""

    batch_size: int
    tokens: int
    median: float
    spread: float


@dataclass(frozen=True)
class Network:
    """What a network costs and what it scores."""

    name: str
    """"teacher", "student", and "student, ONNX" and "student, int8" where these files were made"""
    parameters: int
    """without those in tables of embeddings"""
    embeddings: int
    """parameters in tables of embeddings"""
    stored_bytes: int
    """of the weights on disk"""
    seconds: float | None
    """of its training; None where it was trained elsewhere"""
    scores: dict[str, float]
    """on the first validation split, by metric"""
    latency: tuple[Latency, ...] = ()
    """() where nothing was measured"""
    memory: int | None = None
    """bytes at the peak of inference on the largest batch, weights included; None where not measured, as in ONNX"""


@dataclass(frozen=True)
class Report:
    """The networks of a run, the teacher first, and what they were measured on."""

    run_id: str
    networks: tuple[Network, ...]
    measured_on: str | None = None

    @property
    def table(self) -> pd.DataFrame:
        """A row a network; millions of parameters, MiB, seconds, and milliseconds a sentence."""
        return pd.DataFrame({network.name: _row(network) for network in self.networks}).T


def _row(network: Network) -> dict[str, float]:
    row = {
        "million parameters": network.parameters / 1e6,
        "million in embeddings": network.embeddings / 1e6,
        "MiB on disk": network.stored_bytes / MIB,
        "seconds of training": float("nan") if network.seconds is None else network.seconds,
        **network.scores,
    }
    for each in network.latency:
        row[f"ms, batch {each.batch_size}"] = 1e3 * each.median
        row[f"± ms, batch {each.batch_size}"] = 1e3 * each.spread
    if network.latency:
        row["MiB at the peak"] = float("nan") if network.memory is None else network.memory / MIB
    return row


def report(
    run: RunRecord | Path | str, measure: bool = True, batch_sizes: tuple[int, ...] = (1, 32), seconds: float = 1.0
) -> Report:
    """The networks of a finished run on a task side by side: its teacher, its student, and what was exported.

    `run` is a record, or the folder of one.  With `measure` each batch size is timed for about `seconds`, by
    torch.utils.benchmark with as many threads as torch uses here; a batch holds sentences of `typical` lengths.
    Exported files are scored on the validation split, and run on the CPU.  A machine that is busy is told.

    Raises ValueError for a run on plain text and for a damaged record, OSError for a network that is gone, and what
    `runs.load_data` raises.
    """
    record = run if isinstance(run, RunRecord) else read_record(run)
    if "task" not in record.config:
        raise ValueError(
            f"{record.run_id} is a run on plain text: fine-tune its student, and ask for that run's report"
        )
    config = runs.configure(**{**record.config, "output_dir": str(record.folder.parent)})
    found = [_network(config, record, *who) for who in _who(config, record)]
    if not measure:
        return Report(record.run_id, tuple(network for network, _ in found))
    if others := busy():
        notice(f"this machine is busy ({others}): the latencies tell little, measure again when it is quiet")
    data = runs.load_data(config)
    split = next(iter(data.evaluation))
    reader = models.load_tokenizer(str(record.folder / engine.STUDENT))
    encoded = encode(data.evaluation[split], data.task, reader, config.max_length)
    batches = [collate(encoded, typical(encoded, size)) for size in batch_sizes]
    device: Any = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")

    def measured(network: Network, logits: Logits, batches: Sequence[Batch], **known: Any) -> Network:
        times = tuple(latency(logits, batch, seconds) for batch in batches)
        if not network.scores:
            scores = metrics.compute(data.task.metrics, answers(logits, encoded), encoded.labels.numpy())
            network = dataclasses.replace(network, scores=scores)
        return dataclasses.replace(network, latency=times, **known)

    done = []
    for network, where in found:
        module = models.load(where, data.task, reader)
        module.to(device)
        logits = partial(_answer, module)
        there = [to_device(batch, device) for batch in batches]
        done.append(measured(network, logits, there, memory=peak_memory(module, there[-1])))
    for name, file in (("student, ONNX", exports.ONNX), ("student, int8", exports.INT8)):
        path = record.folder / engine.STUDENT / file
        if path.exists():
            own = dataclasses.replace(found[-1][0], name=name, stored_bytes=path.stat().st_size, scores={})
            done.append(measured(own, exports.onnx_logits(path), batches))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return Report(record.run_id, tuple(done), f"{where}, {torch.get_num_threads()} threads")


def _who(config: runs.RunConfig, record: RunRecord) -> list[tuple[str, str, RunRecord | None]]:
    """The networks of a run: what each is called, where it is, and the record of the run that trained it first."""
    student = ("student", str(record.folder / engine.STUDENT), record)
    if config.method == "fine_tune":
        return [student]
    learnt, first = record.folder / engine.TEACHER_FOLDER, None
    if record.teacher is not None:
        if not (record.folder.parent / record.teacher / RECORD).exists():
            notice(f"the teacher's run {record.teacher} is not beside that of its student: the report is without it")
            return [student]
        first = read_record(record.folder.parent / record.teacher)
    if (record.folder / engine.ADAPTER).exists():
        notice("the teacher is shown without its adapter, as its own run left it")
    if learnt.is_dir():
        return [("teacher", str(learnt), first), student]
    return [("teacher", config.reader if first is None else str(first.folder / engine.STUDENT), first), student]


def _network(
    config: runs.RunConfig, record: RunRecord, name: str, where: str, first: RunRecord | None
) -> tuple[Network, str]:
    """What the records tell of a network; what they do not is looked up in the network itself."""
    split = next(iter(config.glue_task.evaluation_splits))
    taught = name == "teacher" and Path(where) == record.folder / engine.TEACHER_FOLDER
    prefix = f"teacher/{split}/" if taught else f"{split}/"
    values = (record if taught or first is None else first).metrics
    scores = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
    if first is None and not taught:
        scores = {}
    if first is not None and first.embeddings is not None and first.stored_bytes is not None:
        size = engine.Sizes(parameters=first.parameters, embeddings=first.embeddings, stored_bytes=first.stored_bytes)
    else:
        task = runs.load_data(config).task
        reader = models.load_tokenizer(config.reader if Path(where).is_dir() else where)
        size = engine.sizes(models.load(where, task, reader), Path(where))
    size["parameters"] -= size["embeddings"]
    return Network(name=name, **size, seconds=None if first is None else first.seconds, scores=scores), where


def typical(encoded: Encoded, size: int) -> list[int]:
    """The places of `size` samples whose lengths are quantiles of the split's: the middle one for 1."""
    by_length = encoded.lengths.argsort(stable=True)
    return by_length[((torch.arange(size) + 0.5) * len(encoded) / size).long()].tolist()


def latency(logits: Logits, batch: Batch, seconds: float = 1.0) -> Latency:
    """How long `logits(batch)` takes for each sample of the batch, over calls of about `seconds` together."""
    size, tokens = batch["input_ids"].shape
    timer = Timer("logits(batch)", globals={"logits": logits, "batch": batch}, num_threads=torch.get_num_threads())
    timer.timeit(2)
    found = timer.blocked_autorange(min_run_time=seconds)
    return Latency(size, tokens, found.median / size, found.iqr / size)


def answers(logits: Logits, encoded: Encoded, batch_size: int = 64) -> Float[np.ndarray, "samples classes"]:
    """The logits for a whole split, in its order."""
    order = sequential_batches(encoded.lengths, batch_size)
    parts = np.concatenate([np.asarray(logits(collate(encoded, indices))) for indices in order])
    return parts[np.argsort([place for indices in order for place in indices])]


def _answer(module: PreTrainedModel, batch: Batch) -> Float[Tensor, "batch classes"]:
    device = next(module.parameters()).device
    return models.targets(module, to_device(dict(batch), device)).logits.cpu()


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that an operation has made and that are still alive."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                if place not in self._known | self._alive:
                    self._alive.add(place)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, place, size)
        return out

    def _free(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.now -= size


def peak_memory(module: PreTrainedModel, batch: Batch) -> int:
    """Bytes of the weights and, at the worst moment, of the tensors that inference on `batch` holds at once.

    The same on each machine; what kernels and libraries need for themselves comes on top.
    """
    weights = [*module.parameters(), *module.buffers()]
    with _Alive([*weights, *batch.values()]) as alive:
        models.targets(module, batch)
    return sum(p.numel() * p.element_size() for p in weights) + alive.peak
