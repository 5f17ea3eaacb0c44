"""A network that learns: the module with its optimiser and schedule, as every method file needs it."""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn

from kdlib import processes

Batch = dict[str, Tensor]
"""What `batches.collate` returns, plus `positions`: where in the encoded training set each sample stands."""

BATCH_SIZE, WEIGHT_DECAY, WARMUP_RATIO = 32, 0.01, 0.1
"""BERT's own, unless somebody asks for others."""
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient became NaN or infinite; the weights are still those from before the step."""

    def __init__(self, name: str, loss: float, norm: float, rows: list[int]):
        super().__init__(
            f"the loss of the {name} is {loss}, its gradient's norm {norm}, on training rows {rows}. "
            "Lower the learning rate, train in fp32, or look at these rows"
        )
        self.rows = rows


@dataclass
class Learner:
    """A module, its optimiser and its learning-rate schedule."""

    name: str
    module: Any
    """an nn.Module: a network, or what is around one"""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | AcceleratedScheduler
    accelerator: Accelerator = field(repr=False)
    max_grad_norm: float = 1.0
    micro_batches: int = 1

    @property
    def taken(self) -> int:
        """How many steps it has taken."""
        return int(self.schedule.state_dict()["last_epoch"])

    def minimise(self, loss_function: Callable[[Batch], Tensor], batch: Batch) -> float:
        """One optimiser step on the mean of `loss_function(batch)`, one value per sample; return that mean.

        The batch is cut into `micro_batches` pieces whose gradients are added up, weighted by their size, so the step
        is the same as with the whole batch at once (dropout masks aside) and needs less memory.  Gradients are clipped
        to a total norm of `max_grad_norm`.

        Raises NonFiniteLossError, before the weights change, if loss or gradient are NaN or infinite.
        """
        return minimise_together([self], lambda piece: [loss_function(piece)], batch)[0]


def minimise_together(
    learners: list[Learner], loss_function: Callable[[Batch], list[Tensor]], batch: Batch
) -> list[float]:
    """One optimiser step of several learners at once, each on its own loss; return the means of the losses.

    `loss_function(batch)` returns one tensor `(batch,)` for each learner, computed with the weights from before the
    step.  A loss must not reach into another learner: what it takes from there has to be detached.  Pieces, clipping
    and errors are those of `Learner.minimise`; nobody moves unless all losses and gradients are finite.

    Where several processes share the rows, each calls this with the whole batch and the losses of all samples; the
    gradients through their own rows are added up.
    """
    accelerator, size = learners[0].accelerator, len(batch["labels"])
    totals = [torch.zeros((), device=accelerator.device)] * len(learners)
    for piece in split(batch, learners[0].micro_batches):
        with accelerator.autocast():
            losses = [values.sum() / size for values in loss_function(piece)]
        accelerator.backward(sum(losses[1:], losses[0]))
        totals = [total + loss.detach() for total, loss in zip(totals, losses, strict=True)]
    for who in learners:
        add_up(who.module)
    norms = [accelerator.clip_grad_norm_(who.module.parameters(), who.max_grad_norm) for who in learners]
    numbers = torch.stack([*totals, *(norm.to(totals[0].dtype) for norm in norms)]).tolist()
    values, sizes = numbers[: len(learners)], numbers[len(learners) :]
    for who, value, norm in zip(learners, values, sizes, strict=True):
        # With fp16 an infinite gradient is ordinary: the loss scaler skips the step and lowers its scale.
        finite_norm = math.isfinite(norm) or accelerator.scaler is not None
        if math.isnan(value) or not finite_norm:
            for other in learners:
                other.optimizer.zero_grad()
            raise NonFiniteLossError(who.name, value, norm, batch["rows"].tolist())
    for who in learners:
        who.optimizer.step()
        who.schedule.step()
        who.optimizer.zero_grad()
    return values


def add_up(module: nn.Module) -> None:
    """Make the gradients of a module whole: the sums over all processes."""
    moving = [parameter for parameter in module.parameters() if parameter.grad is not None]
    for parameter, whole in zip(moving, processes.summed([parameter.grad for parameter in moving]), strict=True):
        parameter.grad = whole


def split(batch: Batch, pieces: int) -> list[Batch]:
    """Cut a batch into at most `pieces` batches of nearly equal size, in order."""
    if pieces == 1:
        return [batch]
    cuts = {key: torch.tensor_split(value, min(pieces, len(value))) for key, value in batch.items()}
    return [{key: parts[i] for key, parts in cuts.items()} for i in range(len(cuts["labels"]))]


def accelerator_for(device: str = "auto", precision: str = "fp32") -> Accelerator:
    """The accelerate object for one device ("auto", "cpu", "cuda") and precision ("fp32", "bf16", "fp16").

    A process that torchrun or accelerate started as one of several joins the others; each has a GPU of its own.

    Raises ValueError for an unknown value, for "cuda" without a GPU, and for fp16 on a CPU; also what `processes.join`
    raises.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; expected 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU; use 'auto' or 'cpu'")
    processes.join(device)
    # accelerate keeps its state in the process; a notebook that trains in two precisions needs a fresh one.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device == "cpu" or (processes.world_size() > 1 and not torch.cuda.is_available()),
        mixed_precision=PRECISIONS[precision],
        # All processes take the same step of the schedule, instead of one each.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision 'fp16' needs a GPU; on a CPU use 'fp32' or 'bf16'")
    return accelerator


def learner(
    name: str,
    module: nn.Module,
    accelerator: Accelerator,
    learning_rate: float,
    total_steps: int,
    weight_decay: float = WEIGHT_DECAY,
    warmup_ratio: float = WARMUP_RATIO,
    max_grad_norm: float = 1.0,
    micro_batches: int = 1,
    stages: Sequence[float] = (1.0,),
) -> Learner:
    """A Learner with AdamW and linear warm-up and decay over `total_steps`; biases and LayerNorms are not decayed.

    With several `stages`, shares of the steps, the learning rate rises and falls in each of them.  The module is moved
    to the accelerator's device.
    """
    module.to(accelerator.device)
    optimizer = torch.optim.AdamW(weight_decay_groups(module, weight_decay), lr=learning_rate, fused=True)
    ends = stage_ends(stages, total_steps)

    def factor(step: int) -> float:
        stage = min(bisect.bisect_right(ends, step), len(ends) - 1)
        start = 0 if stage == 0 else ends[stage - 1]
        steps, done = ends[stage] - start, step - start
        warmup = round(warmup_ratio * steps)
        return done / warmup if done < warmup else max(0.0, (steps - done) / max(1, steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    return Learner(name, module, optimizer, schedule, accelerator, max_grad_norm, micro_batches)


def stage_ends(stages: Sequence[float], total_steps: int) -> list[int]:
    """After how many steps each stage of a training ends, the stages being given as shares of all steps."""
    return [round(share * total_steps) for share in itertools.accumulate(stages)]


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups for AdamW: matrices with weight decay, vectors (biases, LayerNorms) without."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
