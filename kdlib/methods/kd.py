"""Fine-tuning and vanilla distillation: the teacher is fixed.

Source: LGTM eqs. (1)-(2), MetaDistil eq. (1), IKD eqs. (1)-(5).  Derived in: chapters/01_distillation.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from kdlib import losses, models
from kdlib.learner import Batch, Learner
from kdlib.methods.base import Cast, Imitating, Step, Trained, Unlabelled
from kdlib.models import Outputs
from kdlib.settings import Number, Positive, Temperature, settings


@settings
class FineTune(Unlabelled):
    """The student learns from the labels alone."""

    silent: ClassVar[Mapping[str, Any]] = {"anchors": 0}

    anchors: Number = 0
    """networks that are kept on the way, after equal numbers of steps, the final one aside: see rco"""

    def step(self, cast: Cast) -> Step:
        return fine_tuning(cast.student)


@settings
class KD(Trained, Imitating, Unlabelled):
    """A fixed teacher."""

    teaches: ClassVar[Literal["nobody", "fixed", "learning"]] = "fixed"

    def step(self, cast: Cast) -> Step:
        assert cast.answers is not None
        return distillation(cast.student, cast.answers, self)


@settings
class PKD(KD):
    """A fixed teacher, whose hidden states are imitated, too: patient distillation (Sun et al., 2019)."""

    pkd_weight: Positive = 1.0
    """weight of the term on hidden states; the paper's grid is 10, 100, 500, 1000 for the mean over units"""


@settings
class DIST(KD):
    """A fixed teacher, of whose predictions only the correlations are imitated (Huang et al., 2022)."""

    has_one_objective: ClassVar[bool] = True

    objective: Literal["dist"] = "dist"
    """the correlations between classes, for two classes none, and between samples"""
    temperature: Temperature = 1.0


@settings
class SKD(KD):
    """A fixed teacher, of whose logits the direction alone is imitated: spherical distillation (Guo et al., 2022)."""

    has_one_objective: ClassVar[bool] = True

    objective: Literal["spherical"] = "spherical"
    """the direction of the logits, of which two classes have only the sign"""


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
