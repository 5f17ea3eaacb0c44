"""LGTM: the teacher learns the task, stays close to its student, and minds what its lesson does to the student.

The last part is the *influence term*.  The paper gives it twice, and the two are not the same; the released code has a
third one.  All are here under names of their own, at a weight that is stated, and with one tangent of the student and
one backward pass of the teacher (chapters/03_finite_differences).

Source: LGTM Algorithm 1, eqs. (8)-(11).  Derived in: chapters/07_good_teachers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kdlib import models, pilot, processes
from kdlib.learner import Batch, Learner
from kdlib.methods.base import Cast, Feedback, Step, Together, check_whole_batch, mean_entropy
from kdlib.models import Outputs
from kdlib.settings import Number, Steps, Weight, by_rule, fill, settings
from kdlib.tangent import distillation_influence, feedback_gradient, student_tangent

Variant = Literal["weighted", "printed", "meta", "released"]
Watch = Callable[[Batch, Float[Tensor, "batch"], Outputs, Outputs], None]


@settings
class LGTM(Feedback, Together):
    """The teacher learns the task, stays close to its student, and minds what its lesson does to the student."""

    silent: ClassVar[Mapping[str, Any]] = {"auxiliary": True}

    influence: Variant = "weighted"
    """the influence term, "weighted" (eq. 9), "printed" (eq. 10), "meta" (its sign turned) or "released" (as in the
    code)"""
    influence_weight: Weight | Literal["student_rate", "teacher_rate"] = by_rule()
    """its weight, a number, "student_rate" or "teacher_rate"; None: 1, for "released" "teacher_rate\""""
    influence_share: Weight | None = None
    """in place of a weight, the length of its gradient over that of the auxiliary loss's; None: no"""
    feedback_every: Steps = 1
    """steps from one influence term to the next"""
    feedback_layers: Number | None = None
    """influence through the student's last so many layers, pooler and head only; None: through all weights"""
    auxiliary: bool = True
    """False: the influence term alone, without the loss on labels and student that stands beside it in eq. (11)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.influence_share is None:
            fill(self, influence_weight="teacher_rate" if self.influence == "released" else 1.0)
        elif self.influence_weight is not None:
            raise ValueError("influence_weight and influence_share are both given; give one")
        if self.alpha == 1:
            raise ValueError("alpha is 1: the student learns from the labels alone, so no teacher can influence it")
        if not self.auxiliary and (self.influence_share is not None or self.observe or self.influence == "released"):
            raise ValueError(
                "auxiliary is False: without an auxiliary loss there is nothing to take a share of or to compare with, "
                "nor a loss of the teacher; leave out influence_share, observe and influence 'released'"
            )

    def step(self, cast: Cast) -> Step:
        return lgtm(*cast.pair, self)

    def scale(self, student: Learner, teacher: Learner) -> float:
        """The weight of the influence term as a number."""
        if self.influence_weight == "student_rate":
            return (1 - self.alpha) * self.rate(student)
        teachers_rate = teacher.optimizer.param_groups[0]["lr"]
        return teachers_rate if self.influence_weight == "teacher_rate" else self.influence_weight


RELEASED = LGTM(
    alpha=0.0,
    temperature=1.0,
    teacher_alpha=0.6,
    influence="released",
    pilot_rule="adamw",
    tangent="finite-difference",
)
"""What the code released with the paper does.

The student learns from the teacher alone, the teacher with 0.6 from the labels and 0.4 from KL(student ‖ teacher).  The
pilot takes AdamW's step, whose Jacobian is left out.  The central difference is that of the teacher's loss, and the
weight is the *teacher's* learning rate.

