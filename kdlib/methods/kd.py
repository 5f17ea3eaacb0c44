"""Fine-tuning and vanilla distillation: the teacher is fixed.

Source: LGTM eqs. (1)-(2), MetaDistil eq. (1), IKD eqs. (1)-(5).  Derived in: chapters/01_distillation.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import Tensor

from kdlib import losses, models
from kdlib.learner import Batch, Learner
from kdlib.methods.base import Cast, Imitating, Step, Trained, Unlabelled
from kdlib.models import Outputs
from kdlib.settings import settings


@settings
class FineTune(Unlabelled):
    """The student learns from the labels alone."""

    def step(self, cast: Cast) -> Step:
        return fine_tuning(cast.student)


@settings
class KD(Trained, Unlabelled):
    """A fixed teacher."""

    teaches: ClassVar[Literal["nobody", "fixed", "learning"]] = "fixed"

    def step(self, cast: Cast) -> Step:
        assert cast.answers is not None
        return distillation(cast.student, cast.answers, self)


def fine_tuning(network: Learner) -> Step:
    """Ordinary training on the labels: the teacher's first stage, and the student alone."""

    def loss(batch: Batch) -> Tensor:
        return losses.task_loss(models.logits(network.module, batch), batch["labels"], "none")

    return lambda batch: {"loss": network.minimise(loss, batch)}


def distillation(student: Learner, teacher: Callable[[Batch], Outputs], settings: Imitating) -> Step:
    """Vanilla distillation from a fixed teacher: θ_s ← θ_s − η_s ∇ L(θ_s).

    `teacher` maps a batch to the teacher's outputs, computed on the spot or looked up.

    Source: LGTM eq. (2), IKD eq. (5), with AdamW in the place of the plain gradient step.
    """

    def loss(batch: Batch) -> Tensor:
        outputs = models.outputs(student.module, batch, **settings.wanted)
        return settings.loss(outputs, teacher(batch), batch["labels"])

    return lambda batch: {"loss": student.minimise(loss, batch)}
