"""MetaDistil: the teacher learns from what its lesson does to a pilot copy of the student.

The derivative of the pilot student's loss in the teacher needs no second backward pass: one tangent of the student and
one backward pass of the teacher give it exactly (chapters/03_finite_differences).

Source: MetaDistil Algorithm 1, eqs. (2)-(3); LGTM eqs. (5)-(7), the same without the pilot update.
Derived in: chapters/05_pilot_updates.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kdlib import models, pilot
from kdlib.learner import Batch, Learner
from kdlib.methods.base import Cast, Feedback, Learning, Step, Trained, check_whole_batch, mean_entropy
from kdlib.models import Outputs, Parameters
from kdlib.pilot import Experiment
from kdlib.settings import Layers, settings
from kdlib.tangent import distillation_influence, feedback_gradient, hessian_vector_product, student_tangent

WATCHED = 128
"""Rows of the validation split on which `observe` compares each step with its teaching experiment."""


@settings
class MetaDistil(Feedback, Learning, Trained):
    """The teacher learns from a quiz of a pilot copy of the student."""

    slower: ClassVar[float] = 0.1

    pilot_update: bool = True
    """the student learns from the teacher that its pilot copy has improved"""
    inner_steps: Layers = 1
    """steps of the pilot copy, differentiated through"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_steps > 1 and self.pilot_rule == "adamw":
            raise ValueError(
                f"inner_steps is {self.inner_steps} with pilot_rule 'adamw': only one step of AdamW has a diagonal "
                "Jacobian in its gradient; take pilot_rule 'sgd', or one step"
            )

    def step(self, cast: Cast) -> Step:
        watch = cast.held_out(WATCHED) if self.observe and cast.held_out is not None else None
        return metadistil(*cast.pair, self, watch)


def metadistil(student: Learner, teacher: Learner, settings: MetaDistil, watch: Batch | None = None) -> Step:
    """A step on a training batch and a feedback batch ("quiz"), in the order of Algorithm 1.

    The teaching experiment: a copy of the student takes `inner_steps` steps on the batch, without dropout.  The quiz:
    the copy's loss on the feedback batch, seen as a function of the teacher, is lowered by a step of the teacher.  The
    copy is discarded, and the real student learns the same batch from the new teacher.  With `pilot_update=False` the
    real student learns from the teacher as it was, which is what the copy did.

    The copy takes plain gradient steps ("sgd"), as in eq. (2), or one that AdamW would take ("adamw").

    `pilot_pieces` cuts both batches into so many for the gradients of experiment and quiz.  Their graphs lie on top of
    the teacher's, which waits for its backward pass: in pieces the step needs less memory, and is the same up to
    rounding.

    `watch`, a batch of held-out data, adds measurements to the log, which cost passes and change nothing: those of
    `won_tied_lost`, of the real step with the teaching experiment on that batch, and "teacher_closer", 1 if the
    teacher's step brought it closer to the student on the training batch.  The comparison is fair if copy and student
    would take the same step from the same lesson: `pilot_rule` "adamw", no dropout, and a student that does not clip
    its gradient, as the copy does not (clipping has a Jacobian that is not diagonal, and would have to be
    differentiated).

    Raises ValueError for `micro_batches`, which would cut the answer that the teacher is differentiated through.

    Source: MetaDistil Algorithm 1.  Derived in: chapters/05_pilot_updates.
    """
    check_whole_batch(student, teacher)
    module, wanted, pieces = student.module, settings.wanted, settings.pilot_pieces

    def step(batch: Batch, feedback: Batch) -> dict[str, float]:
        rate, labels = settings.rate(student), batch["labels"]
        # The copy learns from the teacher's outputs, and the teacher is differentiated through them.  Without dropout,
        # which would be noise in that derivative.
        with models.evaluating(teacher.module), teacher.accelerator.autocast():
            teacher_outputs = models.outputs(teacher.module, batch, **wanted)
        targets = models.detached(teacher_outputs)

        with settings.lowered(student):
            # Lines 3, 4: the teaching experiment.
            trial = pilot.teaching_experiment(
                student,
                batch,
                targets,
                settings.loss,
                rate,
                settings.pilot_rule,
                settings.inner_steps,
                pieces,
                **wanted,
            )
            # Line 5: the quiz, and what it says about every step of the experiment.
            feedback_losses: list[Tensor] = []
            quiz = pilot.recording(feedback_losses)
            direction = feedback_gradient(module, trial.copy, feedback, quiz, pieces=pieces)
            tangents = tangents_along(direction, student, batch, targets, trial, settings)
        watched = pilot.loss_without_dropout(module, trial.copy, watch) if watch is not None else 0.0

        def quiz_loss(_: Batch) -> Tensor:
            """−η_s Σ of the influences over the experiment's steps: its mean has the gradient of the quiz's loss."""
            influences = [
                distillation_influence(settings.loss, *moving, teacher_outputs, labels)
                for moving in zip(trial.outputs, tangents, strict=True)
            ]
            return -rate * sum(influences[1:], influences[0])

        # Line 6: the teacher.
        teacher.minimise(quiz_loss, batch)

        # Line 7: the real student, on the same batch, from the new teacher.
        with teacher.accelerator.autocast():
            new_targets = models.targets(teacher.module, batch, **wanted) if settings.pilot_update else targets
        logits: list[Tensor] = []

        def loss(batch: Batch) -> Tensor:
            outputs = models.outputs(module, batch, **wanted)
            logits.append(outputs.logits.detach())
            return settings.loss(outputs, new_targets, batch["labels"])

        values = {"loss": student.minimise(loss, batch), "feedback_loss": torch.cat(feedback_losses).mean().item()}
        values |= {"student_entropy": mean_entropy(logits[0]), "teacher_entropy": mean_entropy(new_targets.logits)}
        if watch is not None:
            before, after = (
                settings.agreement(trial.outputs[0], theirs).mean()
                for theirs in (targets, models.targets(teacher.module, batch))
            )
            values |= won_tied_lost(pilot.loss_without_dropout(module, {}, watch), watched)
            values["teacher_closer"] = float(after < before)
        return values

    return step


