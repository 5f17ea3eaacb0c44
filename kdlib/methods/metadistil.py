"""MetaDistil: the teacher learns from what its lesson does to a pilot copy of the student.

The derivative of the pilot student's loss in the teacher needs no second backward pass: one tangent of the student and
one backward pass of the teacher give it exactly (chapters/03_finite_differences).

Source: MetaDistil Algorithm 1, eqs. (2)-(3); LGTM eqs. (5)-(7), the same without the pilot update.
Derived in: chapters/05_pilot_updates.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kdlib import losses, models, pilot
from kdlib.imitation import Imitation
from kdlib.learner import Batch, Learner
from kdlib.losses import Objective
from kdlib.methods import Step, mean_entropy
from kdlib.methods.online import detached
from kdlib.models import Outputs, Parameters
from kdlib.tangent import (
    TangentMethod,
    distillation_influence,
    feedback_gradient,
    hessian_vector_product,
    student_tangent,
)

PilotRule = Literal["sgd", "adamw"]
PILOT_RULES: tuple[PilotRule, ...] = ("sgd", "adamw")


def metadistil(
    student: Learner,
    teacher: Learner,
    imitation: Imitation,
    pilot_update: bool = True,
    inner_steps: int = 1,
    pilot_rule: PilotRule = "sgd",
    pilot_learning_rate: float | None = None,
    tangent: TangentMethod = "jvp",
    tangent_precision: Literal["fp32", "autocast"] = "fp32",
    watch: Batch | None = None,
    pilot_pieces: int = 1,
) -> Step:
    """A step on a training batch and a feedback batch ("quiz"), in the order of Algorithm 1.

    The teaching experiment: a copy of the student takes `inner_steps` steps on the batch, without dropout.  The quiz:
    the copy's loss on the feedback batch, seen as a function of the teacher, is lowered by a step of the teacher.  The
    copy is discarded, and the real student learns the same batch from the new teacher.  With `pilot_update=False` the
    real student learns from the teacher as it was, which is what the copy did.

    The copy takes plain gradient steps ("sgd"), as in eq. (2), or one that AdamW would take ("adamw"), at
    `pilot_learning_rate`, or at the student's present rate.  `tangent` and `tangent_precision` say how its derivative
    is computed; with "autocast" in the precision that the networks train in.

    `pilot_pieces` cuts both batches into so many for the gradients of experiment and quiz.  Their graphs lie on top of
    the teacher's, which waits for its backward pass: in pieces the step needs less memory, and is the same up to
    rounding.

    `watch`, a batch of held-out data, adds measurements to the log, which cost passes and change nothing: those of
    `won_tied_lost`, of the real step with the teaching experiment on that batch, and "teacher_closer", 1 if the
    teacher's step brought it closer to the student on the training batch.  The comparison is fair if copy and student
    would take the same step from the same lesson: `pilot_rule` "adamw", no dropout, and a student that does not clip
    its gradient, as the copy does not (clipping has a Jacobian that is not diagonal, and would have to be
    differentiated).

    Raises ValueError for several AdamW steps (their Jacobian is not diagonal), for `micro_batches`, which would cut the
    answer that the teacher is differentiated through, and for `pilot_pieces` with an objective that compares samples.

    Source: MetaDistil Algorithm 1.  Derived in: chapters/05_pilot_updates.
    """
    check_settings(inner_steps, pilot_rule, max(student.micro_batches, teacher.micro_batches))
    check_pieces(pilot_pieces, imitation.objective)
    module, wanted = student.module, imitation.wanted
    lowered = student.accelerator.autocast if tangent_precision == "autocast" else nullcontext

    def step(batch: Batch, feedback: Batch) -> dict[str, float]:
        rate = student.optimizer.param_groups[0]["lr"] if pilot_learning_rate is None else pilot_learning_rate
        # The copy learns from the teacher's answers, and the teacher is differentiated through them.  Without dropout,
        # which would be noise in that derivative.
        with models.evaluating(teacher.module), teacher.accelerator.autocast():
            answers = models.outputs(teacher.module, batch, **wanted)
        lesson = detached(answers)

        with lowered():
            # Lines 3, 4: the teaching experiment.
            trial = teaching_experiment(student, batch, lesson, imitation, inner_steps, pilot_rule, rate, pilot_pieces)
            # Line 5: the quiz, and what it says about every step of the experiment.
            quizzed: list[Tensor] = []
            direction = feedback_gradient(module, trial.copy, feedback, recording(quizzed), pieces=pilot_pieces)
            tangents = tangents_along(direction, module, batch, lesson, imitation, trial, tangent)
        watched = loss_on(student, trial.copy, watch) if watch is not None else 0.0

        def quiz_loss(_: Batch) -> Tensor:
            """−η_s Σ of the influences over the experiment's steps: its mean has the gradient of the quiz's loss."""
            objective = lambda ours, theirs: imitation(ours, theirs, batch["labels"])  # noqa: E731
            pairs = zip(trial.outputs, tangents, strict=True)
            return -rate * sum(distillation_influence(objective, *pair, answers) for pair in pairs)

        # Line 6: the teacher.
        teacher.minimise(quiz_loss, batch)

        # Line 7: the real student, on the same batch, from the new teacher.
        with teacher.accelerator.autocast():
            example = models.targets(teacher.module, batch, **wanted) if pilot_update else lesson
        seen: list[Tensor] = []

        def loss(batch: Batch) -> Tensor:
            own = models.outputs(module, batch, **wanted)
            seen.append(own.logits.detach())
            return imitation(own, example, batch["labels"])

        values = {"loss": student.minimise(loss, batch), "feedback_loss": torch.cat(quizzed).mean().item()}
        values |= {"student_entropy": mean_entropy(seen[0]), "teacher_entropy": mean_entropy(example.logits)}
        if watch is not None:
            before, after = (
                imitation.agreement(trial.outputs[0], theirs).mean()
                for theirs in (lesson, models.targets(teacher.module, batch))
            )
            values |= won_tied_lost(loss_on(student, {}, watch), watched)
            values["teacher_closer"] = float(after < before)
        return values

    return step


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
    lesson: Outputs,
    imitation: Imitation,
    steps: int,
    rule: PilotRule,
    rate: float,
    pieces: int = 1,
) -> Experiment:
    """A copy of the student learns the batch, without dropout; the student and its optimiser stay as they are.

    Source: MetaDistil eq. (2) and Algorithm 1, lines 3 and 4.  Derived in: chapters/05_pilot_updates.
    """
    copy, places, outputs, slopes = models.trainable(student.module), [], [], None
    for _ in range(steps):
        gradient, answers = taught(student.module, copy, batch, lesson, imitation, pieces)
        places.append(copy)
        outputs.append(answers)
        if rule == "sgd":
            copy = pilot.sgd(copy, gradient, rate)
        else:
            learned = {name: student.module.get_parameter(name) for name in copy}
            state = pilot.adamw_state(student.optimizer, learned, rate)
            copy, slopes = pilot.adamw(copy, gradient, state), pilot.adamw_preconditioner(gradient, state)
    return Experiment(copy, places, outputs, rate, slopes)


def tangents_along(
    direction: Parameters,
    module: nn.Module,
    batch: Batch,
    lesson: Outputs,
    imitation: Imitation,
    trial: Experiment,
    method: TangentMethod,
) -> list[Outputs]:
    """For each step of the experiment the student's tangent along what the quiz asks of that step.

    `direction` is the feedback gradient at the end; it is carried back through the steps, the last one first.
    """
    if trial.slopes is not None:
        direction = {name: trial.slopes[name] * value for name, value in direction.items()}
    tangents: list[Outputs] = []
    for number in reversed(range(len(trial.places))):
        here, known = trial.places[number], trial.outputs[number]
        along = student_tangent(module, here, batch, direction, method, outputs=known, **imitation.wanted)
        tangents.insert(0, along[1])
        if number > 0:
            direction = passed_back(module, here, batch, lesson, imitation, direction, trial.rate)
    return tangents


def taught(
    module: nn.Module, parameters: Parameters, batch: Batch, lesson: Outputs, imitation: Imitation, pieces: int = 1
) -> tuple[Parameters, Outputs]:
    """The gradient of the student's loss at `parameters`, without dropout, and the outputs on the way."""
    seen: list[Outputs] = []

    def loss(outputs: Outputs, piece: Batch) -> Tensor:
        seen.append(detached(outputs))
        example = tree_map(lambda values: values[piece["places"]], lesson)
        return imitation(outputs, example, piece["labels"])

    placed = {**batch, "places": torch.arange(len(lesson.logits), device=lesson.logits.device)}
    gradient = pilot.gradient(module, parameters, placed, loss, pieces=pieces, **imitation.wanted)
    return gradient, tree_map(lambda *parts: torch.cat(parts), *seen)


