"""Online distillation: the teacher learns the task while it teaches, and stays close to its student.

Source: LGTM eqs. (3)-(4), which is ProKT (Shi et al., 2021); mutual learning, DML (Zhang et al., 2018), is the case in
which both do the same.  Derived in: chapters/04_online_distillation.
"""

from collections.abc import Callable
from typing import Literal, Unpack

import torch
from torch import Tensor

from kdlib import models
from kdlib.learner import Batch, Learner, minimise_together
from kdlib.methods.base import Cast, Mutual, Step, Together, mean_entropy
from kdlib.models import Outputs, WantedStates
from kdlib.settings import Temperature, settings

Order = Literal["teacher", "student", "simultaneous"]


@settings
class ProKT(Together):
    """Teacher and student learn from the labels and from each other, in turns."""

    first: Order = "teacher"
    """who is updated first, "teacher", "student", or both at once, "simultaneous\""""

    def step(self, cast: Cast) -> Step:
        return online_distillation(*cast.pair, self)


@settings
class DML(ProKT):
    """Mutual learning: both at once, at temperature 1."""

    temperature: Temperature = 1.0
    first: Order = "simultaneous"


def online_distillation(student: Learner, teacher: Learner, settings: ProKT) -> Step:
    """Teacher and student learn from the labels and from each other, in turns or at once.

    With `first="teacher"` the student learns from the teacher as it is *after* its step, as eq. (4) has it; with
    "student" it is the other way round; with "simultaneous" both learn from the other as it was.

    One who has to be asked only for its predictions is asked without dropout; in the simultaneous order both networks
    run once, and their predictions of that run are the targets.

    Derived in: chapters/04_online_distillation.
    """
    wanted = settings.wanted

    def update_teacher(batch: Batch) -> tuple[float, Tensor]:
        def loss(piece: Batch, teacher_outputs: Outputs) -> Tensor:
            student_outputs = models.targets(student.module, piece)
            return settings.teachers_loss(teacher_outputs, student_outputs, piece["labels"])

        return _update(teacher, loss, batch)

    def update_student(batch: Batch) -> tuple[float, Tensor]:
        def loss(piece: Batch, student_outputs: Outputs) -> Tensor:
            teacher_outputs = models.targets(teacher.module, piece, **wanted)
            return settings.loss(student_outputs, teacher_outputs, piece["labels"])

        return _update(student, loss, batch, **wanted)

    def in_turns(batch: Batch) -> dict[str, float]:
        if settings.first == "student":
            of_student = update_student(batch)
            return _summary(*of_student, *update_teacher(batch))
        of_teacher = update_teacher(batch)
        return _summary(*update_student(batch), *of_teacher)

    return at_once(student, teacher, settings) if settings.first == "simultaneous" else in_turns


def at_once(student: Learner, teacher: Learner, settings: Mutual) -> Step:
    """Both learn from the labels and from the other as it was, in one step."""

    def step(batch: Batch) -> dict[str, float]:
        logits: list[tuple[Tensor, Tensor]] = []

        def losses(piece: Batch) -> list[Tensor]:
            both = (models.outputs(who.module, piece, **settings.wanted) for who in (student, teacher))
            of_student, of_teacher = both
            logits.append((of_student.logits.detach(), of_teacher.logits.detach()))
            return [
                settings.loss(of_student, models.detached(of_teacher), piece["labels"]),
                settings.teachers_loss(of_teacher, models.detached(of_student), piece["labels"]),
            ]

        loss, teacher_loss = minimise_together([student, teacher], losses, batch)
        student_logits, teacher_logits = (torch.cat(pieces) for pieces in zip(*logits, strict=True))
        return _summary(loss, student_logits, teacher_loss, teacher_logits)

    return step


def _update(
    who: Learner, loss: Callable[[Batch, Outputs], Tensor], batch: Batch, **wanted: Unpack[WantedStates]
) -> tuple[float, Tensor]:
    """One step of `who` on the loss of its own outputs; also the logits that it had."""
    logits: list[Tensor] = []

    def of_piece(piece: Batch) -> Tensor:
        outputs = models.outputs(who.module, piece, **wanted)
        logits.append(outputs.logits.detach())
        return loss(piece, outputs)

    return who.minimise(of_piece, batch), torch.cat(logits)


def _summary(loss: float, logits: Tensor, teacher_loss: float, teacher_logits: Tensor) -> dict[str, float]:
    """The numbers to log of one step of two learners: losses, and the entropies of their predictions in nats."""
    return {
        "loss": loss,
        "teacher_loss": teacher_loss,
        "student_entropy": mean_entropy(logits),
        "teacher_entropy": mean_entropy(teacher_logits),
    }
