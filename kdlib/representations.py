"""Objectives on what happens inside an encoder: hidden states, attention, and relations between tokens.

Every function takes the attention mask, `(batch, tokens)` with 1 for a token and 0 for padding, and returns one value
per sample, `(batch,)`.  Padding never counts, neither as query nor as key, and what is averaged is averaged over the
tokens that are there; so a value depends neither on the padding nor on the length.  A sample without tokens has 0.

Queries, keys and values have shape `(batch, heads, tokens, size)`; `models.encode_tokens` gives them and the states.
Tutor-KD's L_inter, eq. (14), is `hidden_mse` + `attention_mse`.  The teacher is a constant everywhere; everything is
computed in float32 at least, under autocast too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from kdlib.losses import Reduction, full_precision, reduce

Mask = Shaped[Tensor, "batch tokens"]
"""1 for a token, 0 for padding: integers, booleans or floating-point numbers."""

Heads = Float[Tensor, "batch heads tokens size"]
"""Queries, keys or values of one layer."""

TeachersHeads = Float[Tensor, "batch heads tokens teachers_size"]
"""Those of a teacher with as many heads, which may be of another size."""

OtherHeads = Float[Tensor, "batch other_heads tokens other_size"]
"""Those of a network that may differ in both."""

# Hidden states


def layer_map(student_depth: int, teacher_depth: int) -> tuple[tuple[int, int], ...]:
    """Which layer of the teacher each layer of the student imitates: pairs (student's, teacher's), evenly spread.

    The first pair, (0, 0), is the embeddings; layer m goes with layer ⌊m · teacher_depth / student_depth⌋.

    Raises ValueError for a student without layers or deeper than its teacher.

    Source: TinyBERT (Jiao et al., 2020), the uniform map.  Derived in: chapters/09_tutor_kd.
    """
    if not 1 <= student_depth <= teacher_depth:
        raise ValueError(
            f"the student has {student_depth} layers, the teacher {teacher_depth}: the student needs at least one "
            "layer and no more than its teacher"
        )
    return tuple((layer, layer * teacher_depth // student_depth) for layer in range(student_depth + 1))


def hidden_mse(
    student_states: Sequence[Float[Tensor, "batch tokens hidden"]],
    teacher_states: Sequence[Float[Tensor, "batch tokens teachers_hidden"]],
    attention_mask: Mask,
    projection: Callable[[Tensor], Tensor] | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Float[Tensor, "batch"]:
    """Squared differences of hidden states, averaged over tokens and units and added up over layers.

    The states are those that transformers returns, the embeddings first.  `pairs` (student's, teacher's) says which are
    compared; `layer_map` if it is None.  The paper prints a single pair; TinyBERT adds up over all of them.
    `projection` is W, one for all layers, as in the released codes: an `nn.Linear` without bias that is trained with
    the student.

    Raises ValueError if the widths differ, with W applied, and for no pairs; also what `layer_map` raises.

    Source: Tutor-KD eq. (12); TinyBERT (Jiao et al., 2020).  Derived in: chapters/09_tutor_kd.
    """
    if pairs is None:
        pairs = layer_map(len(student_states) - 1, len(teacher_states) - 1)
    if not pairs:
        raise ValueError("pairs is empty; expected at least one pair (student's layer, teacher's layer)")
    parts = []
    for mine, their in pairs:
        ours = student_states[mine] if projection is None else projection(student_states[mine])
        ours, theirs = _constant_teacher(ours, teacher_states[their])
        _check_widths(ours, theirs, "give a projection, for example nn.Linear(student's, teacher's, bias=False)")
        parts.append(_token_mean((ours - theirs).square().mean(-1), attention_mask))
    return functools.reduce(torch.add, parts)


def hidden_cosine(
    student_states: Float[Tensor, "batch tokens hidden"],
    teacher_states: Float[Tensor, "batch tokens hidden"],
    attention_mask: Mask,
) -> Float[Tensor, "batch"]:
    """1 − cosine between two hidden states of each token, averaged over the tokens.

    Raises ValueError if the widths differ.

    Source: DistilBERT (Sanh et al., 2019), for the last hidden states.  Derived in: chapters/09_tutor_kd.
    """
    ours, theirs = _constant_teacher(student_states, teacher_states)
    _check_widths(ours, theirs, "a cosine needs a student of the teacher's width")
    return _token_mean(1 - F.cosine_similarity(ours, theirs, dim=-1), attention_mask)


def patient_layers(
    student_depth: int, teacher_depth: int, layers: Literal["skip", "last"] = "skip"
) -> tuple[tuple[int, int], ...]:
    """Which layer of the teacher each layer of the student imitates in PKD: pairs (student's, teacher's), from 1.

    The student's last layer is left out: what it says goes into the logits.  "skip" spreads the teacher's layers
    evenly, as `layer_map` does, "last" takes those just below its own last one.

    Raises ValueError for other layers, a student of one layer and a student deeper than its teacher.

    Source: PKD (Sun et al., 2019), used in IKD Table 3.
    """
    if layers not in ("skip", "last"):
        raise ValueError(f"layers is {layers!r}; expected 'skip' or 'last'")
    if not 2 <= student_depth <= teacher_depth:
        raise ValueError(
            f"PKD needs a student with at least two layers and no more than its teacher; it has {student_depth}, the "
            f"teacher {teacher_depth}: choose another pair, or leave pkd_weight at 0"
        )
    if layers == "skip":
        return layer_map(student_depth, teacher_depth)[1:-1]
    return tuple((layer, teacher_depth - student_depth + layer) for layer in range(1, student_depth))


def patient(
    student_states: Sequence[Float[Tensor, "batch tokens hidden"]],
    teacher_states: Sequence[Float[Tensor, "batch tokens hidden"]],
    layers: Literal["skip", "last"] = "skip",
    normalisation: Literal["sum", "mean"] = "sum",
    reduction: Reduction = "mean",
) -> Tensor:
    """PKD's objective on hidden states: squared distances of the first tokens' states, each scaled to length one.

    The states are those that transformers returns, the embeddings first; `patient_layers` pairs them.  With "sum" the
    squares are added up over layers and units, as in the paper; with "mean" they are averaged, as in the code released
    with MetaDistil, which is (layers − 1) · hidden times smaller and goes with a weight of 100 there.

    Raises ValueError for another normalisation and for different widths; also what `patient_layers` raises.

    Source: PKD (Sun et al., 2019), used in IKD Table 3.
    """
    if normalisation not in ("sum", "mean"):
        raise ValueError(f"normalisation is {normalisation!r}; expected 'sum' or 'mean'")
    check_patient_widths(student_states[0].shape[-1], teacher_states[0].shape[-1])
    pairs = patient_layers(len(student_states) - 1, len(teacher_states) - 1, layers)
    ours = torch.stack([F.normalize(student_states[mine][:, 0], dim=-1) for mine, _ in pairs], dim=1)
    theirs = torch.stack([F.normalize(teacher_states[their][:, 0], dim=-1) for _, their in pairs], dim=1)
    squares = (ours - theirs).square().flatten(1)
    return reduce(squares.sum(-1) if normalisation == "sum" else squares.mean(-1), reduction)


def check_patient_widths(student_width: int, teacher_width: int) -> None:
    """Raise ValueError for two networks whose hidden states `patient` cannot compare."""
    if student_width != teacher_width:
        raise ValueError(
            f"PKD compares hidden states, but the student has {student_width} units and the teacher {teacher_width}: "
            "choose a student of the teacher's width (student_layers), or leave pkd_weight at 0"
        )


# Attention


def attention_scores(queries: Heads, keys: Heads, attention_mask: Mask) -> Float[Tensor, "batch heads tokens tokens"]:
    """Q Kᵀ / √size, before the softmax; the lowest number of its precision where the key is padding.

    Raises ValueError for queries that are not of four dimensions.

    Source: Vaswani et al. (2017).  Derived in: chapters/09_tutor_kd.
    """
    if queries.dim() != 4:
        raise ValueError(f"queries have shape {tuple(queries.shape)}; expected (batch, heads, tokens, size)")
    queries, keys = full_precision(queries), full_precision(keys)
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    return scores.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)


def attention(queries: Heads, keys: Heads, attention_mask: Mask) -> Float[Tensor, "batch heads tokens tokens"]:
    """The attention distributions, a query's in a row; the rows of padding are zero, and so are the columns.

    Source: Vaswani et al. (2017).  Derived in: chapters/09_tutor_kd.
    """
    probabilities = attention_scores(queries, keys, attention_mask).softmax(-1)
    return probabilities.masked_fill(attention_mask[:, None, :, None] == 0, 0.0)


def attention_mse(
    student: tuple[Sequence[Heads], Sequence[Heads]],
    teacher: tuple[Sequence[TeachersHeads], Sequence[TeachersHeads]],
    attention_mask: Mask,
    of: Literal["distributions", "scores"] = "distributions",
) -> Float[Tensor, "batch"]:
    """Squared differences of the attention, averaged over pairs of tokens and added up over heads and layers.

    `student` and `teacher` are (queries, keys), each with one entry per layer, in the same order: those of an
    `Encoding` for layers that belong together, say by `layer_map`.  With "scores" what goes into the softmax is
    compared, as in TinyBERT and in the code released with Tutor-KD; the paper prints the distributions.

    Raises ValueError if the numbers of layers or of heads differ, and for another `of`.

    Source: Tutor-KD eq. (13); TinyBERT (Jiao et al., 2020).  Derived in: chapters/09_tutor_kd.
    """
    if of not in ("distributions", "scores"):
        raise ValueError(f"of is {of!r}; expected 'distributions' or 'scores'")
    if len({len(part) for part in (*student, *teacher)}) != 1 or len(student[0]) == 0:
        raise ValueError(
            f"the student gives queries and keys of {len(student[0])} and {len(student[1])} layers, the teacher of "
            f"{len(teacher[0])} and {len(teacher[1])}: give the same number for both, at least one"
        )
    measure = attention if of == "distributions" else attention_scores
    there = attention_mask.bool()
    outside = ~(there[:, None, :, None] & there[:, None, None, :])
    parts = []
    for queries, keys, their_queries, their_keys in zip(*student, *teacher, strict=True):
        _check_heads(queries, their_queries, "attention is compared head by head; take relation_kl")
        ours = measure(queries, keys, attention_mask)
        theirs = measure(their_queries.detach(), their_keys.detach(), attention_mask)
        squares = (ours - theirs).masked_fill(outside, 0.0).square().sum((1, 2, 3))
        parts.append(squares / _tokens(attention_mask, squares.dtype).square())
    return functools.reduce(torch.add, parts)


def attention_kl(
    student_queries: Heads,
    student_keys: Heads,
    teacher_queries: TeachersHeads,
    teacher_keys: TeachersHeads,
    attention_mask: Mask,
) -> Float[Tensor, "batch"]:
    """KL(teacher ‖ student) of the attention distributions of one layer, averaged over heads and queries, in nats.

    Raises ValueError if the numbers of heads differ.

    Source: MiniLM (Wang et al., 2020), for the last layer.  Derived in: chapters/09_tutor_kd.
    """
    _check_heads(student_queries, teacher_queries, "attention is compared head by head; take relation_kl")
    theirs = attention_scores(teacher_queries.detach(), teacher_keys.detach(), attention_mask).log_softmax(-1)
    ours = attention_scores(student_queries, student_keys, attention_mask).log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    return _token_mean(divergence.mean(1), attention_mask)


def relation_kl(
    student: Heads, teacher: OtherHeads, attention_mask: Mask, relation_heads: int | None = None
) -> Float[Tensor, "batch"]:
    """KL(teacher ‖ student) of the relations softmax(X Xᵀ / √size), averaged over heads and queries, in nats.

    X are values in MiniLM; queries, keys and values, one after the other, in MiniLMv2.  With `relation_heads` both
    networks' heads are first merged and split anew into so many, so that they may differ in heads and in width.

    Raises ValueError if the numbers of heads differ without `relation_heads`, or if that does not divide a width.

    Source: MiniLM (Wang et al., 2020); MiniLMv2 (Wang et al., 2021).  Derived in: chapters/09_tutor_kd.
    """
    if relation_heads is not None:
        student, teacher = split_anew(student, relation_heads), split_anew(teacher, relation_heads)
    _check_heads(student, teacher, "give relation_heads, a number that divides both widths")
    return attention_kl(student, student, teacher, teacher, attention_mask)


def split_anew(values: Heads, heads: int) -> Float[Tensor, "batch relation_heads tokens relation_size"]:
    """The same numbers with another number of heads, by way of `(batch, tokens, width)`.

    Raises ValueError if `heads` does not divide the width.

    Source: MiniLMv2 (Wang et al., 2021), multi-head relations.  Derived in: chapters/09_tutor_kd.
    """
    merged = values.transpose(1, 2).flatten(2)
    if heads < 1 or merged.shape[-1] % heads:
        raise ValueError(
            f"relation_heads is {heads}, which does not divide a width of {merged.shape[-1]}: give a number that "
            "divides the widths of student and teacher"
        )
    return merged.unflatten(-1, (heads, -1)).transpose(1, 2)


def _constant_teacher(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 at least, the teacher's as a constant."""
    return full_precision(student), full_precision(teacher.detach())


def _tokens(attention_mask: Mask, dtype: torch.dtype) -> Float[Tensor, "batch"]:
    """How many tokens each sample has, one for a sample without any, since it is divided by."""
    return attention_mask.bool().sum(-1).clamp(min=1).to(dtype)


def _token_mean(values: Float[Tensor, "batch tokens"], attention_mask: Mask) -> Float[Tensor, "batch"]:
    """The mean over what is not padding."""
    return values.masked_fill(attention_mask == 0, 0.0).sum(-1) / _tokens(attention_mask, values.dtype)


def _check_widths(student: Tensor, teacher: Tensor, remedy: str) -> None:
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"the student's hidden states have {student.shape[-1]} units, the teacher's {teacher.shape[-1]}: {remedy}"
        )


def _check_heads(student: Heads, teacher: OtherHeads, remedy: str) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"the student has {student.shape[1]} heads, the teacher {teacher.shape[1]}: {remedy}")
