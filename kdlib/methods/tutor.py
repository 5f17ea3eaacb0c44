"""Tutor-KD: what the tutor fills in, what that earns it, what the student learns from it, and the whole algorithm.

A batch holds sentences of token ids, `words` of shape `(batch, tokens)`, and `masked` says which of their positions are
masked.  Everything else is about these positions only, in the order of `logits[masked]`: logits of shape
`(positions, vocabulary)`, tokens and rewards `(samples, positions)`, where a paper's single sample is the first of one.
So padding, special tokens and the words that were left alone cannot count.

Three sets of logits must be kept apart: the tutor's and the teacher's on the masked sentence, and the teacher's on the
sentence as the tutor filled it in.

Source: Tutor-KD section 3.  Derived in: chapters/08_policy_gradient, chapters/09_tutor_kd.
"""

import copy
import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from kdlib import losses, models, policy
from kdlib import representations as inner
from kdlib.learner import Batch, Learner, minimise_together
from kdlib.losses import Reduction
from kdlib.methods import Step
from kdlib.models import Encoding

Strategy = Literal["tutor", "reverse", "no reward", "hard for both", "easy for both"]
SIGNS: dict[Strategy, tuple[int, int]] = {
    "tutor": (1, 1),
    "reverse": (-1, -1),
    "no reward": (0, 0),
    "hard for both": (-1, 1),
    "easy for both": (1, -1),
}
"""The signs of r_T and r_S in what the tutor is paid, by the names of Tutor-KD section 5.3."""
Baseline = Literal["none", "running mean", "leave one out"]
Imitated = Literal["modified", "distribution"]
Order = Literal["together", "in turns"]

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


# The algorithm


@dataclass(frozen=True)
class Settings:
    """How Tutor-KD is run; the defaults are the paper's, where it names a number.

    `reward_weight` is λ of eq. (2), `strategy` a name of section 5.3, `kl_weight` the weight of the tutor's KL in eq.
    (7); `logit_weight` and `inner_weight` are λ₁ and λ₂ of eq. (8), `temperature` is τ of eq. (11).  `samples` words
    are drawn for each position; `baseline` is subtracted from their rewards.  With `imitated="distribution"` the
    student learns the teacher's whole distribution on the masked sentence in the place of the modified probability
    (Table 4, "w/o Mod").  `attention` is the term of eq. (13).  With `everywhere` the student must also say of the
    words that were left alone that they are right, as in the released code.  `order`: one step for tutor and student
    "together", as in the released code, or "in turns", the maximisation first, then the minimisation on words drawn
    anew.

    Raises ValueError for what does not go together.
    """

    reward_weight: float = 0.5
    strategy: Strategy = "tutor"
    logit_weight: float = 25.0
    inner_weight: float = 0.5
    temperature: float = 1.0
    kl_weight: float = 1.0
    samples: int = 1
    baseline: Baseline = "none"
    imitated: Imitated = "modified"
    attention: bool = True
    everywhere: bool = False
    order: Order = "together"

    def __post_init__(self) -> None:
        choices = {"strategy": tuple(SIGNS), "baseline": Baseline, "imitated": Imitated, "order": Order}
        for name, valid in choices.items():
            names = valid if isinstance(valid, tuple) else typing.get_args(valid)
            if getattr(self, name) not in names:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(names)}")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; expected 1 or more")
        if self.baseline == "leave one out" and self.samples < 2:
            raise ValueError("baseline 'leave one out' needs samples of 2 or more, got 1; take 'running mean'")
        if self.everywhere and self.imitated != "modified":
            raise ValueError("everywhere asks for modified probabilities of all words: it needs imitated='modified'")
        mixed_reward(torch.zeros(1), torch.zeros(1), self.reward_weight)


