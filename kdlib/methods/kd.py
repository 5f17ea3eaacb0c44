"""Fine-tuning and vanilla distillation: the teacher is fixed.

Source: LGTM eqs. (1)-(2), MetaDistil eq. (1), IKD eqs. (1)-(5).  Derived in: chapters/01_distillation.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from kdlib import losses
from kdlib.learner import Batch, Learner
from kdlib.losses import Objective, distillation_loss
from kdlib.methods import Step
from kdlib.models import logits


def fine_tuning(network: Learner) -> Step:
    """Ordinary training on the labels: the teacher's first stage, and the student alone."""

    def loss(batch: Batch) -> Tensor:
        return losses.task_loss(logits(network.module, batch), batch["labels"], "none")

    return lambda batch: {"loss": network.minimise(loss, batch)}


def distillation(
    student: Learner,
    teacher_logits: Callable[[Batch], Float[Tensor, "batch classes"]],
    alpha: float = 0.5,
    temperature: float = 1.0,
    objective: Objective = losses.kl_divergence,
) -> Step:
    """Vanilla distillation from a fixed teacher: θ_s ← θ_s − η_s ∇ L(θ_s).

    `teacher_logits` maps a batch to the teacher's logits, computed on the spot or looked up.

    Source: LGTM eq. (2), IKD eq. (5), with AdamW in the place of the plain gradient step.
    """

    def loss(batch: Batch) -> Tensor:
        return distillation_loss(
            logits(student.module, batch),
            teacher_logits(batch),
            batch["labels"],
            alpha,
            temperature,
            objective,
            reduction="none",
        )

    return lambda batch: {"loss": student.minimise(loss, batch)}