def passed_back(
    module: nn.Module,
    parameters: Parameters,
    batch: Batch,
    lesson: Outputs,
    imitation: Imitation,
    direction: Parameters,
    learning_rate: float,
) -> Parameters:
    """(1 − η_s H) v: the feedback gradient before one more plain gradient step, H the Hessian of the student's loss.

    Source: the chain rule behind MetaDistil eq. (3) with several gradient updates, which section 3.2.2 mentions.
    Derived in: chapters/05_pilot_updates.
    """

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        return imitation(outputs, lesson, batch["labels"])

    curved = hessian_vector_product(module, parameters, batch, loss, direction, **imitation.wanted)
    return {name: value - learning_rate * curved[name] for name, value in direction.items()}


def recording(values: list[Tensor]) -> pilot.Loss:
    """The task's loss, which also puts its values, by sample, into the list."""

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        losses = pilot.task_loss(outputs, batch)
        values.append(losses.detach())
        return losses

    return loss


def loss_on(student: Learner, parameters: Parameters, batch: Batch) -> float:
    """The mean task loss on a batch, without dropout, at `parameters`, or at the student's own for an empty dict."""
    with torch.no_grad(), models.evaluating(student.module):
        return pilot.task_loss(models.apply(student.module, parameters, batch), batch).mean().item()