class Tutor(nn.Module):
    """The tutor network: a masked-language-model head on the teacher's last hidden states.

    It starts as a copy of the teacher's head, where it draws what the teacher would, or with random weights, as in the
    released code.  It also keeps the running mean of its rewards, so that a resumed run goes on with it.

    Source: Tutor-KD section 3.1.  Derived in: chapters/09_tutor_kd.
    """

    def __init__(self, teacher: PreTrainedModel, start: Literal["teacher", "random"] = "teacher", seed: int = 0):
        super().__init__()
        if start not in ("teacher", "random"):
            raise ValueError(f"start is {start!r}; expected 'teacher' or 'random'")
        self.head = copy.deepcopy(models.masked_head(teacher)).float().requires_grad_()
        if start == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.head.apply(partial(_draw_weights, spread=teacher.config.initializer_range))
        self.register_buffer("mean_reward", torch.zeros(()))

    def forward(self, states: Float[Tensor, "positions hidden"]) -> Float[Tensor, "positions vocabulary"]:
        """Logits of p_G, in float32 at least, from the teacher's last hidden states on the masked sentence."""
        return losses.full_precision(self.head(states))

    def baseline(self, rewards: Float[Tensor, "samples positions"], kind: Baseline) -> Tensor | float:
        """What is subtracted from these rewards."""
        if kind == "leave one out":
            return policy.leave_one_out(rewards)
        return self.mean_reward if kind == "running mean" else 0.0

    def remember(self, rewards: Float[Tensor, "samples positions"]) -> None:
        """Take the rewards of a step that is over into the running mean."""
        self.mean_reward.copy_(policy.running_mean(self.mean_reward, rewards))


class Student(nn.Module):
    """A student with what it needs to be taught, and later leaves behind: a score for each word, and W of eq. (12).

    Derived in: chapters/09_tutor_kd.
    """

    def __init__(self, network: PreTrainedModel, teacher_width: int, seed: int = 0):
        super().__init__()
        width = network.config.hidden_size
        self.network = network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.score, self.projection = nn.Linear(width, 1), nn.Linear(width, teacher_width, bias=False)

    def projected(self, states: Float[Tensor, "*positions hidden"]) -> Float[Tensor, "*positions teachers_hidden"]:
        """H^S W."""
        return self.projection(states)

    def scores(self, states: Float[Tensor, "*positions hidden"]) -> Float[Tensor, "*positions"]:
        """What `modified_prediction` and `modified_loss` take, in float32 at least."""
        return losses.full_precision(self.score(states).squeeze(-1))


@dataclass(frozen=True)
class Turn:
    """What one pass through tutor, teacher and student gives.

    `student` is eq. (8), a scalar with its graph; the rest is what `tutor_loss` takes; `log` holds numbers to look at.
    """

    student: Tensor
    tutor_logits: Tensor
    teacher_logits: Tensor
    drawn: Tensor
    rewards: Tensor
    baseline: Tensor | float
    log: dict[str, Tensor]

    def tutor(self, kl_weight: float, paid: bool = True) -> Tensor:
        """The mean of `tutor_loss`, a scalar with its graph; not `paid`, it is the KL alone."""
        rewards, baseline = (self.rewards, self.baseline) if paid else (torch.zeros_like(self.rewards), 0.0)
        return tutor_loss(self.tutor_logits, self.teacher_logits, self.drawn, rewards, baseline, kl_weight).mean()


def tutor_kd(
    student: Learner,
    tutor: Learner,
    teacher: PreTrainedModel,
    special: Sequence[int],
    mask: int,
    settings: Settings | None = None,
) -> Step:
    """Tutor-KD: the tutor learns to fill in words that are easy for the teacher and hard for the student.

    `student.module` is a `Student`, `tutor.module` a `Tutor`; `special` and `mask` are token ids.  A batch has
    `input_ids`, `attention_mask` and `masked`.  The teacher is fixed and in evaluation mode.

    Source: Tutor-KD section 3.  Derived in: chapters/09_tutor_kd.
    """
    settings = settings or Settings()
    rewarding = dataclasses.replace(settings, inner_weight=0.0)  # what is inside the networks earns the tutor nothing

    def take(batch: Batch, settings: Settings = settings) -> Turn:
        return take_turn(student.module, tutor.module, teacher, batch, special, mask, settings)

    def together(batch: Batch) -> dict[str, float]:
        turns: list[Turn] = []

        def both(piece: Batch) -> list[Tensor]:
            turns.append(take(piece))
            return [_spread(turns[0].student, piece), _spread(turns[0].tutor(settings.kl_weight), piece)]

        loss, tutor_loss = minimise_together([student, tutor], both, batch)
        tutor.module.remember(turns[0].rewards)
        return {"loss": loss, "tutor_loss": tutor_loss, **_numbers(turns[0].log)}

    def in_turns(batch: Batch) -> dict[str, float]:
        turns: list[Turn] = []

        def maximised(piece: Batch) -> Tensor:
            turns.append(take(piece, rewarding))
            return _spread(turns[0].tutor(0.0), piece)

        def minimised(piece: Batch) -> list[Tensor]:
            turn = take(piece)
            return [_spread(turn.student, piece), _spread(turn.tutor(settings.kl_weight, paid=False), piece)]

        tutor_loss = tutor.minimise(maximised, batch)
        tutor.module.remember(turns[0].rewards)
        loss, kl = minimise_together([student, tutor], minimised, batch)
        return {"loss": loss, "tutor_loss": tutor_loss + kl, **_numbers(turns[0].log)}

    return together if settings.order == "together" else in_turns


