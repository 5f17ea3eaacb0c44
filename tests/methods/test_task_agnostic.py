"""The task-agnostic baselines in float64, against a plain re-statement from what transformers returns."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from kdlib.learner import accelerator_for, learner
from kdlib.methods import task_agnostic
from kdlib.methods.on_text import Student, TextCast

PAD, CLS, SEP, MASK, VOCABULARY = 0, 1, 2, 3, 11
WORDS = torch.tensor([[CLS, 4, 6, 5, SEP, PAD, PAD], [CLS, 7, 5, 9, 6, 10, SEP]])
MASKED = torch.tensor([[0, 0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0, 0]], dtype=torch.bool)
# One masked, one replaced, one left as it was: all four count.
CORRUPTED = torch.tensor([[CLS, 4, MASK, 5, SEP, PAD, PAD], [CLS, 8, 5, 9, MASK, 10, SEP]])
BATCH = {
    "input_ids": WORDS,
    "corrupted": CORRUPTED,
    "masked": MASKED,
    "attention_mask": (WORDS != PAD).long(),
    "labels": torch.zeros(2),
    "rows": torch.arange(2),
}
LENGTHS = (WORDS != PAD).sum(1).tolist()
LAYERS, HEADS = ((1, 2), (2, 4)), 2


def network(seed: int, layers: int, width: int) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=2 * width,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.4,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    return BertForMaskedLM(config).double().eval()


TEACHER = network(0, 4, 12)  # it could learn: a gradient that leaks into it would be seen


@pytest.fixture
def student() -> Student:
    return Student(network(1, 2, 8), 12, seed=2).double()


def answer(model: BertForMaskedLM, words: torch.Tensor = CORRUPTED):
    options = {"output_hidden_states": True, "output_attentions": True}
    return model(words, attention_mask=BATCH["attention_mask"], **options)


def mean(values: list) -> torch.Tensor:
    return torch.stack(values).mean()


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum()


# Re-statements, word by word and sentence by sentence


def hard(student: Student) -> torch.Tensor:
    log_q = answer(student.network).logits.log_softmax(-1)
    return mean([-log_q[row, column, WORDS[row, column]] for row, column in MASKED.nonzero().tolist()])


def soft(student: Student, temperature: float) -> torch.Tensor:
    p, q = ((answer(model).logits / temperature).softmax(-1) for model in (TEACHER, student.network))
    return temperature**2 * mean([kl(p[row, column].detach(), q[row, column]) for row, column in MASKED.nonzero()])


def cosine(student: Student) -> torch.Tensor:
    ours, theirs = (answer(model).hidden_states[-1] for model in (student.network, TEACHER))
    values = []
    for row, length in enumerate(LENGTHS):
        a, b = ours[row, :length] @ student.projection.weight.T, theirs[row, :length].detach()
        values.append(1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())
    return mean(values)


def hidden(student: Student) -> torch.Tensor:
    ours, theirs = (answer(model).hidden_states for model in (student.network, TEACHER))
    values = []
    for row, length in enumerate(LENGTHS):
        pairs = ((0, 0), *LAYERS)
        mapped = [(ours[a][row, :length] @ student.projection.weight.T, theirs[b][row, :length]) for a, b in pairs]
        values.append(sum((a - b.detach()).square().mean() for a, b in mapped))
    return mean(values)


def projected(model: BertForMaskedLM, layer: int, row: int, kind: str) -> torch.Tensor:
    """Queries, keys or values of a layer, from 1, for one sentence: (tokens, width)."""
    states = answer(model).hidden_states[layer - 1][row, : LENGTHS[row]]
    return getattr(model.bert.encoder.layer[layer - 1].attention.self, kind)(states)


def heads_of(values: torch.Tensor, heads: int) -> list[torch.Tensor]:
    return list(values.chunk(heads, dim=-1))


def scores(student: Student) -> torch.Tensor:
    values = []
    for row, (mine, their) in itertools.product(range(2), LAYERS):
        made = []
        for model, layer in ((student.network, mine), (TEACHER, their)):
            pairs = zip(*(heads_of(projected(model, layer, row, k), HEADS) for k in ("query", "key")), strict=True)
            made.append([q @ k.T / q.shape[-1] ** 0.5 for q, k in pairs])
        values.append(sum((a - b.detach()).square().mean() for a, b in zip(*made, strict=True)))
    return sum(values) / 2


def attention(student: Student) -> torch.Tensor:
    ours, theirs = (answer(model).attentions[-1] for model in (student.network, TEACHER))
    values = []
    for row, length in enumerate(LENGTHS):
        places = itertools.product(range(HEADS), range(length))
        rows = [(theirs[row, head, t, :length].detach(), ours[row, head, t, :length]) for head, t in places]
        values.append(mean([kl(p, q) for p, q in rows]))
    return mean(values)


def relations(student: Student, kind: str, heads: int) -> torch.Tensor:
    values = []
    for row in range(2):
        made = []
        for model, layer in ((TEACHER, 4), (student.network, 2)):
            parts = heads_of(projected(model, layer, row, kind), heads)
            made.append([(x @ x.T / x.shape[-1] ** 0.5).softmax(-1) for x in parts])
        rows = [pair for p, q in zip(*made, strict=True) for pair in zip(p.detach(), q, strict=True)]
        values.append(mean([kl(p, q) for p, q in rows]))
    return mean(values)


CASES = {
    "masked language model": (
        lambda s: task_agnostic.masked_language_model(s.network),
        hard,
    ),
    "soft labels": (lambda s: task_agnostic.soft_labels(s, TEACHER), lambda s: soft(s, 1.0)),
    "soft labels, T = 3": (lambda s: task_agnostic.soft_labels(s, TEACHER, 3.0), lambda s: soft(s, 3.0)),
    "distilbert": (
        lambda s: task_agnostic.distilbert(s, TEACHER),
        lambda s: 5 * soft(s, 2.0) + 2 * hard(s) + cosine(s),
    ),
    "distilbert, other weights": (
        lambda s: task_agnostic.distilbert(s, TEACHER, 1.5, (0.3, 0.0, 4.0)),
        lambda s: 0.3 * soft(s, 1.5) + 4 * cosine(s),
    ),
    "tinybert": (lambda s: task_agnostic.tinybert(s, TEACHER), lambda s: hidden(s) + scores(s)),
    "tinybert without attention": (lambda s: task_agnostic.tinybert(s, TEACHER, False), hidden),
    "minilm": (
        lambda s: task_agnostic.minilm(s, TEACHER),
        lambda s: attention(s) + relations(s, "value", HEADS),
    ),
    "minilm v2": (
        lambda s: task_agnostic.minilm_v2(s, TEACHER, 4),
        lambda s: sum(relations(s, kind, 4) for kind in ("query", "key", "value")) / 3,
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_the_loss_and_its_gradient_are_those_of_the_plain_statement(student, case):
    """Catches a KL the wrong way round, other positions or layers, the T² that is forgotten, padding that counts."""
    made, stated = CASES[case]
    values, expected = made(student)(BATCH), stated(student)
    assert values.shape == (2,) and values.mean().item() == pytest.approx(expected.item(), rel=1e-9)
    weights = [*student.parameters()]
    slopes = [
        torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        for loss in (values.mean(), expected)
    ]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*slopes, strict=True))
    assert max(slope.abs().max() for slope in slopes[0]) > 1e-3


@every_case
def test_a_teacher_that_could_learn_gets_no_gradient(student, case):
    CASES[case][0](student)(BATCH).sum().backward()
    assert all(parameter.grad is None for parameter in TEACHER.parameters())


@every_case
def test_padding_changes_nothing(student, case):
    loss = CASES[case][0](student)
    wider = {name: F.pad(BATCH[name], (0, 3)) for name in ("input_ids", "corrupted", "masked", "attention_mask")}
    torch.testing.assert_close(loss(BATCH | wider), loss(BATCH), rtol=1e-9, atol=1e-12)


@every_case
def test_what_stands_behind_the_masks_matters_to_hard_labels_only(student, case):
    """The networks read the corrupted words, never the original ones."""
    loss, (row, column) = CASES[case][0](student), (0, 2)
    others = WORDS.clone()
    others[row, column] = 9
    changed = not torch.equal(loss(BATCH | {"input_ids": others}), loss(BATCH))
    assert changed == (case in ("masked language model", "distilbert"))


@pytest.mark.parametrize("case", ["masked language model", "soft labels", "distilbert, other weights"])
def test_predictions_are_asked_for_at_masked_positions_only(student, case):
    """A change of the head's bias that only another word at another position would see changes these positions, too."""
    loss, moved = CASES[case][0](student), MASKED.clone()
    moved[1, 3] = True
    assert not torch.allclose(loss(BATCH | {"masked": moved}).mean(), loss(BATCH).mean(), rtol=1e-6)