def won_tied_lost(ours: float, theirs: float) -> dict[str, float]:
    """What a loss says against another one: "watch_better", "watch_equal" and "watch_worse", one of them 1, the others
    0, and "watch_gain", by how much it is smaller.

    Late in a training two steps often differ by less than float32 can tell: a tie is neither a win nor a loss.

    Source: MetaDistil section 5.1, the share of steps that are better than the teaching experiment.
    Derived in: chapters/05_pilot_updates.
    """
    signs = {"watch_better": ours < theirs, "watch_equal": ours == theirs, "watch_worse": ours > theirs}
    return {name: float(sign) for name, sign in signs.items()} | {"watch_gain": theirs - ours}


def check_pieces(pieces: int, objective: Objective) -> None:
    """Raise ValueError for fewer pieces than one, or several where the objective compares the samples of a batch."""
    if pieces < 1:
        raise ValueError(f"pilot_pieces is {pieces}; expected 1 (the whole batch) or more")
    for name in losses.BATCH_OBJECTIVES:
        if pieces > 1 and objective is losses.OBJECTIVES[name]:
            raise ValueError(
                f"pilot_pieces is {pieces}: objective {name!r} compares the samples of a whole batch; take 1"
            )


def check_settings(inner_steps: int, pilot_rule: str, micro_batches: int) -> None:
    """Raise ValueError for settings of `metadistil` that have no meaning or no derivative here."""
    if pilot_rule not in PILOT_RULES:
        raise ValueError(f"pilot_rule is {pilot_rule!r}; expected one of {', '.join(PILOT_RULES)}")
    if inner_steps < 1:
        raise ValueError(f"inner_steps is {inner_steps}; expected 1 or more")
    if inner_steps > 1 and pilot_rule == "adamw":
        raise ValueError(
            f"inner_steps is {inner_steps} with pilot_rule 'adamw': only one step of AdamW has a diagonal Jacobian in "
            "its gradient; take pilot_rule 'sgd', or one step"
        )
    if micro_batches > 1:
        raise ValueError(
            f"micro_batches is {micro_batches}: the pilot step needs the whole batch at once; take 1 and a smaller "
            "batch_size"
        )
