"""Tutor-KD: a tutor fills in words that are easy for the teacher and hard for the student.

Three sets of logits must be kept apart: the tutor's and the teacher's on the masked sentence, and the teacher's on the
sentence as the tutor filled it in.  What is drawn, earned and imitated at the masked positions is in
`kdlib.methods.tutor_words`.

Source: Tutor-KD section 3.  Derived in: chapters/09_tutor_kd.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from kdlib import losses, models, policy, processes, representations
from kdlib.learner import Batch, Learner, minimise_together
from kdlib.methods.base import Step
from kdlib.methods.on_text import AskingForWords, ComparingAttention, Student, TextCast, TextLoss, TextRun, depth
from kdlib.methods.tutor_words import (
    Lesson,
    hide,
    make_lesson,
    mixed_reward,
    modified_loss,
    total_variation,
    tutor_loss,
)
from kdlib.models import Encoding
from kdlib.processes import Part
from kdlib.settings import Positive, Share, Size, Weight, among, settings

SIGNS: dict[str, tuple[int, int]] = {
    "tutor": (1, 1),
    "reverse": (-1, -1),
    "no reward": (0, 0),
    "hard for both": (-1, 1),
    "easy for both": (1, -1),
}
"""The signs of r_T and r_S in what the tutor is paid, by the names of Tutor-KD section 5.3."""
Baseline = Literal["none", "running mean", "leave one out"]


@settings
class Untutored(AskingForWords, ComparingAttention):
    """The same student without a tutor: Tutor-KD Table 4, "w/o Mod, Tutor"."""

    logit_weight: Weight = 25.0
    """λ₁ of eq. (8)"""
    inner_weight: Weight = 0.5
    """λ₂ of eq. (8), the weight of what is inside the networks"""

    @property
    def trains_head(self) -> bool:
        return True

    @property
    def pairs_layers(self) -> bool:
        return self.inner_weight != 0

    def compares(self, student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
        return self.pairs_layers and super().compares(student, teacher)

    def problems(self, run: TextRun) -> list[str]:
        found = super().problems(run)
        if self.inner_weight == 0 and self.attention is not None:
            found.append(f"attention is {self.attention}, but inner_weight is 0, which leaves it out")
        return found

    def loss(self, cast: TextCast) -> TextLoss:
        return untutored(*cast.pair, cast.special, cast.mask, self)


@settings
class TutorKD(Untutored):
    """Tutor-KD; the defaults are the paper's, where it names a number."""

    reward_weight: Share = 0.5
    """λ of eq. (2), the weight of r_T"""
    strategy: Annotated[str, among(SIGNS)] = "tutor"
    """"tutor", "reverse", "no reward", "hard for both" or "easy for both", by the names of section 5.3"""
    temperature: Positive = 1.0
    """τ of eq. (11)"""
    kl_weight: Weight = 1.0
    """weight of the tutor's KL to the teacher in eq. (7)"""
    samples: Size = 1
    """words drawn for each position"""
    baseline: Baseline = "none"
    """subtracted from the tutor's rewards, "none", "running mean" or "leave one out\""""
    imitated: Literal["modified", "distribution"] = "modified"
    """the teacher's "modified" probability, or its whole "distribution" on the masked sentence (Table 4, "w/o Mod")"""
    everywhere: bool = False
    """the words that were left alone are scored, too, and are right, as in the released code"""
    order: Literal["together", "in turns"] = "together"
    """the tutor's step and the student's "together", as in the released code, or "in turns", the maximisation first,
    then the minimisation on words drawn anew"""
    tutor_start: Literal["teacher", "random"] = "teacher"
    """the tutor is "teacher", a copy of its head, or "random", as in the released code, at first"""

    @property
    def trains_head(self) -> bool:
        return self.imitated == "distribution"

    def __post_init__(self) -> None:
        if self.baseline == "leave one out" and self.samples < 2:
            raise ValueError("baseline 'leave one out' needs samples of 2 or more, got 1; take 'running mean'")
        if self.everywhere and self.imitated != "modified":
            raise ValueError("everywhere asks for modified probabilities of all words: it needs imitated='modified'")
        if self.temperature < 1:
            raise ValueError(
                f"temperature is {self.temperature}; the tutor's divides probabilities: expected 1 or more"
            )

    def problems(self, run: TextRun) -> list[str]:
        unread = {
            "imitated 'distribution'": ("temperature",) if self.imitated == "distribution" else (),
            "strategy 'no reward'": ("reward_weight", "baseline") if self.strategy == "no reward" else (),
        }
        usual = {field.name: field.default for field in dataclasses.fields(TutorKD)}
        return super().problems(run) + [
            f"{name} is {getattr(self, name)!r}, which {choice} does not read: leave it out"
            for choice, names in unread.items()
            for name in names
            if getattr(self, name) != usual[name]
        ]

    def step(self, cast: TextCast) -> Step:
        assert cast.tutor is not None and cast.teacher is not None
        return tutor_kd(cast.student, cast.tutor, cast.teacher, cast.special, cast.mask, self)

    def measure(self, cast: TextCast) -> Callable[[Batch], dict[str, float]]:
        """The student's loss and the numbers of `Turn.log`."""
        assert cast.tutor is not None
        tutor, (student, teacher) = cast.tutor.module, cast.pair

        def measured(batch: Batch) -> dict[str, float]:
            turn = take_turn(student, tutor, teacher, batch, cast.special, cast.mask, self)
            return {"loss": turn.student.item(), **_numbers(turn.log)}

        return measured