@pytest.mark.parametrize("case", ["masked language model", "soft labels"])
def test_a_sentence_counts_with_its_own_masked_words(student, case):
    """One of the four is in the first sentence; without it there is the second alone, and without any no loss."""
    loss, one = CASES[case][0](student), MASKED.clone()
    values = loss(BATCH)
    first, second = (
        {name: BATCH[name][i : i + 1] for name in ("input_ids", "corrupted", "attention_mask", "masked")}
        for i in range(2)
    )
    # Means over one word and over three, as parts of a mean over four that is a mean over two sentences.
    parts = [2 * loss(first) / 4, 2 * 3 * loss(second) / 4]
    torch.testing.assert_close(values, torch.cat(parts), rtol=1e-9, atol=0)
    one[0] = False
    torch.testing.assert_close(loss(BATCH | {"masked": one}), torch.cat([0 * loss(second), 2 * loss(second)]))
    with pytest.raises(ValueError, match="no word of the batch is masked"):
        loss(BATCH | {"masked": torch.zeros_like(MASKED)})


def test_minilm_v2_may_take_another_layer_of_the_teacher(student):
    loss = task_agnostic.minilm_v2(student, TEACHER, 4, teacher_layer=3)(BATCH).mean()
    assert not torch.isclose(loss, task_agnostic.minilm_v2(student, TEACHER, 4)(BATCH).mean(), rtol=1e-3)
    shallow = copy.deepcopy(TEACHER)
    shallow.bert.encoder.layer = shallow.bert.encoder.layer[:3]
    shallow.config.num_hidden_layers = 3
    last = task_agnostic.minilm_v2(student, shallow, 4)(BATCH).mean()
    assert loss.item() == pytest.approx(last.item(), rel=1e-9)