def take_turn(
    student: Student,
    tutor: Tutor,
    teacher: PreTrainedModel,
    batch: Batch,
    special: Sequence[int],
    mask: int,
    settings: Settings,
) -> Turn:
    """Draw words, fill them in, ask teacher and student: everything that both steps of Tutor-KD need.

    The teacher runs twice, without a graph: on the masked sentences for the tutor's input, its anchor and a^T, and on
    the filled ones for r_T and for what the student imitates inside.

    Source: Tutor-KD eqs. (1)-(14).  Derived in: chapters/09_tutor_kd.
    """
    words, masked, attended = batch["input_ids"], batch["masked"], batch["attention_mask"]
    originals, real = words[masked], attended.repeat(settings.samples, 1)
    layers, asked = _layers(student.network, teacher, settings)
    with torch.no_grad():
        states = models.encode_tokens(teacher, hide(words, masked, mask, special), attended).hidden_states[-1][masked]
        masked_logits = models.masked_logits(teacher, states)
    tutor_logits = tutor(states)
    drawn = policy.draw_actions(tutor_logits, settings.samples)

    theirs: list[Encoding] = []
    ours: list[Encoding] = []
    guesses: list[Tensor] = []

    def ask_teacher(rows: Tensor, positions: Tensor) -> Tensor:
        theirs.append(models.encode_tokens(teacher, rows, real, [layer for _, layer in asked]))
        guesses.append(models.masked_logits(teacher, theirs[0].hidden_states[-1][positions]))
        return guesses[0]

    def ask_student(rows: Tensor, positions: Tensor) -> Tensor:
        ours.append(models.encode_tokens(student.network, rows, real, [layer for layer, _ in asked]))
        return student.scores(ours[0].hidden_states[-1][positions])

    lesson = make_lesson(words, masked, drawn, masked_logits, ask_teacher, ask_student)
    if settings.imitated == "modified":
        imitation, hardness = modified_loss(lesson.scores, lesson.targets, settings.temperature), lesson.student_reward
        if settings.everywhere:
            others = attended.bool() & ~masked & ~torch.isin(words, words.new_tensor(special))
            scores = student.scores(ours[0].hidden_states[-1].unflatten(0, (settings.samples, -1))[:, others])
            scores, targets = torch.cat([lesson.scores, scores], -1), torch.cat([lesson.targets, scores * 0 + 1], -1)
            imitation = modified_loss(scores, targets, settings.temperature)
    else:
        logits = models.masked_logits(student.network, ours[0].hidden_states[-1][masked.repeat(settings.samples, 1)])
        aim = masked_logits.repeat(settings.samples, 1)
        imitation = losses.kl_divergence(logits, aim)
        hardness = total_variation(logits.detach(), aim).unflatten(0, (settings.samples, -1))
    of_teacher, of_student = SIGNS[settings.strategy]
    rewards = mixed_reward(of_teacher * lesson.teacher_reward, of_student * hardness, settings.reward_weight)
    loss = settings.logit_weight * imitation
    if layers:
        loss = loss + settings.inner_weight * inner_loss(student, ours[0], theirs[0], real, layers, bool(asked))
    with torch.no_grad():
        log = {
            "teacher_reward": lesson.teacher_reward.mean(),
            "student_reward": hardness.mean(),
            "teacher_nll": F.cross_entropy(guesses[0], originals.repeat(settings.samples)),
            "student_nll": imitation.detach(),
            "copied": (drawn == originals).float().mean(),
        }
    baseline = tutor.baseline(rewards, settings.baseline)
    return Turn(loss, tutor_logits, masked_logits, drawn, rewards, baseline, log)


