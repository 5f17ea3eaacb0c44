"""Pilot steps: where the student would be after one step, while the student itself stays where it is.

A pilot step takes parameters, a dict from name to tensor, and returns new ones; the module only says what to compute
with them.  Dropout is off, so that the step descends the same function whose derivatives `kdlib.tangent` takes.

An update rule is a function of parameters and gradient: `sgd`, or `adamw` with the state of an optimiser.  The step
is the rule at the gradient.
"""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kdlib import losses, models, processes
from kdlib.learner import Batch, Learner
from kdlib.models import Outputs, Parameters, WantedOutputs

Loss = Callable[[Outputs, Mapping[str, Tensor]], Tensor]
"""`loss(outputs, batch)`: one value per sample, `(batch,)`, from the student's outputs and whatever the batch holds
(labels, the teacher's logits)."""


def task_loss(outputs: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
    """The task's own loss per sample, `(batch,)`, on the labels in the batch; see `losses.task_loss`."""
    return losses.task_loss(outputs.logits, batch["labels"], "none")


def gradient(
    student: nn.Module,
    parameters: Parameters,
    batch: Mapping[str, Tensor],
    loss: Loss = task_loss,
    create_graph: bool = False,
    among: Collection[str] | None = None,
    pieces: int = 1,
    **wanted: Unpack[WantedOutputs],
) -> Parameters:
    """The gradient of the mean loss at `parameters`, by name; zero for a parameter that plays no part.

    With `among` only that of the parameters of these names; the others are constants.

    With `create_graph=True` it can be differentiated in whatever the loss contains, for example the teacher's logits.
    `wanted` is passed on to `models.apply`: `hidden_states=True`, `attentions=True`.

    `pieces` cuts the batch into so many, one after the other: the same gradient up to rounding, and the graph of one
    piece at a time.  The loss then sees one piece of the batch, and each sample must stand alone in it.  Several
    processes share the rows of a piece, unless there is a graph to be made.

    Raises ValueError for fewer pieces than one, and what `models.apply` and the loss raise.

    Source: LGTM eq. (2), the gradient in it.  Derived in: chapters/01_distillation.
    """
    values = {name: value.detach() for name, value in parameters.items()}
    leaves = {name: value.requires_grad_() for name, value in values.items() if among is None or name in among}
    # Second derivatives need the slower attention, and so do those who ask for its weights.
    slow = create_graph or wanted.get("attentions")
    attention = models.exact_attention(student) if slow else nullcontext()

    def answers(rows: Mapping[str, Tensor]) -> Outputs:
        def network(own: Mapping[str, Tensor]) -> Outputs:
            return models.apply(student, values, own, **wanted)

        return network(rows) if create_graph else processes.by_rows(network, rows)

    with torch.enable_grad(), models.evaluating(student), attention:
        total: list[Tensor] = []
        for piece, share in cut(batch, pieces):
            mean = share * loss(answers(piece), piece).mean()
            slopes = torch.autograd.grad(mean, list(leaves.values()), create_graph=create_graph, materialize_grads=True)
            total = [one + more for one, more in zip(total, slopes, strict=True)] if total else list(slopes)
    return dict(zip(leaves, total if create_graph else processes.summed(total), strict=True))


def cut(batch: Mapping[str, Tensor], pieces: int) -> list[tuple[dict[str, Tensor], float]]:
    """At most `pieces` batches of nearly equal size, in order, each with its share of the samples.

    Raises ValueError for fewer pieces than one.
    """
    if pieces < 1:
        raise ValueError(f"pieces is {pieces}; expected 1 (the whole batch) or more")
    if pieces == 1:
        return [(dict(batch), 1.0)]
    samples = len(next(iter(batch.values())))
    parts = {name: torch.tensor_split(value, min(pieces, samples)) for name, value in batch.items()}
    rows = [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
    return [(row, len(next(iter(row.values()))) / samples) for row in rows]


def sgd(parameters: Parameters, gradient: Parameters, learning_rate: float) -> Parameters:
    """Plain gradient descent, θ − η ∇L.

    Raises ValueError unless the learning rate is a finite number that is not negative.
    """
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ValueError(f"learning_rate is {learning_rate}; expected a finite number ≥ 0")
    return {name: value - learning_rate * gradient[name] for name, value in parameters.items()}


def sgd_step(
    student: nn.Module,
    parameters: Parameters,
    batch: Mapping[str, Tensor],
    loss: Loss,
    learning_rate: float,
    create_graph: bool = False,
    **wanted: Unpack[WantedOutputs],
) -> Parameters:
    """The pilot student θ_s' = θ_s − η_s ∇ mean_i ℓ_i: new parameters; `student` and `parameters` stay as they are.

    `create_graph=True` lets a loss of the pilot student be differentiated in the teacher, the expensive way to the
    meta-gradient.  The other arguments and the errors are those of `gradient` and `sgd`.

    Source: LGTM eq. (6) and Algorithm 1, line 4; MetaDistil eq. (2) and Algorithm 1, the temporary copy.
    Derived in: chapters/02_influence.
    """
    descent = gradient(student, parameters, batch, loss, create_graph, **wanted)
    with torch.enable_grad():
        return sgd({name: value.detach() for name, value in parameters.items()}, descent, learning_rate)


@dataclass(frozen=True)
class AdamWState:
    """What AdamW knows before its next step: by parameter name its two moments and its weight decay; steps so far."""

    exp_avg: Parameters
    exp_avg_sq: Parameters
    weight_decay: dict[str, float]
    step: int = 0
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


def adamw_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], learning_rate: float | None = None
) -> AdamWState:
    """Read the state of a torch AdamW for these parameters, zeros before its first step; nothing is copied or changed.

    `learning_rate` replaces the optimiser's own.  Raises ValueError if the optimiser does not hold a parameter.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in groups]
    if missing:
        raise ValueError(f"the optimizer does not hold {models.some(missing)}: give it the student's own parameters")
    found = {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}

    def moments(kind: str) -> Parameters:
        return {name: found[name].get(kind, torch.zeros_like(value)).detach() for name, value in parameters.items()}

    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    return AdamWState(
        moments("exp_avg"),
        moments("exp_avg_sq"),
        {name: groups[id(parameter)]["weight_decay"] for name, parameter in parameters.items()},
        int(max((float(state.get("step", 0)) for state in found.values()), default=0)),
        group["lr"] if learning_rate is None else learning_rate,
        beta1,
        beta2,
        group["eps"],
    )


def adamw(parameters: Parameters, gradient: Parameters, state: AdamWState) -> Parameters:
    """Where AdamW's next step would lead: θ − η (m̂ / (√v̂ + ε) + λθ), with the moments after this gradient.

    The code released with LGTM makes its pilot step so.

    Source: AdamW (Loshchilov & Hutter, 2019).  Derived in: chapters/05_pilot_updates.
    """
    stepped = {}
    for name, value in parameters.items():
        mean, root = _moments(name, gradient[name], state)
        kept = value * (1 - state.learning_rate * state.weight_decay[name])
        stepped[name] = kept - state.learning_rate * mean / (root + state.epsilon)
    return stepped


def adamw_preconditioner(gradient: Parameters, state: AdamWState) -> Parameters:
    """D, where the derivative of AdamW's step in its gradient is −η · diag(D).

    Plain descent has D = 1.  The meta-gradient of an AdamW pilot step is that of plain descent with the feedback
    gradient g replaced by D ⊙ g.  A weight that this gradient does not touch, and no earlier one did, gets 0: the
    batch says nothing of it, and AdamW's derivative there is 1/ε.  The code released with LGTM leaves D out.

    Derived in: chapters/05_pilot_updates.
    """
    slopes = {}
    corrections = 1 - state.beta1 ** (state.step + 1), 1 - state.beta2 ** (state.step + 1)
    for name, value in gradient.items():
        mean, root = _moments(name, value, state)
        first = (1 - state.beta1) / corrections[0] / (root + state.epsilon)
        # The derivative of √v̂ is (1 − β₂) g / √v̂, bias correction included once.
        growth = (1 - state.beta2) / corrections[1] * value / root
        slope = first - mean * growth / (root + state.epsilon) ** 2
        slopes[name] = torch.where(root > 0, slope, 0.0)
    return slopes


def _moments(name: str, gradient: Tensor, state: AdamWState) -> tuple[Tensor, Tensor]:
    """m̂ and √v̂ after this gradient."""
    step = state.step + 1
    mean = state.beta1 * state.exp_avg[name] + (1 - state.beta1) * gradient
    square = state.beta2 * state.exp_avg_sq[name] + (1 - state.beta2) * gradient.square()
    return mean / (1 - state.beta1**step), (square / (1 - state.beta2**step)).sqrt()


@dataclass(frozen=True)
class Experiment:
    """A teaching experiment: the copy at its end, and what its steps went through.

    `places` and `outputs`: the parameters before each step, and what the copy answered there.  `slopes`: the diagonal
    Jacobian of the last step in its gradient, over −`rate`; None for plain gradient steps, where it is one.
    """

    copy: Parameters
    places: list[Parameters]
    outputs: list[Outputs]
    rate: float
    slopes: Parameters | None = None


def teaching_experiment(
    student: Learner,
    batch: Batch,
    targets: Outputs,
    loss: Callable[[Outputs, Outputs, Tensor], Tensor],
    rate: float,
    rule: Literal["sgd", "adamw"] = "sgd",
    steps: int = 1,
    pieces: int = 1,
    **wanted: Unpack[WantedOutputs],
) -> Experiment:
    """A copy of the student learns the batch, without dropout; the student and its optimiser stay as they are.

    `loss(student's outputs, teacher's outputs, labels)` has one value per sample; `targets` are the teacher's outputs.

    Source: MetaDistil eq. (2) and Algorithm 1, lines 3 and 4.  Derived in: chapters/05_pilot_updates.
    """
    copy, places, outputs, slopes = models.trainable(student.module), [], [], None
    for _ in range(steps):
        slope, answered = _gradient_and_outputs(student.module, copy, batch, targets, loss, pieces, **wanted)
        places.append(copy)
        outputs.append(answered)
        if rule == "sgd":
            copy = sgd(copy, slope, rate)
        else:
            learned = {name: student.module.get_parameter(name) for name in copy}
            state = adamw_state(student.optimizer, learned, rate)
            copy, slopes = adamw(copy, slope, state), adamw_preconditioner(slope, state)
    return Experiment(copy, places, outputs, rate, slopes)


def _gradient_and_outputs(
    module: nn.Module,
    parameters: Parameters,
    batch: Batch,
    targets: Outputs,
    loss: Callable[[Outputs, Outputs, Tensor], Tensor],
    pieces: int,
    **wanted: Unpack[WantedOutputs],
) -> tuple[Parameters, Outputs]:
    """The gradient of the student's loss at `parameters`, without dropout, and the outputs on the way."""
    outputs: list[Outputs] = []

    def of_piece(own: Outputs, piece: Mapping[str, Tensor]) -> Tensor:
        outputs.append(models.detached(own))
        return loss(own, tree_map(lambda values: values[piece["places"]], targets), piece["labels"])

    placed = {**batch, "places": torch.arange(len(targets.logits), device=targets.logits.device)}
    slope = gradient(module, parameters, placed, of_piece, pieces=pieces, **wanted)
    return slope, tree_map(lambda *parts: torch.cat(parts), *outputs)


def recording(values: list[Tensor]) -> Loss:
    """The task's loss, which also puts its values, by sample, into the list."""

    def loss(outputs: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        losses = task_loss(outputs, batch)
        values.append(losses.detach())
        return losses

    return loss


def loss_without_dropout(module: nn.Module, parameters: Parameters, batch: Batch) -> float:
    """The mean task loss on a batch, without dropout, at `parameters`, or at the module's own for an empty dict."""
    with torch.no_grad(), models.evaluating(module):
        outputs = processes.by_rows(lambda rows: models.apply(module, parameters, rows), batch)
    return task_loss(outputs, batch).mean().item()
