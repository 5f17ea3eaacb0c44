"""Tutor-KD's words: what the tutor fills in, what that earns it, and what the student learns from it.

A batch holds sentences of token ids, `words` of shape `(batch, tokens)`, and `masked` says which of their positions are
masked.  Everything else is about these positions only, in the order of `logits[masked]`: logits of shape
`(positions, vocabulary)`, tokens and rewards `(samples, positions)`, where a paper's single sample is the first of one.
So padding, special tokens and the words that were left alone cannot count.

Three sets of logits must be kept apart: the tutor's and the teacher's on the masked sentence, and the teacher's on the
sentence as the tutor filled it in.

Source: Tutor-KD section 3.  Derived in: chapters/08_policy_gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kdlib import losses, policy
from kdlib.losses import Reduction

# Samples


def hide(
    words: Int[Tensor, "batch tokens"], masked: Bool[Tensor, "batch tokens"], mask: int, special: Sequence[int]
) -> Int[Tensor, "batch tokens"]:
    """The masked sentences: token `mask` at the masked positions.

    Raises ValueError if one of them holds a token that is `special`, as padding is: there is nothing to learn there.

    Source: Tutor-KD section 3.1.  Derived in: chapters/08_policy_gradient.
    """
    wrong = torch.isin(words, words.new_tensor(special)) & masked
    if words.device.type == "cpu" and wrong.any():  # on a GPU the look would make every step wait
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"sentence {row} is masked at position {column}, where it has the special token {words[row, column]}: "
            "mask words only, neither padding nor [CLS] nor [SEP]"
        )
    return words.masked_fill(masked, mask)


def fill(
    words: Int[Tensor, "batch tokens"], masked: Bool[Tensor, "batch tokens"], drawn: Int[Tensor, "samples positions"]
) -> Int[Tensor, "samples batch tokens"]:
    """The sentences with the drawn words at the masked positions, one version for each sample.

    Raises ValueError unless there is one drawn word for each masked position.

    Source: Tutor-KD eq. (1).  Derived in: chapters/08_policy_gradient.
    """
    positions = int(masked.sum())
    if drawn.shape[-1] != positions:
        raise ValueError(
            f"{drawn.shape[-1]} words were drawn for {positions} masked positions: draw from logits[masked]"
        )
    filled = words.repeat(len(drawn), 1, 1)
    filled[:, masked] = drawn
    return filled


# Rewards


def teacher_reward(
    filled_logits: Float[Tensor, "samples positions vocabulary"],
    originals: Int[Tensor, "positions"],
    drawn: Int[Tensor, "samples positions"],
) -> Float[Tensor, "samples positions"]:
    """r_T: the teacher's probability of the original word minus that of the drawn one, both on the *filled* sentence.

    Between −1 and 1; zero where the tutor drew the original.  A constant.

    Source: Tutor-KD eqs. (3)-(4).  Derived in: chapters/08_policy_gradient.
    """
    logits = filled_logits.detach()
    normaliser = logits.logsumexp(-1)  # two probabilities of each row are wanted, not all of them
    return (_at(logits, originals.expand_as(drawn)) - normaliser).exp() - (_at(logits, drawn) - normaliser).exp()


def student_reward(
    targets: Float[Tensor, "samples positions"], scores: Float[Tensor, "samples positions"]
) -> Float[Tensor, "samples positions"]:
    """r_S = |a^T − a^S|: how far the student is from the modified probability that it should predict.  A constant.

    `targets` are the teacher's modified probabilities, `scores` the student's, before the sigmoid.

    Source: Tutor-KD eq. (5).  Derived in: chapters/08_policy_gradient.
    """
    return (targets - modified_prediction(scores)).abs().detach()


def mixed_reward(teacher: Tensor, student: Tensor, weight: float = 0.5) -> Tensor:
    """λ r_T + (1 − λ) r_S, with λ = `weight`.  The released code takes r_T + r_S, twice the mixture with λ = 1/2.

    Raises ValueError unless 0 ≤ λ ≤ 1.

    Source: Tutor-KD eqs. (2), (6).  Derived in: chapters/08_policy_gradient.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}; expected λ between 0 (the student's reward only) and 1 (the teacher's)")
    return weight * teacher + (1 - weight) * student


