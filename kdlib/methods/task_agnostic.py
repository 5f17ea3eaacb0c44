"""Task-agnostic distillation: a student learns a language model's knowledge from text without labels.

The baselines of Tutor-KD's tables, and BERT's own masked language modelling, which makes the teachers.  Each function
returns the loss of a network on a batch, one value for each sentence, whose mean is the loss.
A batch has `input_ids`, `corrupted` (some words masked or replaced), `masked` (which) and `attention_mask`, as
`corpus.Masking` makes it.  Teachers are fixed and asked without a graph; padding never counts.

Derived in: chapters/09_tutor_kd.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdlib import losses, models, processes
from kdlib import representations as inner
from kdlib.learner import Batch
from kdlib.methods.on_text import (
    AskingForWords,
    ComparingAttention,
    OnText,
    Student,
    TextCast,
    TextLoss,
    TextRun,
    check_heads,
    depth,
)
from kdlib.methods.tutor_words import per_sentence
from kdlib.models import Encoding
from kdlib.settings import Layers, Positive, settings


@settings
class MLM(OnText):
    """BERT's own masked language modelling, without a teacher."""

    teaches: ClassVar[Literal["nobody", "fixed", "learning"]] = "nobody"
    ignores: ClassVar[tuple[str, ...]] = ("teacher", "student_layers")
    trained: Literal["all", "head"] = "all"
    """what learns, "all" or only the "head", for an encoder that comes without one"""

    @property
    def trains_head(self) -> bool:
        return True

    def problems(self, run: TextRun) -> list[str]:
        found = super().problems(run)
        return found if run.student else [*found, f"method {run.method!r} trains a network of its own: give student"]

    def loss(self, cast: TextCast) -> TextLoss:
        return masked_language_model(cast.student.module)


@settings
class SoftLabels(AskingForWords):
    """The teacher's distributions at the masked positions."""

    temperature: Positive = 1.0
    """of both distributions"""

    @property
    def trains_head(self) -> bool:
        return True

    def loss(self, cast: TextCast) -> TextLoss:
        return soft_labels(*cast.pair, self.temperature)


@settings
class DistilBERT(AskingForWords):
    """Soft labels, hard labels, and the cosine of the last hidden states."""

    temperature: Positive = 2.0
    """of both distributions"""

    @property
    def trains_head(self) -> bool:
        return True

    def loss(self, cast: TextCast) -> TextLoss:
        return distilbert(*cast.pair, self.temperature)


@settings
class TinyBERT(ComparingAttention):
    """Hidden states of all layers, and attention."""

    def loss(self, cast: TextCast) -> TextLoss:
        student, teacher = cast.pair
        return tinybert(student, teacher, self.compares(student.network, teacher))


@settings
class MiniLM(OnText):
    """The last layer's attention and relations between its values."""

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        check_heads(student.config, teacher.config, "take minilm_v2, or such a student")

    def loss(self, cast: TextCast) -> TextLoss:
        return minilm(*cast.pair)


@settings
class MiniLMv2(OnText):
    """Relations among queries, among keys and among values of the last layer."""

    relation_heads: Layers | None = None
    """into so many they are split; None: 12, or the student's own where 12 does not divide its width"""

    def heads(self, student: PreTrainedModel) -> int:
        """Into how many heads they are split for this student."""
        usual = 12 if student.config.hidden_size % 12 == 0 else student.config.num_attention_heads
        return self.relation_heads or usual

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        heads = self.heads(student)
        for who, width in (("student", student.config.hidden_size), ("teacher", teacher.config.hidden_size)):
            if width % heads:
                raise ValueError(
                    f"relation_heads is {heads}, which does not divide the {who}'s width of {width}: give a number "
                    "that divides both"
                )

    def loss(self, cast: TextCast) -> TextLoss:
        student, teacher = cast.pair
        return minilm_v2(student, teacher, self.heads(student.network))


def masked_language_model(network: PreTrainedModel) -> TextLoss:
    """BERT's own objective: cross entropy of the original words at the masked positions.

    Source: BERT (Devlin et al., 2019).
    """

    def of_rows(batch: Batch, share: float) -> Tensor:
        masked = batch["masked"]
        logits = models.masked_logits(network, _encoded(network, batch).hidden_states[-1][masked])
        return _by_sentence(losses.cross_entropy(logits, batch["input_ids"][masked], "none"), masked, share)

    return _of_words(of_rows)


def soft_labels(student: Student, teacher: PreTrainedModel, temperature: float = 1.0) -> TextLoss:
    """KD in Tutor-KD's Table 2: T² · KL(teacher ‖ student) of the distributions at the masked positions."""

    def of_rows(batch: Batch, share: float) -> Tensor:
        theirs, ours = _both(student, teacher, batch)
        return _soft(student, teacher, ours, theirs, batch["masked"], temperature, share)

    return _of_words(of_rows)


