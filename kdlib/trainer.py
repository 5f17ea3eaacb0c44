"""The training loop: order of the data, evaluation, best weights, checkpoints, resuming, history.

The loop knows nothing of the method: it calls a `Step` once a batch.  It is ours, not `transformers.Trainer`, because
the later methods update two networks in turns.
"""

import copy
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel

from kdlib import checkpoints, glue, losses, metrics, models, processes
from kdlib.batches import Encoded, collate, length_grouped_batches, to_device
from kdlib.folders import prepare_folder
from kdlib.interrupts import asked_to_stop
from kdlib.learner import Batch, Learner, NonFiniteLossError
from kdlib.methods.base import Step
from kdlib.models import predict
from kdlib.progress import bar, line, notice

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
LOGITS = "logits-"
"""How the files begin that keep a fixed teacher's logits."""
ANCHOR = "anchor-"
"""How the files begin that keep the network as it was on its way, numbered from 0."""
PROCESSES = "processes"
"""Under which name a checkpoint's identity says how many wrote it, where it was not one."""
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
    teacher: PreTrainedModel,
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
    if processes.anybody(table is None) or table is None:
        teacher.to(accelerator.device)
        table = torch.from_numpy(predict(teacher, encoded, batch_size, "teacher logits", accelerator.autocast))
        if path is not None:
            _write(path, {"logits": table})
    table = table.to(accelerator.device)
    return lambda batch: table[batch["positions"]]


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """`checkpoints.write_tensors`, by the process that writes."""
    processes.once(lambda: checkpoints.write_tensors(path, tensors))


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


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, on what, and how it is judged.

    `step` moves the `learners`; the first of them ends with the weights of the evaluation with the highest `select`, or
    without `select` with its last ones, as the others do.  Of the evaluations up to step `select_after` none is chosen.
    What the step returns is averaged between two evaluations and goes into the history as "train_<name>".

    With `feedback` data the step is called with a batch of them as well, of `feedback_batch_size` samples or as many as
    in a training batch, drawn in an order of their own; `data` itself may be given for them, which says that the two
    are meant to be one.  `prepare(batch, number)` may add to the batch of step `number`, from 0, what is drawn anew
    each time, such as masks; it must depend on its arguments only.

    So many `anchors` of the first learner are kept in the run's folder, after equal numbers of steps: with three, after
    a quarter, a half and three quarters of them.
    """

    step: Step
    learners: Sequence[Learner]
    data: Encoded
    schedule: Schedule
    evaluate: Evaluate
    select: str | None = None
    select_after: int = 0
    feedback: Encoded | None = None
    feedback_batch_size: int | None = None
    prepare: Callable[[Batch, int], Batch] | None = None
    anchors: int = 0

    @property
    def kept(self) -> Learner:
        """The learner that the training is for."""
        return self.learners[0]

    @property
    def total(self) -> int:
        """The number of optimiser steps.  Raises ValueError if there is nothing to train on, or too little to keep."""
        total = self.schedule.total_steps(len(self.data))
        if total < 1:
            raise ValueError(f"nothing to train on: {len(self.data)} samples, {self.schedule.epochs} epochs")
        if total <= self.anchors:
            raise ValueError(
                f"a training of {total} steps cannot keep {self.anchors} networks on its way: give fewer anchors, or "
                "train longer"
            )
        return total

    def identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to: the schedule, but for how often it is saved, and all data."""
        own = {name: value for name, value in asdict(self.schedule).items() if name != "checkpoint_every"}
        found = {**own, "samples": len(self.data), "data": fingerprint(self.data, labels=True)}
        if self.feedback is None:
            return found
        if self.feedback is not self.data:
            _check_disjoint(self.data, self.feedback)
        return {**found, "feedback data": fingerprint(self.feedback, labels=True)}

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """What the steps from `start` on are called with: a batch each, and one of feedback data if there are any."""
        schedule, device = self.schedule, self.kept.accelerator.device
        order = training_batches(self.data, schedule, start, self.total)
        quizzes = feedback_batches(self.feedback, self.feedback_batch_size or schedule.batch_size, schedule.seed, start)
        for number, indices in enumerate(order, start):
            batch = training_batch(self.data, indices, device)
            found = [batch if self.prepare is None else self.prepare(batch, number)]
            if self.feedback is not None:
                found.append(training_batch(self.feedback, next(quizzes), device))
            yield found