def test_a_step_is_adamws_on_the_loss(student):
    expected = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0.0)
    stated = soft(expected, 2.0)
    stated.backward()
    optimizer.step()
    who = learner("student", student, accelerator_for("cpu"), 1e-3, 10**9, 0.0, 0.0, max_grad_norm=1e9)
    cast = TextCast(who, TEACHER, None, (PAD, CLS, SEP), MASK)
    values = task_agnostic.SoftLabels(temperature=2.0).step(cast)(BATCH)
    assert values == {"loss": pytest.approx(stated.item(), rel=1e-9)}
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_what_a_class_asks_for_is_what_its_loss_gets(student):
    """Temperatures, attention and heads of relations, through the settings as a run has them."""
    cast = TextCast(learner("student", student, accelerator_for("cpu"), 1e-3, 10), TEACHER, None, (PAD, CLS, SEP), MASK)
    asked = {
        task_agnostic.SoftLabels(temperature=3.0): task_agnostic.soft_labels(student, TEACHER, 3.0),
        task_agnostic.DistilBERT(temperature=1.5): task_agnostic.distilbert(student, TEACHER, 1.5),
        task_agnostic.TinyBERT(): task_agnostic.tinybert(student, TEACHER),
        task_agnostic.TinyBERT(attention=False): task_agnostic.tinybert(student, TEACHER, False),
        task_agnostic.MiniLM(): task_agnostic.minilm(student, TEACHER),
        task_agnostic.MiniLMv2(relation_heads=4): task_agnostic.minilm_v2(student, TEACHER, 4),
        # 12 does not divide the student's width of 8: its own heads.
        task_agnostic.MiniLMv2(): task_agnostic.minilm_v2(student, TEACHER, HEADS),
    }
    for chosen, loss in asked.items():
        assert torch.equal(chosen.loss(cast)(BATCH), loss(BATCH)), chosen
        assert chosen.measure(cast)(BATCH) == {"loss": loss(BATCH).mean().item()}
    alone = dataclasses.replace(cast, student=learner("one", student.network, accelerator_for("cpu"), 1e-3, 10))
    expected = task_agnostic.masked_language_model(student.network)(BATCH)
    assert torch.equal(task_agnostic.MLM().loss(alone)(BATCH), expected)


def test_networks_that_cannot_be_compared_are_refused(student):
    three = BertForMaskedLM(
        BertConfig(vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=2, num_attention_heads=3)
    )
    with pytest.raises(ValueError, match=r"has 3 heads, the teacher 2, .*: take minilm_v2, or such a student"):
        task_agnostic.MiniLM().check(three, TEACHER)
    with pytest.raises(ValueError, match=r"has 3 heads, the teacher 2, .*: leave attention out"):
        task_agnostic.TinyBERT(attention=True).check(three, TEACHER)
    task_agnostic.TinyBERT().check(three, TEACHER)
    assert not task_agnostic.TinyBERT().compares(three, TEACHER)
    for heads, who in ((12, "student's width of 8"), (8, "teacher's width of 12")):
        with pytest.raises(ValueError, match=f"relation_heads is {heads}, which does not divide the {who}"):
            task_agnostic.MiniLMv2(relation_heads=heads).check(student.network, TEACHER)
    assert task_agnostic.MiniLMv2().heads(three) == 12
