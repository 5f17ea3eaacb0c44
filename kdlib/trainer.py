"""The training loop: order of the data, evaluation, best weights, checkpoints, resuming, history.

The loop knows nothing of the method: it calls a `Step` once a batch.  It is ours, not `transformers.Trainer`, because
the later methods update two networks in turns.
"""

import hashlib
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from filelock import FileLock, Timeout
from torch import Tensor

from kdlib import checkpoints, glue, losses, metrics, models
from kdlib.batches import Encoded, collate, length_grouped_batches, to_device
from kdlib.interrupts import asked_to_stop
from kdlib.learner import Batch, Learner, NonFiniteLossError
from kdlib.methods import Step
from kdlib.models import predict
from kdlib.progress import bar, line, notice

CHECKPOINT, BEST, LOCK = "checkpoint.safetensors", "best.safetensors", ".lock"
LOGITS = "logits-"
"""How the files begin that keep a fixed teacher's logits."""
LOSS = "loss"
"""What the mean of the task's own loss on a split is called beside the task's metrics."""


@dataclass(frozen=True)
class Schedule:
    """How long and in which order: what the loop itself needs to know.

    `epochs` passes over the data in batches of `batch_size`, at most `max_steps` steps; an evaluation every
    `evaluate_every` steps (None: at the end of each epoch) and at the end; a checkpoint every `checkpoint_every` steps
    (None: after each evaluation).
    """

    epochs: int = 3
    batch_size: int = 32
    max_steps: int | None = None
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    seed: int = 0

    def total_steps(self, samples: int) -> int:
        """The number of optimiser steps for a training set of `samples`."""
        steps = self.epochs * math.ceil(samples / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass
class Result:
    """What a training run leaves: the history, one row an evaluation, the best evaluation's step and metrics, and the
    seconds it took, those before interruptions included."""

    history: pd.DataFrame
    best_step: int
    best_metrics: dict[str, float]
    seconds: float


class TrainingInterruptedError(KeyboardInterrupt):
    """Somebody asked the run to end or the time was up; the state was saved after the step that was under way."""


Evaluate = Callable[[], dict[str, float]]


def evaluation(
    learner: Learner,
    task: glue.Task,
    splits: dict[str, Encoded],
    batch_size: int = 128,
    others: Sequence[Learner] = (),
) -> Evaluate:
    """A function that returns the learner's metrics on every split, named "validation/accuracy" and so on.

    "validation/loss" is the mean of the task's own loss.  Those of `others` follow under their names:
    "teacher/validation/accuracy".
    """

    def evaluate() -> dict[str, float]:
        values = {}
        for who, prefix in ((learner, ""), *((other, f"{other.name}/") for other in others)):
            for name, encoded in splits.items():
                description = f"evaluating on {name}"
                outputs = predict(who.module, encoded, batch_size, description, who.accelerator.autocast)
                for metric, value in metrics.compute(task.metrics, outputs, encoded.labels.numpy()).items():
                    values[f"{prefix}{name}/{metric}"] = value
                # In float64: a mean over a large split.
                loss = losses.task_loss(torch.from_numpy(outputs).double(), encoded.labels)
                values[f"{prefix}{name}/{LOSS}"] = loss.item()
        return values

    return evaluate


def teacher_logits(
    teacher: torch.nn.Module,
    encoded: Encoded,
    accelerator: Accelerator,
    batch_size: int = 128,
    cache: Path | None = None,
) -> Callable[[Batch], Tensor]:
    """The logits of a fixed teacher, computed once for the whole training set and then looked up by position.

    With `cache`, a folder that belongs to this teacher, they are also kept on disk for later runs with the same weights
    on the same tokens in the same precision.  A file that is damaged is written anew.
    """
    path, table = None, None
    if cache is not None:
        weights, tokens = models.fingerprint(teacher), fingerprint(encoded)
        path = cache / f"{LOGITS}{weights}-{tokens}-{accelerator.mixed_precision}.safetensors"
        table = _kept_logits(path, len(encoded))
    if table is None:
        teacher.to(accelerator.device)
        table = torch.from_numpy(predict(teacher, encoded, batch_size, "teacher logits", accelerator.autocast))
        if path is not None:
            checkpoints.write_tensors(path, {"logits": table})
    table = table.to(accelerator.device)
    return lambda batch: table[batch["positions"]]


def _kept_logits(path: Path, samples: int) -> Tensor | None:
    """What `teacher_logits` has kept; None if there is nothing that can be used."""
    if not path.exists():
        return None
    try:
        table = checkpoints.read_tensors(path)[0]["logits"]
    except (checkpoints.CheckpointError, KeyError):
        table = None
    if table is None or len(table) != samples:
        notice(f"{path} is damaged: the teacher's logits are computed again")
        return None
    return table


def train(
    step: Step,
    learners: list[Learner],
    encoded: Encoded,
    schedule: Schedule,
    evaluate: Evaluate,
    select: str | None,
    keep: Learner,
    folder: Path | None = None,
    identity: dict[str, Any] | None = None,
    resume: bool = True,
    feedback: Encoded | None = None,
    feedback_batch_size: int | None = None,
    prepare: Callable[[Batch, int], Batch] | None = None,
    max_seconds: float | None = None,
) -> Result:
    """Run `step` over the data; end with the weights of `keep` from the evaluation with the highest `select`.

    Without `select` it ends with the last weights.  `prepare(batch, number)` may add to the batch of step `number`,
    from 0, what is drawn anew each time, such as masks; it must depend on its arguments only.

    With `feedback` data the step is called with a batch of them as well, of `feedback_batch_size` samples or as many as
    in a training batch, drawn in an order of their own; `encoded` itself may be given for them, which says that the two
    are meant to be one.  What the step returns is averaged between two evaluations and
    goes into the history as "train_<name>".  Learners other than `keep` end with their last weights.

    With a `folder` the run survives being killed at any moment: started again, it goes on from the last checkpoint and
    ends with the same weights and history, bit for bit.  `identity` is stored with the checkpoint, together with the
    schedule and a fingerprint of all data; one that was written under another identity is refused.  Without a folder
    the best weights are held in memory.

    Ctrl-C, SIGTERM and SIGUSR1 finish the step under way, save and raise TrainingInterruptedError, which says how to
    resume.  So it ends after `max_seconds` of this call, too, if there are steps left.

    Raises NonFiniteLossError for a NaN or infinite loss (with the step, the rows and the last good checkpoint),
    CheckpointError if the folder cannot be written or holds a checkpoint of another run or a damaged one, ValueError
    for no data and for other feedback data that are also trained on.
    """
    accelerator = keep.accelerator
    total = schedule.total_steps(len(encoded))
    if total < 1:
        raise ValueError(f"nothing to train on: {len(encoded)} samples, {schedule.epochs} epochs")
    if feedback is not None and feedback is not encoded:
        _check_disjoint(encoded, feedback)
    # How often the state is saved may change from one sitting to the next.
    own = {name: value for name, value in asdict(schedule).items() if name != "checkpoint_every"}
    identity = {**own, "samples": len(encoded), "data": fingerprint(encoded, labels=True), **(identity or {})}
    if feedback is not None:
        identity["feedback data"] = fingerprint(feedback, labels=True)
    state: dict[str, Any] = {
        "identity": identity,
        "step": 0,
        "sums": {},
        "counts": {},
        "history": [],
        "best_step": -1,
        "best_metrics": {},
        "seconds": 0.0,
    }
    best_weights: dict[str, Tensor] = {}
    set_seed(schedule.seed)
    if folder is not None:
        prepare_folder(folder)
        if resume and (folder / CHECKPOINT).exists():
            state = _resume(folder / CHECKPOINT, learners, identity)
            if select is not None and state["best_step"] >= 0:
                best_weights = _best(folder / BEST, keep)  # now, not after all the work that is left
        elif not resume:
            for stale in (CHECKPOINT, BEST):
                (folder / stale).unlink(missing_ok=True)

    seconds_before, started = state["seconds"], time.perf_counter()

    def save() -> None:
        state["seconds"] = seconds_before + time.perf_counter() - started
        if folder is not None:
            checkpoints.save(folder / CHECKPOINT, learners, state)

    for learner in learners:
        learner.module.train()
    with asked_to_stop() as stopping:
        batches = training_batches(encoded, schedule, state["step"], total)
        quizzes = feedback_batches(feedback, feedback_batch_size or schedule.batch_size, schedule.seed, state["step"])
        for indices in bar(batches, f"training {keep.name}", initial=state["step"], total=total):
            data = [training_batch(encoded, indices, accelerator.device)]
            if prepare is not None:
                data[0] = prepare(data[0], state["step"])
            if feedback is not None:
                data.append(training_batch(feedback, next(quizzes), accelerator.device))
            try:
                values = step(*data)
            except NonFiniteLossError as error:
                raise _located(error, state["step"] + 1, folder) from error
            state["step"] += 1
            sums = {name: state["sums"].get(name, 0.0) + value for name, value in values.items()}
            state["sums"] = state["sums"] | sums
            # A step need not report everything: LGTM does not where it leaves the feedback out.
            state["counts"] = state["counts"] | {name: state["counts"].get(name, 0) + 1 for name in values}
            if _due(state["step"], schedule, len(encoded), total):
                row = {
                    "step": state["step"],
                    "epoch": state["step"] / math.ceil(len(encoded) / schedule.batch_size),
                    "learning_rate": keep.optimizer.param_groups[0]["lr"],
                    **{f"train_{name}": value / state["counts"][name] for name, value in state["sums"].items()},
                    **evaluate(),
                }
                state["history"].append(row)
                state["sums"], state["counts"] = {}, {}
                if not state["best_metrics"] or select is None or row[select] > state["best_metrics"][select]:
                    state["best_step"] = state["step"]
                    state["best_metrics"] = {name: value for name, value in row.items() if "/" in name}
                    if select is not None:
                        best_weights = checkpoints.module_tensors(keep.module)
                    if select is not None and folder is not None:
                        checkpoints.write_tensors(folder / BEST, best_weights)
                if schedule.checkpoint_every is None:
                    save()
                chosen = "" if select is None else f", {select} {row[select]:.4f}"
                line(f"{keep.name}: epoch {row['epoch']:.2f}, loss {row['train_loss']:.4f}{chosen}", started)
            if schedule.checkpoint_every is not None and state["step"] % schedule.checkpoint_every == 0:
                save()
            late = max_seconds is not None and time.perf_counter() - started > max_seconds and state["step"] < total
            if stopping() or late:
                save()
                raise TrainingInterruptedError(_how_to_resume(state["step"], total, folder))
    if select is not None:
        keep.module.load_state_dict(best_weights)
    for learner in learners:
        learner.module.eval()
    seconds = seconds_before + time.perf_counter() - started
    return Result(pd.DataFrame(state["history"]), state["best_step"], state["best_metrics"], seconds)


def training_batches(encoded: Encoded, schedule: Schedule, start: int, total: int) -> Iterator[list[int]]:
    """The batches of steps `start` … `total` − 1 as positions; an epoch's order depends on the seed and its number."""
    per_epoch = math.ceil(len(encoded) / schedule.batch_size)
    for epoch in range(start // per_epoch, math.ceil(total / per_epoch)):
        generator = torch.Generator().manual_seed(1_000_003 * schedule.seed + epoch)
        order = length_grouped_batches(encoded.lengths, schedule.batch_size, generator)
        first = max(start - epoch * per_epoch, 0)
        yield from order[first : total - epoch * per_epoch]


def feedback_batches(encoded: Encoded | None, batch_size: int, seed: int, start: int) -> Iterator[list[int]]:
    """The feedback batches of steps `start` … without end, as positions; each pass over the data has its own order."""
    if encoded is None:
        return
    per_pass = math.ceil(len(encoded) / batch_size)
    for number in itertools.count(start // per_pass):
        # Not the seeds of the training order: the two must not march in step.
        generator = torch.Generator().manual_seed(1_000_003 * seed + 500_000 + number)
        order = length_grouped_batches(encoded.lengths, batch_size, generator)
        yield from order[start - number * per_pass if number == start // per_pass else 0 :]


def training_batch(encoded: Encoded, indices: list[int], device: torch.device) -> Batch:
    """The padded batch at these positions, with the positions themselves, on `device`."""
    batch = collate(encoded, indices)
    batch["positions"] = torch.tensor(indices)
    return to_device(batch, device)


def prepare_folder(folder: Path) -> None:
    """Create `folder`, see that it can be written, before any work is done, and clear what a killed run left.

    Raises CheckpointError that names the folder and the remedy.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
        for stale in folder.glob(".*.tmp"):  # left by a run that was killed while it wrote
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Put an OSError of the block into a CheckpointError that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise checkpoints.CheckpointError(
            f"cannot write to {folder} ({error.strerror or error}): choose another output_dir"
        ) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Create `folder`; keep others out who compute the same run, or wait until they have left.

    A process that is killed leaves too: its lock is the operating system's.

    Raises CheckpointError if `folder` cannot be written.
    """
    lock = FileLock(folder / LOCK)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            notice(f"{folder.name} is being computed by another process: waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_disjoint(encoded: Encoded, feedback: Encoded) -> None:
    if len(feedback) == 0:
        raise ValueError("the feedback set is empty: raise feedback_fraction, or max_train")
    shared = sorted(set(encoded.rows.tolist()) & set(feedback.rows.tolist()))
    if shared:
        raise ValueError(
            f"{len(shared)} rows are in the training set and in the feedback set, row {shared[0]} among them: feedback "
            "must come from data the student does not train on (glue.feedback_split cuts them apart)"
        )


def fingerprint(encoded: Encoded, labels: bool = False) -> str:
    """A short name for exactly these tokens, or for these tokens with these labels."""
    digest = hashlib.sha256()
    parts = [encoded.input_ids, encoded.token_type_ids, encoded.offsets]
    for tensor in (*parts, encoded.labels) if labels else parts:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def _due(step: int, schedule: Schedule, samples: int, total: int) -> bool:
    every = schedule.evaluate_every or math.ceil(samples / schedule.batch_size)
    return step % every == 0 or step == total


def _resume(path: Path, learners: list[Learner], identity: dict[str, Any]) -> dict[str, Any]:
    _, saved = checkpoints.read_tensors(path)
    found = saved["training"]["identity"]
    differing = sorted(key for key in found.keys() | identity.keys() if found.get(key) != identity.get(key))
    if differing:
        changes = "; ".join(f"{key}: {found.get(key)!r} there, {identity.get(key)!r} now" for key in differing)
        raise checkpoints.CheckpointError(
            f"{path} belongs to another run ({changes}): choose another output_dir, or run with resume=False"
        )
    return checkpoints.load(path, learners)


def _best(path: Path, keep: Learner) -> dict[str, Tensor]:
    """The weights of the best evaluation so far.  Raises CheckpointError if they are gone or not this network's."""
    try:
        weights = checkpoints.read_tensors(path)[0]
    except checkpoints.CheckpointError as error:
        raise checkpoints.CheckpointError(
            f"the weights of the best evaluation so far cannot be read ({error}). The run cannot end without them: "
            "start it afresh with resume=False"
        ) from error
    expected = keep.module.state_dict()
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in expected.items()}:
        raise checkpoints.CheckpointError(
            f"{path} holds the weights of another network than the {keep.name}: start the run afresh with resume=False"
        )
    return weights


def _located(error: NonFiniteLossError, step: int, folder: Path | None) -> NonFiniteLossError:
    checkpoint = None if folder is None else folder / CHECKPOINT
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint and checkpoint.exists() else "no checkpoint yet"
    error.args = (f"step {step}: {error.args[0]}; {kept}",)
    return error


def _how_to_resume(step: int, total: int, folder: Path | None) -> str:
    if folder is None:
        return f"interrupted after step {step} of {total}; nothing was saved, because the run has no folder"
    return f"interrupted after step {step} of {total}; run the same command again to go on from {folder / CHECKPOINT}"
