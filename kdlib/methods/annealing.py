"""Annealing-KD: the teacher's logits grow from small to what they are; then the labels alone.

Source: Annealing-KD (Jafari et al., 2021), a rival in IKD Table 1.
"""

from torch import Tensor

from kdlib import losses, models
from kdlib.learner import Batch, stage_ends
from kdlib.methods.base import Cast, Step, TwoStages
from kdlib.methods.kd import fine_tuning
from kdlib.settings import Layers, settings


@settings
class AnnealingKD(TwoStages):
    """First the teacher's logits, from small to their true size, then the labels."""

    max_temperature: Layers = 10
    """in so many sizes the logits are shown, 1/10, 2/10, … of their own; in a shorter stage as many as it has steps"""

    def step(self, cast: Cast) -> Step:
        return annealing(cast, self)


def annealing(cast: Cast, settings: AnnealingKD) -> Step:
    """(z_s − Φ(T) z_t)² with Φ(T) = 1 − (T − 1)/T_max and T from T_max down to 1; then the task's own loss.

    The temperature falls after equal numbers of steps of the first stage.
    """
    student, answers = cast.student, cast.answers
    assert answers is not None
    end = stage_ends(settings.stages, cast.total)[0]
    last = min(settings.max_temperature, end)
    labels = fine_tuning(student)

    def step(batch: Batch) -> dict[str, float]:
        if student.taken >= end:
            return labels(batch)
        temperature = last - student.taken * last // end
        size = 1 - (temperature - 1) / last

        def loss(piece: Batch) -> Tensor:
            return losses.logit_mse(
                models.logits(student.module, piece), size * answers(piece).logits, reduction="none"
            )

        return {"loss": student.minimise(loss, batch)}

    return step