def per_sentence(
    values: Float[Tensor, "*samples positions"], masked: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "*samples batch"]:
    """The sum over the masked positions of each sentence, 0 where there are none.

    Source: Tutor-KD eqs. (4)-(5): R_T and R_S from r_T and r_S.  Derived in: chapters/08_policy_gradient.
    """
    sums = values.new_zeros(*values.shape[:-1], len(masked))
    return sums.index_add(-1, masked.nonzero()[:, 0], values)


def sentence_credit(
    rewards: Float[Tensor, "samples positions"], masked: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "samples positions"]:
    """For each position the reward of its whole sentence.

    With these in the place of the rewards REINFORCE is unbiased for eq. (2) also where a drawn word changes what its
    neighbours earn; eq. (6), which gives each position its own reward only, supposes that it does not.

    Source: Tutor-KD eq. (2).  Derived in: chapters/08_policy_gradient.
    """
    return per_sentence(rewards, masked)[..., masked.nonzero()[:, 0]]


@dataclass(frozen=True)
class Lesson:
    """What comes of the words that the tutor drew; all but `filled` have shape `(samples, positions)`.

    `filled`: the sentences as the student gets them, `(samples, batch, tokens)`.  `targets`, a^T, and `scores`, the
    student's before the sigmoid and with its graph, are what `modified_loss` takes.
    """

    filled: Tensor
    targets: Tensor
    scores: Tensor
    teacher_reward: Tensor
    student_reward: Tensor

    def rewards(self, weight: float = 0.5) -> Float[Tensor, "samples positions"]:
        """λ r_T + (1 − λ) r_S, with λ = `weight`."""
        return mixed_reward(self.teacher_reward, self.student_reward, weight)


def make_lesson(
    words: Int[Tensor, "batch tokens"],
    masked: Bool[Tensor, "batch tokens"],
    drawn: Int[Tensor, "samples positions"],
    masked_logits: Float[Tensor, "positions vocabulary"],
    teacher: Callable[[Tensor, Tensor], Tensor],
    student: Callable[[Tensor, Tensor], Tensor],
) -> Lesson:
    """Fill in the drawn words, ask teacher and student, and reckon what the tutor has earned.

    `masked_logits` are the teacher's on the masked sentences.  `teacher` and `student` take sentences and their masked
    positions, `(rows, tokens)` each, and answer at these positions: the teacher with logits `(positions, vocabulary)`,
    without a graph, the student with scores `(positions,)`.

    Raises what `fill` raises.

    Source: Tutor-KD section 3.2.  Derived in: chapters/08_policy_gradient.
    """
    originals, filled, samples = words[masked], fill(words, masked, drawn), len(drawn)
    rows = filled.flatten(0, 1), masked.repeat(samples, 1)
    with torch.no_grad():
        filled_logits = teacher(*rows).unflatten(0, (samples, -1))
    scores = student(*rows).unflatten(0, (samples, -1))
    targets = modified_probability(masked_logits, originals, drawn)
    earned = teacher_reward(filled_logits, originals, drawn), student_reward(targets, scores)
    return Lesson(filled, targets, scores, *earned)


# The tutor