def inner_loss(
    student: Student,
    ours: Encoding,
    theirs: Encoding,
    attended: Int[Tensor, "rows tokens"],
    layers: Sequence[tuple[int, int]],
    attention: bool = True,
) -> Tensor:
    """L_inter: hidden states, through the trainable W, and attention distributions of the paired layers; a scalar.

    `layers` are pairs (student's, teacher's), from 1; sums over the pairs, means over the rows.

    Source: Tutor-KD eqs. (12)-(14).  Derived in: chapters/09_tutor_kd.
    """
    values = inner.hidden_mse(ours.hidden_states, theirs.hidden_states, attended, student.projection, layers)
    if attention:
        values = values + inner.attention_mse((ours.queries, ours.keys), (theirs.queries, theirs.keys), attended)
    return values.mean()


def untutored(
    student: Student, teacher: PreTrainedModel, special: Sequence[int], mask: int, settings: Settings
) -> Callable[[Batch], Tensor]:
    """The loss of the same student without a tutor, one value for each sentence, whose mean is the loss.

    It learns the teacher's distributions, and L_inter, on the masked sentences.

    Source: Tutor-KD Table 4, "w/o Mod, Tutor".  Derived in: chapters/09_tutor_kd.
    """
    layers, asked = _layers(student.network, teacher, settings)

    def loss(batch: Batch) -> Tensor:
        masked, attended = batch["masked"], batch["attention_mask"]
        words = hide(batch["input_ids"], masked, mask, special)
        with torch.no_grad():
            theirs = models.encode_tokens(teacher, words, attended, [layer for _, layer in asked])
            aim = models.masked_logits(teacher, theirs.hidden_states[-1][masked])
        ours = models.encode_tokens(student.network, words, attended, [layer for layer, _ in asked])
        guess = models.masked_logits(student.network, ours.hidden_states[-1][masked])
        value = settings.logit_weight * losses.kl_divergence(guess, aim)
        if layers:
            value = value + settings.inner_weight * inner_loss(student, ours, theirs, attended, layers, bool(asked))
        return _spread(value, batch)

    return loss


def _layers(network: PreTrainedModel, teacher: PreTrainedModel, settings: Settings):
    """The paired layers (student's, teacher's) whose hidden states count, and those whose attention does."""
    layers = inner.layer_map(depth(network), depth(teacher))[1:] if settings.inner_weight else ()
    return layers, layers if settings.attention else ()


def total_variation(logits: Float[Tensor, "*rows words"], others: Float[Tensor, "*rows words"]) -> Tensor:
    """½ Σ |p − q|, between 0 and 1: the reward r_S of a student that learns whole distributions.

    The paper does not say what r_S is without the modification; of the L1 distances this one has the scale of eq. (5).

    Derived in: chapters/09_tutor_kd.
    """
    return (F.softmax(logits, dim=-1) - F.softmax(others, dim=-1)).abs().sum(-1) / 2


def depth(network: PreTrainedModel) -> int:
    """The number of encoder layers."""
    return network.config.num_hidden_layers


def _spread(loss: Tensor, batch: Batch) -> Tensor:
    """A mean over positions as one value for each sentence, as a learner takes them."""
    return loss.expand(len(batch["labels"]))


def _numbers(values: dict[str, Tensor]) -> dict[str, float]:
    return dict(zip(values, torch.stack([*values.values()]).tolist(), strict=True))


def _draw_weights(module: nn.Module, spread: float) -> None:
    """BERT's initial weights: normal matrices, zero biases, LayerNorms that change nothing."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=spread)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def _at(values: Float[Tensor, "*positions vocabulary"], tokens: Int[Tensor, "*positions"]) -> Tensor:
    """The entry of each row that belongs to its token."""
    return values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