def tangents_along(
    direction: Parameters, student: Learner, batch: Batch, targets: Outputs, trial: Experiment, settings: MetaDistil
) -> list[Outputs]:
    """For each step of the experiment the student's tangent along what the quiz asks of that step.

    `direction` is the feedback gradient at the end; it is carried back through the steps, the last one first.  Before
    one more plain gradient step it is (1 − η_s H) v, H the Hessian of the student's loss.

    Source: the chain rule behind MetaDistil eq. (3) with several gradient updates, which section 3.2.2 mentions.
    Derived in: chapters/05_pilot_updates.
    """
    module, wanted = student.module, settings.wanted

    def loss(outputs: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        return settings.loss(outputs, targets, batch["labels"])

    if trial.slopes is not None:
        direction = {name: trial.slopes[name] * value for name, value in direction.items()}
    tangents: list[Outputs] = []
    for number in reversed(range(len(trial.places))):
        place, outputs = trial.places[number], trial.outputs[number]
        _, tangent = student_tangent(module, place, batch, direction, settings.tangent, outputs=outputs, **wanted)
        tangents.insert(0, tangent)
        if number > 0:
            curved = hessian_vector_product(module, place, batch, loss, direction, **wanted)
            direction = {name: value - trial.rate * curved[name] for name, value in direction.items()}
    return tangents


def won_tied_lost(ours: float, theirs: float) -> dict[str, float]:
    """What a loss says against another one: "watch_better", "watch_equal" and "watch_worse", one of them 1, the others
    0, and "watch_gain", by how much it is smaller.

    Late in a training two steps often differ by less than float32 can tell: a tie is neither a win nor a loss.

    Source: MetaDistil section 5.1, the share of steps that are better than the teaching experiment.
    Derived in: chapters/05_pilot_updates.
    """
    signs = {"watch_better": ours < theirs, "watch_equal": ours == theirs, "watch_worse": ours > theirs}
    return {name: float(sign) for name, sign in signs.items()} | {"watch_gain": theirs - ours}