def tutor_loss(
    tutor_logits: Float[Tensor, "positions vocabulary"],
    teacher_logits: Float[Tensor, "positions vocabulary"],
    drawn: Int[Tensor, "samples positions"],
    rewards: Float[Tensor, "samples positions"],
    baseline: Tensor | float = 0.0,
    kl_weight: float = 1.0,
) -> Float[Tensor, "positions"]:
    """What the tutor minimises: minus the REINFORCE term, plus KL(teacher ‖ tutor), both on the masked sentence.

    Its gradient is an estimate of that of −E[reward] + `kl_weight` · KL.  The teacher is a constant.  Averaged over the
    positions, with no baseline, it is the released code's.

    Raises what `policy.reinforce` and `losses.kl_divergence` raise.

    Source: Tutor-KD eqs. (6)-(7): the tutor's part.  Derived in: chapters/08_policy_gradient.
    """
    gain = policy.reinforce(tutor_logits, drawn, rewards, baseline)
    return kl_weight * losses.kl_divergence(tutor_logits, teacher_logits.detach(), reduction="none") - gain


# Modified probabilities


def modified_probability(
    masked_logits: Float[Tensor, "positions vocabulary"],
    originals: Int[Tensor, "positions"],
    drawn: Int[Tensor, "samples positions"],
) -> Float[Tensor, "samples positions"]:
    """a^T: the teacher's probability of the drawn word over that of the original, at most 1, on the *masked* sentence.

    The normaliser of the softmax cancels, so it is computed from a difference of logits and cannot become 0/0.  A
    constant.

    Source: Tutor-KD eq. (9).  Derived in: chapters/08_policy_gradient.
    """
    logits = masked_logits.detach().expand(len(drawn), *masked_logits.shape)
    return (_at(logits, drawn) - _at(logits, originals.expand_as(drawn))).clamp(max=0).exp()


def modified_prediction(scores: Tensor) -> Tensor:
    """a^S: the sigmoid of the student's scores, one for each drawn word; any shape.

    The paper prints σ(p_S(x′|X′)).  Of a probability, a sigmoid lies between 0.5 and 0.73, so it could not follow a^T.
    The released code takes a head with one output per position, and so do we.

    Source: Tutor-KD eq. (10).  Derived in: chapters/08_policy_gradient.
    """
    return scores.sigmoid()


def modified_loss(
    scores: Float[Tensor, "*positions"],
    targets: Float[Tensor, "*positions"],
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """L_logit: the binary cross entropy of a^S/τ under a^T/τ, in nats; smallest where they agree.

    `scores` are the student's before the sigmoid, `targets` the teacher's modified probabilities, which are constants.
    The paper divides probabilities, not logits, by τ.  The released code has no τ, that is τ = 1.

    Raises ValueError for τ < 1, for which a probability over τ could exceed 1; also what `losses.reduce` raises.

    Source: Tutor-KD eq. (11).  Derived in: chapters/08_policy_gradient.
    """
    if not (temperature >= 1 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; expected 1 or more: probabilities are divided by it")
    target, shift = targets.detach() / temperature, math.log(temperature)
    # log(1 − σ(s)/τ) = log(1 − 1/τ + σ(−s)/τ), as a sum of exponentials, since σ(s) may round to one.
    rest = F.logsigmoid(-scores) - shift
    if temperature > 1:
        rest = torch.logaddexp(rest, torch.full_like(scores, math.log1p(-1 / temperature)))
    return losses.reduce(-target * (F.logsigmoid(scores) - shift) - (1 - target) * rest, reduction)


def total_variation(logits: Float[Tensor, "*rows words"], others: Float[Tensor, "*rows words"]) -> Tensor:
    """½ Σ |p − q|, between 0 and 1: the reward r_S of a student that learns whole distributions.

    The paper does not say what r_S is without the modification; of the L1 distances this one has the scale of eq. (5).

    Derived in: chapters/09_tutor_kd.
    """
    return (F.softmax(logits, dim=-1) - F.softmax(others, dim=-1)).abs().sum(-1) / 2


def _at(values: Float[Tensor, "*positions vocabulary"], tokens: Int[Tensor, "*positions"]) -> Tensor:
    """The entry of each row that belongs to its token."""
    return values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