class Tutor(nn.Module):
    """The tutor network: a masked-language-model head on the teacher's last hidden states.

    It starts as a copy of the teacher's head, where it draws what the teacher would, or with random weights, as in the
    released code.  It also keeps the running mean of its rewards, so that a resumed run goes on with it.

    Source: Tutor-KD section 3.1.  Derived in: chapters/09_tutor_kd.
    """

    mean_reward: Tensor

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


@dataclass(frozen=True)
class Turn:
    """What one pass through tutor, teacher and student gives.

    `student` is eq. (8), a scalar with its graph; the rest is what `tutor_loss` takes; `log` holds numbers to look at.
    Where several processes share the sentences, `student` and `log` are of the whole batch, all else of the sentences
    of this process.
    """

    student: Tensor
    tutor_logits: Tensor
    teacher_logits: Tensor
    drawn: Tensor
    rewards: Tensor
    baseline: Tensor | float
    log: dict[str, Tensor]
    gathered: Callable[[Tensor], Tensor]
    """one entry for each masked position of the whole batch, given those of this process; the last dimension"""

    def tutor(self, kl_weight: float, paid: bool = True) -> Tensor:
        """The mean of `tutor_loss`, a scalar with its graph; not `paid`, it is the KL alone."""
        rewards, baseline = (self.rewards, self.baseline) if paid else (torch.zeros_like(self.rewards), 0.0)
        values = tutor_loss(self.tutor_logits, self.teacher_logits, self.drawn, rewards, baseline, kl_weight)
        return self.gathered(values).mean()


