"""Task-agnostic distillation: a student learns a language model's knowledge from text without labels.

The baselines of Tutor-KD's tables, and BERT's own masked language modelling, which makes the teachers.  Each function
returns the loss of a network on a batch, one value for each sentence, whose mean is the loss: `step` makes it a step.
A batch has `input_ids`, `corrupted` (some words masked or replaced), `masked` (which) and `attention_mask`, as
`corpus.Masking` makes it.  Teachers are fixed and asked without a graph; padding never counts.

Derived in: chapters/09_tutor_kd.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdlib import losses, models
from kdlib import representations as inner
from kdlib.learner import Batch, Learner
from kdlib.methods import Step
from kdlib.methods.tutor import Student, depth, per_sentence
from kdlib.models import Encoding

Loss = Callable[[Batch], Tensor]


def step(student: Learner, loss: Loss) -> Step:
    """An optimiser step on `loss`."""
    return lambda batch: {"loss": student.minimise(loss, batch)}


def masked_language_model(network: PreTrainedModel) -> Loss:
    """BERT's own objective: cross entropy of the original words at the masked positions.

    Source: BERT (Devlin et al., 2019).
    """

    def loss(batch: Batch) -> Tensor:
        masked = batch["masked"]
        logits = models.masked_logits(network, _encoded(network, batch).hidden_states[-1][masked])
        return _by_sentence(losses.cross_entropy(logits, batch["input_ids"][masked], "none"), masked)

    return loss


def soft_labels(student: Student, teacher: PreTrainedModel, temperature: float = 1.0) -> Loss:
    """KD in Tutor-KD's Table 2: T² · KL(teacher ‖ student) of the distributions at the masked positions."""

    def loss(batch: Batch) -> Tensor:
        theirs, ours = _both(student, teacher, batch)
        return _soft(student, teacher, ours, theirs, batch["masked"], temperature)

    return loss


def distilbert(
    student: Student,
    teacher: PreTrainedModel,
    temperature: float = 2.0,
    weights: tuple[float, float, float] = (5.0, 2.0, 1.0),
) -> Loss:
    """Soft labels, hard labels, and the cosine of the last hidden states; the weights are those of the released code.

    Source: DistilBERT (Sanh et al., 2019).
    """
    soft, hard, cosine = weights

    def loss(batch: Batch) -> Tensor:
        masked, (theirs, ours) = batch["masked"], _both(student, teacher, batch)
        own = models.masked_logits(student.network, ours.hidden_states[-1][masked])
        states = student.projected(ours.hidden_states[-1]), theirs.hidden_states[-1]
        return (
            soft * _soft(student, teacher, ours, theirs, masked, temperature)
            + hard * _by_sentence(losses.cross_entropy(own, batch["input_ids"][masked], "none"), masked)
            + cosine * inner.hidden_cosine(*states, batch["attention_mask"])
        )

    return loss


def tinybert(student: Student, teacher: PreTrainedModel, attention: bool = True) -> Loss:
    """Hidden states of the embeddings and of all layers, and attention scores before the softmax; no predictions.

    Source: TinyBERT (Jiao et al., 2020), general distillation.
    """

    def loss(batch: Batch) -> Tensor:
        pairs = inner.layer_map(depth(student.network), depth(teacher))
        theirs, ours = _both(student, teacher, batch, pairs[1:] if attention else ())
        real = batch["attention_mask"]
        values = inner.hidden_mse(ours.hidden_states, theirs.hidden_states, real, student.projection)
        if attention:
            heads = (ours.queries, ours.keys), (theirs.queries, theirs.keys)
            values = values + inner.attention_mse(*heads, real, of="scores")
        return values

    return loss


def minilm(student: Student, teacher: PreTrainedModel) -> Loss:
    """The last layer's attention distributions and relations between its values.

    Source: MiniLM (Wang et al., 2020).
    """

    def loss(batch: Batch) -> Tensor:
        last = depth(student.network), depth(teacher)
        (theirs, ours), real = _both(student, teacher, batch, (last,)), batch["attention_mask"]
        heads = ours.queries[0], ours.keys[0], theirs.queries[0], theirs.keys[0]
        return inner.attention_kl(*heads, real) + inner.relation_kl(ours.values[0], theirs.values[0], real)

    return loss


def minilm_v2(
    student: Student, teacher: PreTrainedModel, relation_heads: int = 12, teacher_layer: int | None = None
) -> Loss:
    """Relations among the queries, among the keys and among the values of the last layer, split into so many heads.

    `teacher_layer` is counted from 1; None: the last one.

    Source: MiniLMv2 (Wang et al., 2021).
    """

    def loss(batch: Batch) -> Tensor:
        pair = depth(student.network), teacher_layer or depth(teacher)
        (theirs, ours), real = _both(student, teacher, batch, (pair,)), batch["attention_mask"]
        kinds = ((e.queries[0], e.keys[0], e.values[0]) for e in (ours, theirs))
        return sum(inner.relation_kl(mine, their, real, relation_heads) for mine, their in zip(*kinds, strict=True)) / 3

    return loss


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
    student: Student, teacher: PreTrainedModel, ours: Encoding, theirs: Encoding, masked: Tensor, temperature: float
) -> Tensor:
    with torch.no_grad():
        aim = models.masked_logits(teacher, theirs.hidden_states[-1][masked])
    own = models.masked_logits(student.network, ours.hidden_states[-1][masked])
    return _by_sentence(losses.kl_divergence(own, aim, temperature, reduction="none"), masked)


def _by_sentence(values: Tensor, masked: Tensor) -> Tensor:
    """Values at masked positions as one for each sentence, so that their mean is the mean over the positions."""
    return per_sentence(values, masked) * (len(masked) / len(values))
