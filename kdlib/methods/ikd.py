"""IKD, interactive distillation: the teacher is told, class by class, what its soft targets do to the student's exam.

The feedback is the student's tangent: one number for each sample and class, computed without the teacher and held
fixed.  The teacher then lowers its own soft targets weighted by it, so its gradient needs one backward pass through the
teacher and none through the student's step (chapters/03_finite_differences).

Source: IKD eqs. (5)-(15).  Derived in: chapters/06_student_feedback.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kdlib import losses, models, pilot
from kdlib.learner import Batch, Learner, minimise_together
from kdlib.methods.base import Cast, Learning, Piloting, Run, Step, Trained, Unlabelled, check_whole_batch, mean_entropy
from kdlib.models import Outputs, WantedStates
from kdlib.settings import Share, by_rule, fill, settings
from kdlib.tangent import distillation_influence, feedback_gradient, student_tangent


@settings
class IKD(Piloting, Learning, Trained, Unlabelled):
    """The teacher hears, class by class, what its soft targets do to the student's exam."""

    slower: ClassVar[float] = 0.1

    meta_weight: Share = 0.5
    """weight γ of the student's exam in the teacher's loss, 1 − this that of the labels"""
    feedback_at: Literal["before", "after"] = "before"
    """the exam "after" the course step, exact, or "before" it, the paper's shortcut"""
    exam: Literal["course", "train", "feedback"] = by_rule()
    """the "course" batch again, another batch of "train", or of "feedback"; None: "course", without labels
    "feedback\""""

    def __post_init__(self) -> None:
        super().__post_init__()
        fill(self, exam="course" if self.labelled_course else "feedback")

    @property
    def feedback(self) -> str | None:
        return None if self.exam == "course" else self.exam

    def problems(self, run: Run) -> list[str]:
        found = super().problems(run)
        if not self.labelled_course and self.exam != "feedback":
            found.append(f"exam is {self.exam!r}, but only the feedback split has labels; expected 'feedback'")
        if self.exam == "course" and self.labelled_course and self.feedback_batch_size is not None:
            found.append(
                f"feedback_batch_size is {self.feedback_batch_size}, but the exam is the course batch itself: leave it "
                "out, or give exam 'train' or 'feedback'"
            )
        return found

    def step(self, cast: Cast) -> Step:
        return ikd(*cast.pair, self)


def ikd(student: Learner, teacher: Learner, settings: IKD) -> Step:
    """A step on a course batch and an exam batch; called with one batch, the course is the exam as well.

    Both networks move at once, from the state before the step, each on its own loss, as the paper adds them up: the
    student imitates the teacher's outputs; the teacher lowers γ · the student's loss on the exam after the course
    + (1 − γ) · its own loss on the labels.  γ is `meta_weight`; the paper's λ is 1 − α.  In MetaDistil the student
    waits for the teacher's update; here it learns from the outputs that the feedback is about.

    The student after the course is a copy that takes a plain gradient step, without dropout, at `pilot_learning_rate`
    or at the student's present rate.  With `feedback_at="after"` the exam's gradient is taken there, and the teacher's
    gradient is exact.  With "before", the paper's shortcut, it is taken where the student is: the copy, a forward and a
    backward pass, is not needed.  The shortcut leaves out how the exam's gradient turns during the step, no derivative.

    The teacher answers the course once, without dropout.  That one answer is the student's lesson, is what the feedback
    weighs, and is held to the labels, so the teacher has one forward and one backward pass.

    With `labelled_course=False` nobody reads the labels of the course: the student imitates only, and the teacher's
    own loss is that on the exam, which costs it another pass.

    Raises ValueError for `micro_batches`, and for a course without labels that is its own exam.

    Source: IKD eqs. (5)-(14).  Derived in: chapters/06_student_feedback.
    """
    check_whole_batch(student, teacher)
    module, wanted = student.module, settings.wanted

    def step(batch: Batch, exam: Batch | None = None) -> dict[str, float]:
        if exam is None and not settings.labelled_course:
            raise ValueError("the course has no labels, so it cannot be the exam: give a second batch")
        exam = batch if exam is None else exam
        with models.evaluating(teacher.module), teacher.accelerator.autocast():
            teacher_outputs = models.outputs(teacher.module, batch, **wanted)
        targets = models.detached(teacher_outputs)
        moving, exam_losses = tangent_of_exam(batch, exam, targets)
        logits: list[Tensor] = []

        def both_losses(_: Batch) -> list[Tensor]:
            outputs = models.outputs(module, batch, **wanted)
            logits.append(outputs.logits.detach())
            influences = distillation_influence(settings.loss, *moving, teacher_outputs, batch["labels"])
            teachers = settings.meta_weight * (-settings.rate(student) * influences)
            if settings.meta_weight < 1:
                teachers = teachers + (1 - settings.meta_weight) * loss_on_labels(teacher_outputs, batch, exam)
            return [settings.loss(outputs, targets, batch["labels"]), teachers]

        loss, _ = minimise_together([student, teacher], both_losses, batch)
        return {
            "loss": loss,
            "feedback_loss": exam_losses.mean().item(),
            "student_entropy": mean_entropy(logits[0]),
            "teacher_entropy": mean_entropy(targets.logits),
        }

    def tangent_of_exam(batch: Batch, exam: Batch, targets: Outputs) -> tuple[tuple[Outputs, Outputs], Tensor]:
        """The student's outputs on the course and their tangent along the exam's gradient; the exam's losses."""
        examined: list[Outputs] = []

        def exam_loss(outputs: Outputs, data: Mapping[str, Tensor]) -> Tensor:
            examined.append(models.detached(outputs))
            return pilot.task_loss(outputs, data)

        with settings.lowered(student):
            here, outputs = models.trainable(module), None
            place = here
            asked: WantedStates = {}
            if settings.feedback_at == "after":
                rate = settings.rate(student)
                trial = pilot.teaching_experiment(student, batch, targets, settings.loss, rate, **wanted)
                place, outputs = trial.copy, trial.outputs[0]
            elif exam is batch:
                asked = wanted  # the exam's own pass is that of the course, which a difference need not make again
            direction = feedback_gradient(module, place, exam, exam_loss, **asked)
            if place is here and exam is batch:
                outputs = examined[0]
            moving = student_tangent(module, here, batch, direction, settings.tangent, outputs=outputs, **wanted)
        return moving, pilot.task_loss(examined[0], exam)

    def loss_on_labels(teacher_outputs: Outputs, batch: Batch, exam: Batch) -> Tensor:
        """The teacher's own: by sample on a labelled course, which it has answered; else the mean on the exam."""
        if settings.labelled_course:
            return losses.task_loss(teacher_outputs.logits, batch["labels"], "none")
        with models.evaluating(teacher.module):
            return losses.task_loss(models.logits(teacher.module, exam), exam["labels"])

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