def distilbert(
    student: Student,
    teacher: PreTrainedModel,
    temperature: float = 2.0,
    weights: tuple[float, float, float] = (5.0, 2.0, 1.0),
) -> TextLoss:
    """Soft labels, hard labels, and the cosine of the last hidden states; the weights are those of the released code.

    Source: DistilBERT (Sanh et al., 2019).
    """
    soft, hard, cosine = weights

    def of_rows(batch: Batch, share: float) -> Tensor:
        masked, (theirs, ours) = batch["masked"], _both(student, teacher, batch)
        own = models.masked_logits(student.network, ours.hidden_states[-1][masked])
        states = student.projected(ours.hidden_states[-1]), theirs.hidden_states[-1]
        return (
            soft * _soft(student, teacher, ours, theirs, masked, temperature, share)
            + hard * _by_sentence(losses.cross_entropy(own, batch["input_ids"][masked], "none"), masked, share)
            + cosine * inner.hidden_cosine(*states, batch["attention_mask"])
        )

    return _of_words(of_rows)


def tinybert(student: Student, teacher: PreTrainedModel, attention: bool = True) -> TextLoss:
    """Hidden states of the embeddings and of all layers, and attention scores before the softmax; no predictions.

    Source: TinyBERT (Jiao et al., 2020), general distillation.
    """

    def of_rows(batch: Batch) -> Tensor:
        pairs = inner.layer_map(depth(student.network), depth(teacher))
        theirs, ours = _both(student, teacher, batch, pairs[1:] if attention else ())
        real = batch["attention_mask"]
        values = inner.hidden_mse(ours.hidden_states, theirs.hidden_states, real, student.projection)
        if attention:
            heads = (ours.queries, ours.keys), (theirs.queries, theirs.keys)
            values = values + inner.attention_mse(*heads, real, of="scores")
        return values

    return partial(processes.by_rows, of_rows)


def minilm(student: Student, teacher: PreTrainedModel) -> TextLoss:
    """The last layer's attention distributions and relations between its values.

    Source: MiniLM (Wang et al., 2020).
    """

    def of_rows(batch: Batch) -> Tensor:
        last = depth(student.network), depth(teacher)
        (theirs, ours), real = _both(student, teacher, batch, (last,)), batch["attention_mask"]
        heads = ours.queries[0], ours.keys[0], theirs.queries[0], theirs.keys[0]
        return inner.attention_kl(*heads, real) + inner.relation_kl(ours.values[0], theirs.values[0], real)

    return partial(processes.by_rows, of_rows)


def minilm_v2(
    student: Student, teacher: PreTrainedModel, relation_heads: int = 12, teacher_layer: int | None = None
) -> TextLoss:
    """Relations among the queries, among the keys and among the values of the last layer, split into so many heads.

    `teacher_layer` is counted from 1; None: the last one.

    Source: MiniLMv2 (Wang et al., 2021).
    """

    def of_rows(batch: Batch) -> Tensor:
        pair = depth(student.network), teacher_layer or depth(teacher)
        (theirs, ours), real = _both(student, teacher, batch, (pair,)), batch["attention_mask"]
        kinds = ((e.queries[0], e.keys[0], e.values[0]) for e in (ours, theirs))
        values = [inner.relation_kl(mine, their, real, relation_heads) for mine, their in zip(*kinds, strict=True)]
        return sum(values[1:], values[0]) / len(values)

    return partial(processes.by_rows, of_rows)


def _both(
    student: Student, teacher: PreTrainedModel, batch: Batch, layers: Sequence[tuple[int, int]] = ()
) -> tuple[Encoding, Encoding]:
    """What the teacher and the student make of a batch, with the projections of these pairs of layers."""
    with torch.no_grad():
        theirs = _encoded(teacher, batch, [layer for _, layer in layers])
    return theirs, _encoded(student.network, batch, [layer for layer, _ in layers])


def _encoded(network: PreTrainedModel, batch: Batch, layers: Sequence[int] = ()) -> Encoding:
    return models.encode_tokens(network, batch["corrupted"], batch["attention_mask"], layers)


def _soft(
    student: Student,
    teacher: PreTrainedModel,
    ours: Encoding,
    theirs: Encoding,
    masked: Tensor,
    temperature: float,
    share: float,
) -> Tensor:
    with torch.no_grad():
        aim = models.masked_logits(teacher, theirs.hidden_states[-1][masked])
    own = models.masked_logits(student.network, ours.hidden_states[-1][masked])
    return _by_sentence(losses.kl_divergence(own, aim, temperature, reduction="none"), masked, share)


def _of_words(of_rows: Callable[[Batch, float], Tensor]) -> TextLoss:
    """A loss at masked positions whose sentences several processes share; `of_rows` gets some of the sentences, and how
    many the whole batch has for each of its masked positions.

    Raises ValueError if none is masked.
    """

    def loss(batch: Batch) -> Tensor:
        positions = int(batch["masked"].sum())
        if positions == 0:
            raise ValueError("no word of the batch is masked: there is nothing to learn from it")
        share = len(batch["masked"]) / positions
        return processes.by_rows(lambda rows: of_rows(rows, share), batch)

    return loss


def _by_sentence(values: Tensor, masked: Tensor, share: float) -> Tensor:
    """Values at masked positions as one for each sentence, so that their mean is the mean over the positions."""
    return per_sentence(values, masked) * share