def tutor_kd(
    student: Learner,
    tutor: Learner,
    teacher: PreTrainedModel,
    special: Sequence[int],
    mask: int,
    settings: TutorKD,
) -> Step:
    """Tutor-KD: the tutor learns to fill in words that are easy for the teacher and hard for the student.

    `student.module` is a `Student`, `tutor.module` a `Tutor`; `special` and `mask` are token ids.  A batch has
    `input_ids`, `attention_mask` and `masked`.  The teacher is fixed and in evaluation mode.

    Source: Tutor-KD section 3.  Derived in: chapters/09_tutor_kd.
    """
    rewarding = dataclasses.replace(settings, inner_weight=0.0)  # what is inside the networks earns the tutor nothing

    def take(batch: Batch, settings: TutorKD = settings) -> Turn:
        return take_turn(student.module, tutor.module, teacher, batch, special, mask, settings)

    def together(batch: Batch) -> dict[str, float]:
        turns: list[Turn] = []

        def both(piece: Batch) -> list[Tensor]:
            turns.append(take(piece))
            return [_spread(turns[0].student, piece), _spread(turns[0].tutor(settings.kl_weight), piece)]

        loss, tutor_loss = minimise_together([student, tutor], both, batch)
        tutor.module.remember(turns[0].gathered(turns[0].rewards))
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
        tutor.module.remember(turns[0].gathered(turns[0].rewards))
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
    settings: TutorKD,
) -> Turn:
    """Draw words, fill them in, ask teacher and student: everything that both steps of Tutor-KD need.

    The teacher runs twice, without a graph: on the masked sentences for the tutor's input, its anchor and a^T, and on
    the filled ones for r_T and for what the student imitates inside.

    Source: Tutor-KD eqs. (1)-(14).  Derived in: chapters/09_tutor_kd.
    """
    part = processes.part(batch["masked"])
    counts, own = part.counts(batch["masked"]), part.own(batch)

    def gathered(values: Tensor) -> Tensor:
        return part.gathered(values.movedim(-1, 0), counts).movedim(0, -1)

    words, masked, attended = own["input_ids"], own["masked"], own["attention_mask"]
    originals, real = words[masked], attended.repeat(settings.samples, 1)
    layers, with_attention = _layers(student.network, teacher, settings)
    with torch.no_grad():
        states = models.encode_tokens(teacher, hide(words, masked, mask, special), attended).hidden_states[-1][masked]
        masked_logits = models.masked_logits(teacher, states)
    tutor_logits = tutor(states)
    # One draw for the whole batch, whoever has its rows.
    drawn = policy.draw_actions(part.gathered(tutor_logits.detach(), counts), settings.samples)
    drawn = processes.from_first(drawn)[:, part.chosen(batch["masked"])]

    inside: dict[str, Encoding] = {}
    filled_logits: list[Tensor] = []

    def ask_teacher(rows: Tensor, positions: Tensor) -> Tensor:
        inside["teacher"] = models.encode_tokens(teacher, rows, real, [layer for _, layer in with_attention])
        filled_logits.append(models.masked_logits(teacher, inside["teacher"].hidden_states[-1][positions]))
        return filled_logits[0]

    def ask_student(rows: Tensor, positions: Tensor) -> Tensor:
        inside["student"] = models.encode_tokens(student.network, rows, real, [layer for layer, _ in with_attention])
        return student.scores(inside["student"].hidden_states[-1][positions])

    lesson = make_lesson(words, masked, drawn, masked_logits, ask_teacher, ask_student)
    imitation, hardness = _imitation(
        student, own, lesson, inside["student"], masked_logits, special, settings, part, counts
    )
    of_teacher, of_student = SIGNS[settings.strategy]
    rewards = mixed_reward(of_teacher * lesson.teacher_reward, of_student * hardness, settings.reward_weight)
    loss = settings.logit_weight * imitation
    if layers:
        inner = inner_loss(student, inside["student"], inside["teacher"], real, layers, bool(with_attention))
        loss = loss + settings.inner_weight * part.averaged(inner)
    with torch.no_grad():
        log = {
            "teacher_reward": gathered(lesson.teacher_reward).mean(),
            "student_reward": gathered(hardness).mean(),
            "teacher_nll": part.averaged(F.cross_entropy(filled_logits[0], originals.repeat(settings.samples)), counts),
            "student_nll": imitation.detach(),
            "copied": gathered((drawn == originals).float()).mean(),
        }
    baseline = tutor.baseline(rewards, settings.baseline)
    return Turn(loss, tutor_logits, masked_logits, drawn, rewards, baseline, log, gathered)


