"""IKD, interactive distillation: the teacher is told, class by class, what its soft targets do to the student's exam.

The feedback is the student's tangent: one number for each sample and class, computed without the teacher and held
fixed.  The teacher then lowers its own soft targets weighted by it, so its gradient needs one backward pass through the
teacher and none through the student's step (chapters/03_finite_differences).

Source: IKD eqs. (5)-(15).  Derived in: chapters/06_student_feedback.
"""

from contextlib import nullcontext
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kdlib import losses, models
from kdlib.imitation import Imitation
from kdlib.learner import Batch, Learner, minimise_together
from kdlib.methods import Step, mean_entropy, metadistil
from kdlib.methods.online import detached
from kdlib.tangent import TangentMethod, distillation_influence, feedback_gradient, student_tangent

FeedbackAt = Literal["before", "after"]
FEEDBACK_AT: tuple[FeedbackAt, ...] = ("before", "after")
Exam = Literal["course", "train", "feedback"]
EXAMS: tuple[Exam, ...] = ("course", "train", "feedback")
"""Where an exam comes from: the course batch itself, another batch of the training set, or the feedback split."""


def ikd(
    student: Learner,
    teacher: Learner,
    imitation: Imitation,
    meta_weight: float = 0.5,
    feedback_at: FeedbackAt = "before",
    labelled_course: bool = True,
    pilot_learning_rate: float | None = None,
    tangent: TangentMethod = "jvp",
    tangent_precision: Literal["fp32", "autocast"] = "fp32",
) -> Step:
    """A step on a course batch and an exam batch; called with one batch, the course is the exam as well.

    Both networks move at once, from the state before the step, each on its own loss, as the paper adds them up: the
    student imitates the teacher's answers; the teacher lowers γ · the student's loss on the exam after the course
    + (1 − γ) · its own loss on the labels.  γ is `meta_weight`; the paper's λ is 1 − `imitation.alpha`.  In MetaDistil
    the student waits for the teacher's update; here it learns from the answers that the feedback is about.

    The student after the course is a copy that takes a plain gradient step, without dropout, at `pilot_learning_rate`
    or at the student's present rate.  With `feedback_at="after"` the exam's gradient is taken there, and the teacher's
    gradient is exact.  With "before", the paper's shortcut, it is taken where the student is: the copy, a forward and a
    backward pass, is not needed.  The shortcut leaves out how the exam's gradient turns during the step, no derivative.

    The teacher answers the course once, without dropout.  That one answer is the student's lesson, is what the feedback
    weighs, and is held to the labels, so the teacher has one forward and one backward pass.

    With `labelled_course=False` nobody reads the labels of the course: the student imitates only, and the teacher's
    own loss is that on the exam, which costs it another pass.

    Raises ValueError for settings that `check_settings` refuses, and for a course without labels that is its own exam.

    Source: IKD eqs. (5)-(14).  Derived in: chapters/06_student_feedback.
    """
    micro_batches = max(student.micro_batches, teacher.micro_batches)
    check_settings(meta_weight, feedback_at, labelled_course, imitation.alpha, micro_batches)
    module, wanted = student.module, imitation.wanted
    lowered = student.accelerator.autocast if tangent_precision == "autocast" else nullcontext

    def step(batch: Batch, exam: Batch | None = None) -> dict[str, float]:
        if exam is None and not labelled_course:
            raise ValueError("the course has no labels, so it cannot be the exam: give a second batch")
        exam = batch if exam is None else exam
        rate = student.optimizer.param_groups[0]["lr"] if pilot_learning_rate is None else pilot_learning_rate
        with models.evaluating(teacher.module), teacher.accelerator.autocast():
            answers = models.outputs(teacher.module, batch, **wanted)
        lesson = detached(answers)

        # What the student has to say: its tangent along the gradient of the exam.
        with lowered():
            here, known = models.trainable(module), None
            place = here
            if feedback_at == "after":
                trial = metadistil.teaching_experiment(student, batch, lesson, imitation, 1, "sgd", rate)
                place, known = trial.copy, trial.outputs[0]
            examined: list[Tensor] = []
            direction = feedback_gradient(module, place, exam, metadistil.recording(examined))
            said = student_tangent(module, here, batch, direction, tangent, outputs=known, **wanted)

        seen: list[Tensor] = []

        def both(_: Batch) -> list[Tensor]:
            own = models.outputs(module, batch, **wanted)
            seen.append(own.logits.detach())
            objective = lambda ours, theirs: imitation(ours, theirs, batch["labels"])  # noqa: E731
            meta = -rate * distillation_influence(objective, *said, answers)
            taught = meta_weight * meta
            if meta_weight < 1:
                taught = taught + (1 - meta_weight) * teachers_own()
            return [imitation(own, lesson, batch["labels"]), taught]

        def teachers_own() -> Tensor:
            """By sample on a labelled course, which the teacher has answered; else the mean on the exam."""
            if labelled_course:
                return losses.task_loss(answers.logits, batch["labels"], "none")
            with models.evaluating(teacher.module):
                return losses.task_loss(models.logits(teacher.module, exam), exam["labels"])

        loss, _ = minimise_together([student, teacher], both, batch)
        return {
            "loss": loss,
            "feedback_loss": torch.cat(examined).mean().item(),
            "student_entropy": mean_entropy(seen[0]),
            "teacher_entropy": mean_entropy(lesson.logits),
        }

    return step


def feedback(
    logits: Float[Tensor, "batch classes"],
    tangent: Float[Tensor, "batch classes"],
    learning_rate: float,
    weight: float = 1.0,
    temperature: float = 1.0,
) -> Float[Tensor, "batch classes"]:
    """fb_ic = η λ T² · ∂_g log p^s_ic: how much the exam's loss grows with the teacher's probability of class c.

    `logits` and `tangent` are the student's, from `tangent.student_tangent`; `weight` is λ.  With KL as the objective
    the gradient of mean_i Σ_c fb_ic p^t_ic in the teacher is the meta-gradient.  For each sample the mean over classes
    under the student's own prediction is zero: whatever pleases one class displeases the others.

    Source: IKD eqs. (13), (15), (16).  Derived in: chapters/06_student_feedback.
    """
    p = F.softmax(logits / temperature, dim=-1)
    change = (tangent - (p * tangent).sum(-1, keepdim=True)) / temperature
    return learning_rate * weight * temperature**2 * change


def check_settings(
    meta_weight: float, feedback_at: str, labelled_course: bool, alpha: float, micro_batches: int
) -> None:
    """Raise ValueError for settings of `ikd` that have no meaning."""
    if not 0 <= meta_weight <= 1:
        raise ValueError(f"meta_weight is {meta_weight}; expected a weight between 0 (labels only) and 1 (exam only)")
    if feedback_at not in FEEDBACK_AT:
        raise ValueError(f"feedback_at is {feedback_at!r}; expected one of {', '.join(FEEDBACK_AT)}")
    if not labelled_course and alpha != 0:
        raise ValueError(f"alpha is {alpha}, a weight for the labels of a course that has none; expected 0")
    metadistil.check_settings(1, "sgd", micro_batches)
