"""LGTM: the teacher learns the task, stays close to its student, and minds what its lesson does to the student.

The last part is the *influence term*.  The paper gives it twice, and the two are not the same; the released code has a
third one.  All are here under names of their own, at a weight that is stated, and with one tangent of the student and
one backward pass of the teacher (chapters/03_finite_differences).

Source: LGTM Algorithm 1, eqs. (8)-(11).  Derived in: chapters/07_good_teachers.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kdlib import models
from kdlib.imitation import Imitation
from kdlib.learner import Batch, Learner
from kdlib.methods import Step, mean_entropy
from kdlib.methods.metadistil import PILOT_RULES, PilotRule, check_pieces, recording, teaching_experiment
from kdlib.methods.online import detached
from kdlib.models import Outputs
from kdlib.tangent import TangentMethod, distillation_influence, feedback_gradient, student_tangent

Variant = Literal["weighted", "printed", "meta", "released"]
VARIANTS: tuple[Variant, ...] = ("weighted", "printed", "meta", "released")
RateOf = Literal["student_rate", "teacher_rate"]
RATES: tuple[RateOf, ...] = ("student_rate", "teacher_rate")
RELEASED_STUDENT, RELEASED_TEACHER = Imitation(alpha=0.0, temperature=1.0), Imitation(alpha=0.6, temperature=1.0)
"""What student and teacher imitate in the released code."""
Watch = Callable[[Batch, Float[Tensor, "batch"], Outputs, Outputs], None]


def lgtm(
    student: Learner,
    teacher: Learner,
    imitation: Imitation,
    teacher_imitation: Imitation | None,
    influence: Variant = "weighted",
    weight: float | RateOf = 1.0,
    share: float | None = None,
    pilot_rule: PilotRule = "sgd",
    pilot_learning_rate: float | None = None,
    tangent: TangentMethod = "jvp",
    tangent_precision: Literal["fp32", "autocast"] = "fp32",
    feedback_every: int = 1,
    feedback_layers: int | None = None,
    observe: bool = False,
    watch: Watch | None = None,
    pilot_pieces: int = 1,
) -> Step:
    """A step on a training batch and a feedback batch, in the order of Algorithm 1.

    A pilot copy of the student learns the batch; its loss on the feedback batch has the gradient g; I_i is the
    influence of sample i along g, and ℓ_i its distillation loss: what in the student's `imitation` depends on the
    teacher, over its weight 1 − α.  The teacher descends its auxiliary loss, eq. (11), which is `teacher_imitation` as
    in `online_distillation` (None: none), plus the influence term:

    * "weighted": w · mean_i I_i ℓ_i with I_i held fixed, eq. (9);
    * "printed": w · mean_i I_i, eq. (10) and Algorithm 1 as printed;
    * "meta": −w · mean_i I_i, the sign of the chain rule.  With w = (1 − α) η_s, "student_rate", it has the gradient of
      the pilot's feedback loss, eq. (19), which is MetaDistil's;
    * "released": −w · mean_i of the derivative of the *teacher's* imitation along g, and g as AdamW's pilot step gives
      it, without the step's Jacobian: what the released code does (see `released`).

    The weight w is a number (1 in the paper), or "student_rate", or "teacher_rate", the teacher's present learning
    rate.  With `share` it is ignored: the term is scaled at every step so that its gradient is `share` times as long as
    that of the auxiliary loss.  That, and `observe`, which logs the ratio of the two lengths ("influence_ratio") and
    their cosine, cost two more backward passes of the teacher.

    The teacher is asked once before its update, with dropout, as it is in training: that answer is what the pilot
    learns, what the influence is differentiated through, and what the auxiliary loss judges.  So one backward pass does
    for all.  The pilot and the student's tangent are without dropout.  At weight 0 this is `online_distillation`.

    What saves time, at a price: `tangent="forward-difference"` reuses the pilot's own pass; `feedback_every=k` leaves
    pilot and influence term out of all but each k-th step; `feedback_layers=k` counts, in every I_i, only the weights
    of the student's last k layers, pooler and head.  `pilot_pieces` saves memory, as in `metadistil`.

    `watch(batch, influences, student's outputs, teacher's outputs)` is called whenever there are influences.

    Raises ValueError as `check_settings` and `metadistil.check_pieces` do.

    Source: LGTM Algorithm 1, eqs. (8)-(11).
    Derived in: chapters/03_finite_differences and chapters/07_good_teachers.
    """
    micro_batches = max(student.micro_batches, teacher.micro_batches)
    check_settings(imitation, teacher_imitation, influence, weight, share, pilot_rule, feedback_every, micro_batches)
    check_pieces(pilot_pieces, imitation.objective)
    module, wanted = student.module, imitation.wanted
    taught = replace(imitation, alpha=0.0, pkd_weight=imitation.pkd_weight / (1 - imitation.alpha))
    names = None if feedback_layers is None else models.last_layers(module, feedback_layers)
    lowered = student.accelerator.autocast if tangent_precision == "autocast" else nullcontext

    def influences_on(batch: Batch, feedback: Batch, answers: Outputs, rate: float) -> tuple[Tensor, Outputs, Tensor]:
        """Lines 3 to 7: I_i, which can be differentiated in the teacher's answers; the student's outputs; L_val."""
        with lowered():
            trial = teaching_experiment(student, batch, detached(answers), imitation, 1, pilot_rule, rate, pilot_pieces)
            quizzed: list[Tensor] = []
            g = feedback_gradient(module, trial.copy, feedback, recording(quizzed), names, pilot_pieces)
            if trial.slopes is not None and influence != "released":
                g = {name: trial.slopes[name] * value for name, value in g.items()}
            here = {name: trial.places[0][name] for name in g}
            own, moving = student_tangent(module, here, batch, g, tangent, outputs=trial.outputs[0], **wanted)
        role = teachers_loss if influence == "released" else students_loss
        influences = distillation_influence(role, own, moving, answers, batch["labels"])
        return influences, own, torch.cat(quizzed).mean()

    def students_loss(ours: Outputs, theirs: Outputs, labels: Tensor) -> Tensor:
        return taught(ours, theirs, labels)

    def teachers_loss(ours: Outputs, theirs: Outputs, labels: Tensor) -> Tensor:
        return teacher_imitation(theirs, ours, labels)

    def step(batch: Batch, feedback: Batch) -> dict[str, float]:
        labels = batch["labels"]
        rates = {
            "student": student.optimizer.param_groups[0]["lr"] if pilot_learning_rate is None else pilot_learning_rate,
            "teacher": teacher.optimizer.param_groups[0]["lr"],
        }
        with teacher.accelerator.autocast():
            answers = models.outputs(teacher.module, batch, **wanted)
        lesson, values = detached(answers), {}
        due = student.schedule.state_dict()["last_epoch"] % feedback_every == 0
        if due:
            influences, own, quiz = influences_on(batch, feedback, answers, rates["student"])
            values |= _spread(influences) | {"feedback_loss": quiz.item()}
            if watch is not None:
                watch(batch, influences.detach(), own, lesson)
        else:
            with student.accelerator.autocast():
                own = models.targets(module, batch, **wanted)

        def loss_of_the_teacher(_: Batch) -> Tensor:
            """Eq. (11): one value per sample."""
            auxiliary = 0.0 * answers.logits.sum(-1)
            if teacher_imitation is not None:
                auxiliary = teacher_imitation(answers, own, labels)
                values["teacher_loss"] = auxiliary.detach().mean().item()
            if not due:
                return auxiliary
            if influence == "weighted":
                term = influences.detach() * taught(own, answers, labels)
            else:
                term = influences if influence == "printed" else -influences
            scale = _scale(weight, rates, imitation.alpha)
            if share is not None or observe:
                first, second = (_gradient(part, teacher) for part in (auxiliary, term))
                sizes = first.norm(), second.norm()
                if share is not None:
                    scale = (share * sizes[0] / sizes[1]).item() if sizes[1] > 0 else 0.0
                values["influence_weight"] = scale
                values["influence_ratio"] = (scale * sizes[1] / sizes[0]).item() if sizes[0] > 0 else math.inf
                values["influence_cosine"] = torch.nn.functional.cosine_similarity(first, second, dim=0).item()
            return auxiliary + scale * term

        # Line 8: the teacher.
        teacher.minimise(loss_of_the_teacher, batch)

        # Line 9: the real student, on the same batch, from the new teacher.
        with teacher.accelerator.autocast():
            example = models.targets(teacher.module, batch, **wanted)

        def loss_of_the_student(batch: Batch) -> Tensor:
            return imitation(models.outputs(module, batch, **wanted), example, batch["labels"])

        values["loss"] = student.minimise(loss_of_the_student, batch)
        entropies = {"student_entropy": mean_entropy(own.logits), "teacher_entropy": mean_entropy(lesson.logits)}
        return values | entropies

    return step


def released(
    student: Learner,
    teacher: Learner,
    imitation: Imitation = RELEASED_STUDENT,
    teacher_imitation: Imitation = RELEASED_TEACHER,
    **settings: Any,
) -> Step:
    """`lgtm` as the code released with the paper has it; `settings` change single arguments of `lgtm`.

    The student learns from the teacher alone, the teacher with 0.6 from the labels and 0.4 from KL(student ‖ teacher).
    The pilot takes AdamW's step, whose Jacobian is left out.  The central difference is that of the teacher's loss, and
    the weight is the *teacher's* learning rate.

    What is not followed: the code takes the feedback from the validation data, which here is whatever is given; it
    leaves dropout on in the feedback gradient and off in the difference's teacher; and it takes the difference of the
    loss where this one takes it of the student's outputs, equal but for ε².
    """
    chosen = {"influence": "released", "weight": "teacher_rate", "pilot_rule": "adamw", "tangent": "finite-difference"}
    return lgtm(student, teacher, imitation, teacher_imitation, **{**chosen, **settings})


def _scale(weight: float | str, rates: dict[str, float], alpha: float) -> float:
    """The weight of the influence term as a number."""
    if weight == "student_rate":
        return (1 - alpha) * rates["student"]
    return rates["teacher"] if weight == "teacher_rate" else weight


def _gradient(values: Tensor, learner: Learner) -> Float[Tensor, "weights"]:
    """The gradient of a mean in all weights of a learner, as one vector; the graph is kept."""
    weights = [parameter for parameter in learner.module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(values.mean(), weights, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def _spread(influences: Float[Tensor, "batch"]) -> dict[str, float]:
    """What to log of the influences of a batch."""
    known = influences.detach().float()
    moments = torch.stack([known.mean(), known.std(correction=0), (known > 0).float().mean()])
    return dict(zip(("influence_mean", "influence_std", "influence_positive"), moments.tolist(), strict=True))


def check_settings(
    imitation: Imitation,
    teacher_imitation: Imitation | None,
    influence: str = "weighted",
    weight: float | str = 1.0,
    share: float | None = None,
    pilot_rule: str = "sgd",
    feedback_every: int = 1,
    micro_batches: int = 1,
) -> None:
    """Raise ValueError for settings of `lgtm` that have no meaning."""
    if influence not in VARIANTS:
        raise ValueError(f"influence is {influence!r}; expected one of {', '.join(VARIANTS)}")
    number = isinstance(weight, (int, float))
    if weight not in RATES if not number else not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"influence_weight is {weight!r}; expected a number ≥ 0 or one of {', '.join(RATES)}")
    if share is not None and not (math.isfinite(share) and share >= 0):
        raise ValueError(f"influence_share is {share}; expected a number ≥ 0, or None")
    if pilot_rule not in PILOT_RULES:
        raise ValueError(f"pilot_rule is {pilot_rule!r}; expected one of {', '.join(PILOT_RULES)}")
    if feedback_every < 1:
        raise ValueError(f"feedback_every is {feedback_every}; expected 1 (at every step) or more")
    if imitation.alpha == 1:
        raise ValueError("alpha is 1: the student learns from the labels alone, so no teacher can influence it")
    if teacher_imitation is None and (share is not None or influence == "released"):
        raise ValueError("without an auxiliary loss there is nothing to take a share of, nor a loss of the teacher")
    if teacher_imitation is not None and teacher_imitation.wanted:
        raise ValueError(
            "a teacher imitates its student's predictions only: give pkd_weight to the student's imitation"
        )
    if micro_batches > 1:
        raise ValueError(
            f"micro_batches is {micro_batches}: the pilot step needs the whole batch at once; take 1 and a smaller "
            "batch_size"
        )
