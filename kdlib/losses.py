"""Objectives: pure functions of outputs.

Every function takes `reduction="none" | "mean" | "sum"`; with "none" it returns one value per sample, shape `(batch,)`,
because the later chapters weigh and differentiate single samples.  Logits have shape `(batch, classes)`.

The objectives that compare a student with a teacher at temperature T carry the factor T², so that the size of their
gradient in the student's logits does not depend on T to first order (derived in chapters/01_distillation).

Nothing is detached here: chapters 4 to 7 differentiate the same functions with respect to the *teacher*.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Reduction = Literal["none", "mean", "sum"]


def reduce(values: Float[Tensor, "batch *more"], reduction: Reduction) -> Tensor:
    """Return per-sample `values` as they are ("none"), their mean or their sum; there may be several to a sample.

    Raises ValueError for any other reduction, and for the mean or the sum of an empty batch.
    """
    if reduction == "none":  # one of several processes may have nothing that counts
        return values
    if len(values) == 0:
        raise ValueError("a loss over an empty batch is undefined; got 0 samples")
    if reduction == "mean":
        return values.mean()
    if reduction == "sum":
        return values.sum()
    raise ValueError(f"reduction is {reduction!r}; expected 'none', 'mean' or 'sum'")


def cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], reduction: Reduction = "mean"
) -> Tensor:
    """Cross entropy of hard labels, −log p_y, in nats.

    Raises ValueError if a label is not one of 0 … classes−1.

    Source: IKD eq. (3); the hard term of LGTM eq. (1) and MetaDistil eq. (1).  Derived in: chapters/01_distillation.
    """
    classes = logits.shape[-1]
    outside = (labels < 0) | (labels >= classes)
    # On a GPU this look would make every step wait; there the labels were checked when the data were loaded.
    if labels.device.type == "cpu" and outside.any():
        bad = labels[outside][0].item()
        raise ValueError(f"label {bad} is outside 0 … {classes - 1}: check the label column or the number of classes")
    return reduce(F.cross_entropy(logits, labels, reduction="none"), reduction)


def squared_error(
    predictions: Float[Tensor, "batch 1"], targets: Float[Tensor, "batch"], reduction: Reduction = "mean"
) -> Tensor:
    """Squared error (prediction − target)² of a regression head with one output, shapes `(batch, 1)` and `(batch,)`.

    Raises ValueError if the head has more than one output.  Derived in: chapters/01_distillation.
    """
    if predictions.shape != (len(targets), 1):
        raise ValueError(
            f"regression needs predictions of shape ({len(targets)}, 1), got {tuple(predictions.shape)}: "
            "float labels go with a head of one output, integer labels with one output per class"
        )
    return reduce((predictions.squeeze(-1) - targets.to(predictions.dtype)) ** 2, reduction)


def task_loss(logits: Float[Tensor, "batch classes"], labels: Tensor, reduction: Reduction = "mean") -> Tensor:
    """The task's own loss: `cross_entropy` for integer labels, `squared_error` for float targets (STS-B).

    Source: MetaDistil eq. (1), the task loss.  Derived in: chapters/01_distillation.
    """
    if labels.is_floating_point():
        return squared_error(logits, labels, reduction)
    return cross_entropy(logits, labels, reduction)


def kl_divergence(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
    reduction: Reduction = "mean",
) -> Tensor:
    """T² · KL between the two softened distributions, summed over classes, in nats.

    `direction="forward"` is KL(teacher ‖ student), the usual objective of a student; "reverse" is
    KL(student ‖ teacher), the proximal term of a learning teacher.  The gradient of the forward direction in the
    student's logits is T · (softmax(z_s/T) − softmax(z_t/T)).

    Raises ValueError for shapes that differ, fewer than two classes, or a temperature that is not positive.

    Source: IKD eqs. (1)-(2); LGTM writes the same gradient as a cross entropy in eq. (1).
    Derived in: chapters/01_distillation.
    """
    _check_pair(student_logits, teacher_logits, temperature, softmax=True)
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction is {direction!r}; expected 'forward' (teacher ‖ student) or 'reverse'")
    target, other = (teacher_logits, student_logits) if direction == "forward" else (student_logits, teacher_logits)
    log_p = F.log_softmax(target / temperature, dim=-1)
    log_q = F.log_softmax(other / temperature, dim=-1)
    return reduce(temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1), reduction)


def reverse_kl_divergence(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """T² · KL(student ‖ teacher): `kl_divergence` with `direction="reverse"`.  Derived in: chapters/01_distillation."""
    return kl_divergence(student_logits, teacher_logits, temperature, "reverse", reduction)


def soft_cross_entropy(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """T² · cross entropy of the student under the teacher's soft targets, −Σ_c p^t_c log p^s_c, in nats.

    Differs from `kl_divergence` by T² times the teacher's entropy: the same gradient for the student, another one for
    the teacher.  Raises as `kl_divergence` does.

    Source: LGTM eqs. (1), (3).  Derived in: chapters/01_distillation.
    """
    _check_pair(student_logits, teacher_logits, temperature, softmax=True)
    p = F.softmax(teacher_logits / temperature, dim=-1)
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    return reduce(-(temperature**2) * (p * log_q).sum(-1), reduction)


def reverse_soft_cross_entropy(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """T² · cross entropy of the teacher under the student's predictions, −Σ_c p^s_c log p^t_c, in nats.

    Linear in the student's probabilities, so alone it is lowest where the student is certain of the teacher's likeliest
    class.  LGTM eq. (3) prints it as the *teacher's* objective, with the roles exchanged: the teacher's logits come
    first.  ProKT and the code released with LGTM take `kl_divergence` called that way.  Raises as `kl_divergence` does.

    Source: LGTM eq. (3).  Derived in: chapters/04_online_distillation.
    """
    _check_pair(student_logits, teacher_logits, temperature, softmax=True)
    p = F.softmax(student_logits / temperature, dim=-1)
    log_q = F.log_softmax(teacher_logits / temperature, dim=-1)
    return reduce(-(temperature**2) * (p * log_q).sum(-1), reduction)


def logit_mse(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over classes of (z_s − z_t)².  Works for regression heads, `(batch, 1)`.

    The factor T² cancels the scale 1/T² of softened logits, so `temperature` has no effect; it is accepted so that all
    objectives can be called alike.  Raises ValueError for shapes that differ.  Derived in: chapters/01_distillation.
    """
    _check_pair(student_logits, teacher_logits, temperature, softmax=False)
    return reduce(((student_logits - teacher_logits) ** 2).mean(-1), reduction)