@dataclass
class _State:
    """How far a training is: what a checkpoint keeps of it besides the learners."""

    identity: dict[str, Any]
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """of what the steps since the last evaluation have returned"""
    counts: dict[str, int] = field(default_factory=dict)
    """A step need not report everything: LGTM does not where it leaves the feedback out."""
    history: list[dict[str, float]] = field(default_factory=list)
    best_step: int = -1
    best_metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, values: dict[str, float]) -> None:
        """Count one more step, which returned these values."""
        self.step += 1
        self.sums |= {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.counts |= {name: self.counts.get(name, 0) + 1 for name in values}

    def judge(self, row: dict[str, float], select: str | None, after: int = 0) -> bool:
        """Take a row into the history and begin anew to add up; whether it is the best so far.

        What was best up to step `after` is not any more when there is a later one.
        """
        self.history.append(row)
        self.sums, self.counts = {}, {}
        better = not self.best_metrics or select is None or row[select] > self.best_metrics[select]
        better = better or self.best_step <= after < self.step
        if better:
            self.best_step = self.step
            self.best_metrics = {name: value for name, value in row.items() if "/" in name}
        return better


def train(
    training: Training,
    folder: Path | None = None,
    identity: dict[str, Any] | None = None,
    resume: bool = True,
    max_seconds: float | None = None,
) -> Result:
    """Run the steps of a training to its end.

    With a `folder` it survives being killed at any moment: started again, it goes on from the last checkpoint and ends
    with the same weights and history, bit for bit.  `identity` is stored with the checkpoint, together with the
    schedule and a fingerprint of all data; one that was written under another identity is refused.  Without a folder
    the best weights are held in memory.

    Ctrl-C, SIGTERM and SIGUSR1 finish the step under way, save and raise TrainingInterruptedError, which says how to
    resume.  So it ends after `max_seconds` of this call, too, if there are steps left.

    Several processes take the same steps together, see `kdlib.processes`; all of them stop if one is asked to.  A
    checkpoint belongs to as many processes as wrote it.  Dropout's masks differ from those of a single process.

    Raises NonFiniteLossError for a NaN or infinite loss (with the step, the rows and the last good checkpoint),
    CheckpointError if the folder cannot be written or holds a checkpoint of another run or a damaged one, ValueError
    for no data and for other feedback data that are also trained on, RuntimeError for processes that do not start with
    the same networks and data, `processes.ProcessLostError` when one of them ends.
    """
    schedule, kept, total = training.schedule, training.kept, training.total
    _seed(schedule.seed)
    state, best_weights = _begin(training, folder, identity or {}, resume)
    before, started = state.seconds, time.perf_counter()

    def save() -> None:
        state.seconds = before + time.perf_counter() - started
        if folder is not None:
            checkpoints.save(folder / CHECKPOINT, training.learners, asdict(state))

    for learner in training.learners:
        learner.module.train()
    with asked_to_stop() as stopping:
        for data in bar(training.batches(state.step), f"training {kept.name}", initial=state.step, total=total):
            try:
                state.add(training.step(*data))
            except NonFiniteLossError as error:
                raise _located(error, state.step + 1, folder) from error
            if folder is not None:  # before the checkpoint, or a killed run would go on without
                _keep_anchor(training, state.step, folder)
            if _due(state.step, schedule, len(training.data), total):
                row = _row(training, state)
                kept.accelerator.log(row, step=state.step)  # to nobody unless the run asked for a tracker
                if state.judge(row, training.select, training.select_after) and training.select is not None:
                    best_weights = checkpoints.module_tensors(kept.module)
                    if folder is not None:
                        _write(folder / BEST, best_weights)
                if schedule.checkpoint_every is None:
                    save()
                chosen = "" if training.select is None else f", {training.select} {row[training.select]:.4f}"
                line(f"{kept.name}: epoch {row['epoch']:.2f}, loss {row['train_loss']:.4f}{chosen}", started)
            if schedule.checkpoint_every is not None and state.step % schedule.checkpoint_every == 0:
                save()
            late = max_seconds is not None and time.perf_counter() - started > max_seconds and state.step < total
            if processes.anybody(stopping() or late):
                save()
                raise TrainingInterruptedError(_how_to_resume(state.step, total, folder))
    if training.select is not None:
        kept.module.load_state_dict(best_weights)
    for learner in training.learners:
        learner.module.eval()
    seconds = before + time.perf_counter() - started
    return Result(pd.DataFrame(state.history), state.best_step, state.best_metrics, seconds)


def _keep_anchor(training: Training, step: int, folder: Path) -> None:
    """Write the network if this is one of the steps after which it is kept."""
    for number in range(training.anchors):
        if step == round(training.total * (number + 1) / (training.anchors + 1)):
            _write(folder / f"{ANCHOR}{number}.safetensors", checkpoints.module_tensors(training.kept.module))


def anchors(folder: Path, count: int, network: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The networks that a run kept on its way, the first one first, each as a copy of `network` with other weights.

    Raises CheckpointError for a file that is damaged or gone.
    """
    for number in range(count):
        weights, _ = checkpoints.read_tensors(folder / f"{ANCHOR}{number}.safetensors")
        anchor = copy.deepcopy(network)
        anchor.load_state_dict(weights)
        yield anchor.eval()


def _seed(seed: int) -> None:
    """The first process draws as a single one does, each other one, for dropout, from a stream of its own."""
    set_seed(seed)
    if processes.rank() > 0:
        own = np.random.SeedSequence([seed, processes.rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(own[0]))


def _begin(
    training: Training, folder: Path | None, identity: dict[str, Any], resume: bool
) -> tuple[_State, dict[str, Tensor]]:
    """Where the training stands, its learners put back to there, and the best weights so far."""
    state = _State(training.identity() | identity)
    if processes.world_size() > 1:
        weights = {f"the weights of the {who.name}": models.fingerprint(who.module) for who in training.learners}
        processes.check_equal({**state.identity, **weights})
        state.identity[PROCESSES] = processes.world_size()
    if folder is None:
        return state, {}
    prepare_folder(folder)
    path = folder / CHECKPOINT
    if not resume:
        processes.once(lambda: _remove(path, folder / BEST))
    if not processes.once(path.exists):
        return state, {}
    state = _State(**_resume(path, training.learners, state.identity))
    chosen = training.select is not None and state.best_step >= 0
    return state, _best(folder / BEST, training.kept) if chosen else {}  # now, not after all the work that is left


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _row(training: Training, state: _State) -> dict[str, float]:
    """A row of the history: what the last steps have returned on average, and an evaluation."""
    return {
        "step": state.step,
        "epoch": state.step / math.ceil(len(training.data) / training.schedule.batch_size),
        "learning_rate": training.kept.optimizer.param_groups[0]["lr"],
        **{f"train_{name}": value / state.counts[name] for name, value in state.sums.items()},
        **training.evaluate(),
    }


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


def _resume(path: Path, learners: Sequence[Learner], identity: dict[str, Any]) -> dict[str, Any]:
    _, saved = checkpoints.read_tensors(path)
    found = saved["training"]["identity"]
    before, now = (one.get(PROCESSES, 1) for one in (found, identity))
    if before != now:
        raise checkpoints.CheckpointError(
            f"{path} was written by a run on {before} process{'es' if before > 1 else ''}, and now there "
            f"{'are' if now > 1 else 'is'} {now}: start as many, which goes on from it, or run with resume=False"
        )
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