What is not followed: the code takes the feedback from the validation data, which here is whatever is given; it leaves
dropout on in the feedback gradient and off in the difference's teacher; and it takes the difference of the loss where
this one takes it of the student's outputs, equal but for ε².
"""


def lgtm(student: Learner, teacher: Learner, settings: LGTM, watch: Watch | None = None) -> Step:
    """A step on a training batch and a feedback batch, in the order of Algorithm 1.

    A pilot copy of the student learns the batch; its loss on the feedback batch has the gradient g; I_i is the
    influence of sample i along g, and ℓ_i its distillation loss: what in the student's loss depends on the teacher,
    over its weight 1 − α.  The teacher descends its auxiliary loss, eq. (11), which is that of `online_distillation`,
    plus the influence term:

    * "weighted": w · mean_i I_i ℓ_i with I_i held fixed, eq. (9);
    * "printed": w · mean_i I_i, eq. (10) and Algorithm 1 as printed;
    * "meta": −w · mean_i I_i, the sign of the chain rule.  With w = (1 − α) η_s, "student_rate", it has the gradient of
      the pilot's feedback loss, eq. (19), which is MetaDistil's;
    * "released": −w · mean_i of the derivative of the *teacher's* loss along g, and g as AdamW's pilot step gives it,
      without the step's Jacobian: what the released code does (see `RELEASED`).

    The weight w is a number (1 in the paper), or "student_rate", or "teacher_rate", the teacher's present learning
    rate.  With `influence_share` the term is scaled at every step so that its gradient is that many times as long as
    that of the auxiliary loss.  That, and `observe`, which logs the ratio of the two lengths ("influence_ratio") and
    their cosine, cost two more backward passes of the teacher.

    The teacher is asked once before its update, with dropout, as it is in training: that answer is what the pilot
    learns, what the influence is differentiated through, and what the auxiliary loss judges.  So one backward pass does
    for all.  The pilot and the student's tangent are without dropout.  At weight 0 this is `online_distillation`.

    What saves time, at a price: `tangent="forward-difference"` reuses the pilot's own pass; `feedback_every=k` leaves
    pilot and influence term out of all but each k-th step; `feedback_layers=k` counts, in every I_i, only the weights
    of the student's last k layers, pooler and head.  `pilot_pieces` saves memory, as in `metadistil`.

    `watch(batch, influences, student's outputs, teacher's outputs)` is called whenever there are influences.

    Raises ValueError for `micro_batches`, and for more `feedback_layers` than the student has.

    Source: LGTM Algorithm 1, eqs. (8)-(11).
    Derived in: chapters/03_finite_differences and chapters/07_good_teachers.
    """
    check_whole_batch(student, teacher)
    module, wanted, layers = student.module, settings.wanted, settings.feedback_layers
    names = None if layers is None else models.last_layers(module, layers)

    def step(batch: Batch, feedback: Batch) -> dict[str, float]:
        labels = batch["labels"]
        values: dict[str, float] = {}
        with teacher.accelerator.autocast():
            teacher_outputs = models.outputs(teacher.module, batch, **wanted)
        targets, influences = models.detached(teacher_outputs), None
        if student.taken % settings.feedback_every == 0:
            # Lines 3 to 7.
            influences, student_outputs, feedback_loss = _influences(
                student, batch, feedback, teacher_outputs, settings, names
            )
            values |= _statistics(influences) | {"feedback_loss": feedback_loss.item()}
            if watch is not None:
                watch(batch, influences.detach(), student_outputs, targets)
        else:
            with student.accelerator.autocast():
                student_outputs = models.targets(module, batch, **wanted)

        def teachers_loss(_: Batch) -> Tensor:
            """Eq. (11): one value per sample."""
            auxiliary = 0.0 * teacher_outputs.logits.sum(-1)
            if settings.auxiliary:
                auxiliary = settings.teachers_loss(teacher_outputs, student_outputs, labels)
                values["teacher_loss"] = auxiliary.detach().mean().item()
            if influences is None:
                return auxiliary
            if settings.influence == "weighted":
                term = influences.detach() * settings.taught(student_outputs, teacher_outputs)
            else:
                term = influences if settings.influence == "printed" else -influences
            if settings.influence_share is None and not settings.observe:
                return auxiliary + settings.scale(student, teacher) * term
            found, scale = _compared(auxiliary, term, student, teacher, settings)
            values.update(found)
            return auxiliary + scale * term

        # Line 8: the teacher.
        teacher.minimise(teachers_loss, batch)

        # Line 9: the real student, on the same batch, from the new teacher.
        with teacher.accelerator.autocast():
            new_targets = models.targets(teacher.module, batch, **wanted)

        def students_loss(batch: Batch) -> Tensor:
            return settings.loss(models.outputs(module, batch, **wanted), new_targets, batch["labels"])

        values["loss"] = student.minimise(students_loss, batch)
        values["student_entropy"] = mean_entropy(student_outputs.logits)
        return values | {"teacher_entropy": mean_entropy(targets.logits)}

    return step


def _influences(
    student: Learner,
    batch: Batch,
    feedback: Batch,
    teacher_outputs: Outputs,
    settings: LGTM,
    names: Sequence[str] | None,
) -> tuple[Tensor, Outputs, Tensor]:
    """Lines 3 to 7: I_i, which can be differentiated in the teacher's outputs; the student's outputs; L_val.

    `names`: the student's weights that the influence goes through; None: all.
    """
    module, wanted, pieces = student.module, settings.wanted, settings.pilot_pieces
    released = settings.influence == "released"
    with settings.lowered(student):
        rate, targets = settings.rate(student), models.detached(teacher_outputs)
        trial = pilot.teaching_experiment(
            student, batch, targets, settings.loss, rate, settings.pilot_rule, pieces=pieces, **wanted
        )
        feedback_losses: list[Tensor] = []
        g = feedback_gradient(module, trial.copy, feedback, pilot.recording(feedback_losses), names, pieces)
        if trial.slopes is not None and not released:
            g = {name: trial.slopes[name] * value for name, value in g.items()}
        place = {name: trial.places[0][name] for name in g}
        outputs, tangents = student_tangent(
            module, place, batch, g, settings.tangent, outputs=trial.outputs[0], **wanted
        )

    def loss(of_student: Outputs, of_teacher: Outputs, labels: Tensor) -> Tensor:
        if released:
            return settings.teachers_loss(of_teacher, of_student, labels)
        return settings.taught(of_student, of_teacher)

    influences = distillation_influence(loss, outputs, tangents, teacher_outputs, batch["labels"])
    return influences, outputs, torch.cat(feedback_losses).mean()


def _compared(
    auxiliary: Tensor, term: Tensor, student: Learner, teacher: Learner, settings: LGTM
) -> tuple[dict[str, float], float]:
    """How long the two gradients in the teacher are and what angle is between them; the scale of the influence term."""
    first, second = (_gradient(part, teacher) for part in (auxiliary, term))
    lengths = first.norm(), second.norm()
    if settings.influence_share is None:
        scale = settings.scale(student, teacher)
    else:
        scale = (settings.influence_share * lengths[0] / lengths[1]).item() if lengths[1] > 0 else 0.0
    values = {
        "influence_weight": scale,
        "influence_ratio": (scale * lengths[1] / lengths[0]).item() if lengths[0] > 0 else math.inf,
        "influence_cosine": torch.nn.functional.cosine_similarity(first, second, dim=0).item(),
    }
    return values, scale


def _gradient(values: Tensor, learner: Learner) -> Float[Tensor, "weights"]:
    """The gradient of a mean in all weights of a learner, as one vector; the graph is kept."""
    weights = [parameter for parameter in learner.module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(values.mean(), weights, retain_graph=True, materialize_grads=True)
    return processes.summed(torch.cat([gradient.flatten() for gradient in gradients]))


def _statistics(influences: Float[Tensor, "batch"]) -> dict[str, float]:
    """What to log of the influences of a batch."""
    known = influences.detach().float()
    moments = torch.stack([known.mean(), known.std(correction=0), (known > 0).float().mean()])
    return dict(zip(("influence_mean", "influence_std", "influence_positive"), moments.tolist(), strict=True))