def probability_mse(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """T² · mean over classes of (p_s − p_t)², the objective of the code released with MetaDistil.

    Raises as `kl_divergence` does.  Derived in: chapters/01_distillation.
    """
    _check_pair(student_logits, teacher_logits, temperature, softmax=True)
    difference = F.softmax(student_logits / temperature, dim=-1) - F.softmax(teacher_logits / temperature, dim=-1)
    return reduce(temperature**2 * (difference**2).mean(-1), reduction)


def dist(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    inter: float = 1.0,
    intra: float = 1.0,
) -> Tensor:
    """DIST: one minus Pearson's correlation of the softened probabilities, within samples and within classes.

    `inter` weighs the correlation of each sample's probabilities over the classes, `intra` that of each class's over
    the batch, so samples do not stand alone here: a value is the sample's part of the batch's loss, their mean the
    loss, and another batch gives another value.  There is no factor T²: a correlation does not shrink with its
    arguments, so its gradient hardly depends on a high temperature as it is.

    With two classes the inter part is left out.  Two probabilities that add up to one have a correlation of ±1,
    whatever they are, and no gradient.

    Raises as `kl_divergence` does.

    Source: DIST (Huang et al., 2022), used in LGTM Table 2.  Derived in: chapters/07_good_teachers.
    """
    _check_pair(student_logits, teacher_logits, temperature, softmax=True)
    p, q = (F.softmax(logits / temperature, dim=-1) for logits in (student_logits, teacher_logits))
    samples, classes = p.shape
    values = intra * samples * correlation_distance(p, q, dim=0).mean(1)
    if classes > 2:
        values = values + inter * correlation_distance(p, q, dim=1).sum(1)
    return reduce(values, reduction)


def spherical(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """`kl_divergence` after the student's logits were given the teacher's length, sample by sample.

    Logits less their mean over the classes are a direction times a length, the standard deviation; only the direction
    is imitated.  Two classes have but one direction and its opposite, so there the gradient is zero.  The released code
    scales the labels' cross entropy in the same way; here the labels see the logits as they are.

    Raises as `kl_divergence` does.

    Source: SKD (Guo et al., 2022), a rival in LGTM Table 1.
    """
    _check_pair(student_logits, teacher_logits, temperature, softmax=True)
    ours, theirs = (logits - logits.mean(-1, keepdim=True) for logits in (student_logits, teacher_logits))
    # The small number keeps the derivative finite where all logits are equal, as at a classifier of zeros.
    lengths = [(logits.square().mean(-1, keepdim=True) + 1e-8).sqrt() for logits in (ours, theirs)]
    return kl_divergence(ours * (lengths[1] / lengths[0]), theirs, temperature, reduction=reduction)


def correlation_distance(a: Float[Tensor, "rows columns"], b: Float[Tensor, "rows columns"], dim: int) -> Tensor:
    """One minus Pearson's correlation along `dim`, entry by entry: the sum over `dim` is the distance.

    Half the squared difference of the values made to have mean zero and length one.  Values that do not vary have no
    correlation; they become zeros.
    """

    def standard(values: Tensor) -> Tensor:
        centred = values - values.mean(dim, keepdim=True)
        # The small number keeps the derivative finite where all values are equal, as at a classifier of zeros.
        return centred / (centred.square().sum(dim, keepdim=True) + 1e-8).sqrt()

    return (standard(a) - standard(b)).square() / 2


Objective = Callable[..., Tensor]

OBJECTIVES: dict[str, Objective] = {
    "kl": kl_divergence,
    "reverse_kl": reverse_kl_divergence,
    "soft_cross_entropy": soft_cross_entropy,
    "logit_mse": logit_mse,
    "probability_mse": probability_mse,
    "dist": dist,
    "spherical": spherical,
}
"""Distillation objectives by the name used in run configurations; each is called as
`objective(student_logits, teacher_logits, temperature=T, reduction=…)`."""

TEACHER_OBJECTIVES = {**OBJECTIVES, "reverse_soft_cross_entropy": reverse_soft_cross_entropy}
"""What a teacher may imitate in its student; the last is no distance, for it is not smallest where the two agree."""

BATCH_OBJECTIVES = ("dist",)
"""The objectives that compare whole batches, so that a batch cannot be cut into pieces."""

REGRESSION_OBJECTIVES = ("logit_mse",)
"""The objectives that make sense for a head with a single output."""


def distillation_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Tensor,
    alpha: float = 0.5,
    temperature: float = 1.0,
    objective: Objective = kl_divergence,
    reduction: Reduction = "mean",
) -> Tensor:
    """α · task loss + (1 − α) · objective, per sample or reduced.

    α is the weight of the hard labels, as in LGTM and MetaDistil; IKD's λ is 1 − α.

    Raises ValueError unless 0 ≤ α ≤ 1, and what the two losses raise.

    Source: LGTM eq. (1), MetaDistil eq. (1), IKD eq. (4).  Derived in: chapters/01_distillation.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a weight between 0 (teacher only) and 1 (labels only)")
    hard = task_loss(student_logits, labels, reduction)
    soft = objective(student_logits, teacher_logits, temperature=temperature, reduction=reduction)
    return alpha * hard + (1 - alpha) * soft


def full_precision(values: Tensor) -> Tensor:
    """The same numbers in float32 at least, in which all objectives are computed, under autocast too."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_pair(student_logits: Tensor, teacher_logits: Tensor, temperature: float, softmax: bool) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ in "
            "shape: both networks must see the same batch and have the same number of labels"
        )
    if softmax and student_logits.shape[-1] < 2:
        raise ValueError(
            "a softmax over one output is constant, so this objective has no gradient: "
            "for regression use objective 'logit_mse'"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; expected a positive, finite number")
