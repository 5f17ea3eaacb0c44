"""Fine-tuning and vanilla distillation: the teacher is fixed.

Source: LGTM eqs. (1)-(2), MetaDistil eq. (1), IKD eqs. (1)-(5).  Derived in: chapters/01_distillation.
"""

from collections.abc import Callable

from torch import Tensor

from kdlib import losses, models
from kdlib.imitation import Imitation
from kdlib.learner import Batch, Learner
from kdlib.methods import Step
from kdlib.models import Outputs


def fine_tuning(network: Learner) -> Step:
    """Ordinary training on the labels: the teacher's first stage, and the student alone."""

    def loss(batch: Batch) -> Tensor:
        return losses.task_loss(models.logits(network.module, batch), batch["labels"], "none")

    return lambda batch: {"loss": network.minimise(loss, batch)}


def distillation(student: Learner, teacher: Callable[[Batch], Outputs], imitation: Imitation) -> Step:
    """Vanilla distillation from a fixed teacher: θ_s ← θ_s − η_s ∇ L(θ_s).

    `teacher` maps a batch to the teacher's answers, computed on the spot or looked up.

    Source: LGTM eq. (2), IKD eq. (5), with AdamW in the place of the plain gradient step.
    """

    def loss(batch: Batch) -> Tensor:
        return imitation(models.outputs(student.module, batch, **imitation.wanted), teacher(batch), batch["labels"])

    return lambda batch: {"loss": student.minimise(loss, batch)}