def _imitation(
    student: Student,
    own: Batch,
    lesson: Lesson,
    encoding: Encoding,
    masked_logits: Tensor,
    special: Sequence[int],
    settings: TutorKD,
    part: Part,
    counts: list[int],
) -> tuple[Tensor, Tensor]:
    """L_logit, a scalar of the whole batch, and how far the student is from what it should say, `(samples, positions)`
    of the `own` sentences.

    `counts` are the masked positions of each process.
    """
    masked, samples = own["masked"], settings.samples
    if settings.imitated == "distribution":
        logits = models.masked_logits(student.network, encoding.hidden_states[-1][masked.repeat(samples, 1)])
        aim = masked_logits.repeat(samples, 1)
        values = losses.kl_divergence(logits, aim, reduction="none")
        hardness = total_variation(logits.detach(), aim).unflatten(0, (samples, -1))
        return _mean(part, values, [samples * count for count in counts]), hardness
    scores, targets = lesson.scores, lesson.targets
    if settings.everywhere:
        words = own["input_ids"]
        others = own["attention_mask"].bool() & ~masked & ~torch.isin(words, words.new_tensor(special))
        more = student.scores(encoding.hidden_states[-1].unflatten(0, (samples, -1))[:, others])
        scores, targets = torch.cat([scores, more], -1), torch.cat([targets, more * 0 + 1], -1)
        counts = processes.told(0 if part.idle else scores.shape[-1])
    values = modified_loss(scores, targets, settings.temperature, "none")
    return _mean(part, values.flatten(), [samples * count for count in counts]), lesson.student_reward


def _mean(part: Part, values: Tensor, counts: Sequence[int]) -> Tensor:
    """The mean over the whole batch, given the values of this process."""
    return losses.reduce(part.gathered(values, counts), "mean")


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
    values = representations.hidden_mse(ours.hidden_states, theirs.hidden_states, attended, student.projection, layers)
    if attention:
        values = values + representations.attention_mse(
            (ours.queries, ours.keys), (theirs.queries, theirs.keys), attended
        )
    return values.mean()


def untutored(
    student: Student, teacher: PreTrainedModel, special: Sequence[int], mask: int, settings: Untutored
) -> TextLoss:
    """The loss of the same student without a tutor, one value for each sentence, whose mean is the loss.

    It learns the teacher's distributions, and L_inter, on the masked sentences.

    Source: Tutor-KD Table 4, "w/o Mod, Tutor".  Derived in: chapters/09_tutor_kd.
    """
    layers, asked = _layers(student.network, teacher, settings)

    def loss(batch: Batch) -> Tensor:
        part = processes.part(batch["masked"])
        own = part.own(batch)
        masked, attended = own["masked"], own["attention_mask"]
        words = hide(own["input_ids"], masked, mask, special)
        with torch.no_grad():
            theirs = models.encode_tokens(teacher, words, attended, [layer for _, layer in asked])
            aim = models.masked_logits(teacher, theirs.hidden_states[-1][masked])
        ours = models.encode_tokens(student.network, words, attended, [layer for layer, _ in asked])
        guess = models.masked_logits(student.network, ours.hidden_states[-1][masked])
        values = losses.kl_divergence(guess, aim, reduction="none")
        value = settings.logit_weight * _mean(part, values, part.counts(batch["masked"]))
        if layers:
            inner = inner_loss(student, ours, theirs, attended, layers, bool(asked))
            value = value + settings.inner_weight * part.averaged(inner)
        return _spread(value, batch)

    return loss


def _layers(
    network: PreTrainedModel, teacher: PreTrainedModel, settings: Untutored
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """The paired layers (student's, teacher's) whose hidden states count, and those whose attention does."""
    layers = representations.layer_map(depth(network), depth(teacher))[1:] if settings.pairs_layers else ()
    return layers, layers if settings.compares(network, teacher) else ()


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
