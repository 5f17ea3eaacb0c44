"""Tutor-KD's algorithm on small networks in float64, against a re-statement in plain transformers and autograd."""

import copy
import dataclasses

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from kdlib import policy
from kdlib.learner import Learner, accelerator_for, learner
from kdlib.methods import tutor
from kdlib.methods.on_text import Student
from kdlib.methods.tutor import Tutor, TutorKD, Untutored
from kdlib.settings import checked

PAD, CLS, SEP, MASK, VOCABULARY = 0, 1, 2, 3, 11
SPECIAL = (PAD, CLS, SEP, MASK)
WORDS = torch.tensor([[CLS, 4, 6, 5, SEP, PAD, PAD], [CLS, 7, 5, 9, 6, 10, SEP]])
MASKED = torch.tensor([[0, 0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
BATCH = {
    "input_ids": WORDS,
    "attention_mask": (WORDS != PAD).long(),
    "masked": MASKED,
    "labels": torch.zeros(2),
    "rows": torch.arange(2),
}
DRAWN = torch.tensor([[8, 4, 5], [6, 9, 10]])


def network(seed: int, layers: int, width: int) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.4,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    return BertForMaskedLM(config).double().eval()


TEACHER = network(0, 4, 12).requires_grad_(False)


def student_module() -> Student:
    return Student(network(1, 2, 8), 12, seed=2).double()


def tutor_module(start: str = "random") -> Tutor:
    return Tutor(TEACHER, start, seed=3).double()


def learned(name: str, module: torch.nn.Module, rate: float = 1e-3) -> Learner:
    return learner(name, module, accelerator_for("cpu"), rate, 10**9, 0.0, 0.0, max_grad_norm=1e9)


@pytest.fixture
def fixed_draws(monkeypatch):
    """The tutor draws what stands here."""
    monkeypatch.setattr(policy, "draw_actions", lambda logits, samples: DRAWN[:samples])


def stated(student: Student, maker: Tutor, drawn: torch.Tensor, settings: TutorKD) -> tuple:
    """Eqs. (3)-(14) sentence by sentence: the student's loss and the tutor's, λ₁, λ₂, λ and the signs included."""
    hidden = WORDS.masked_fill(MASKED, MASK)
    options = {"attention_mask": BATCH["attention_mask"], "output_hidden_states": True, "output_attentions": True}
    first = TEACHER(hidden, **options)
    states = first.hidden_states[-1][MASKED]
    p_masked, log_tutor = first.logits[MASKED].softmax(-1), maker.head(states).log_softmax(-1)
    kl = (p_masked * (p_masked.log() - log_tutor)).sum(-1).mean()
    logit, gain, insides = [], [], []
    for words in drawn:
        filled = WORDS.clone()
        filled[MASKED] = words
        theirs, ours = TEACHER(filled, **options), student.network(filled, **options)
        scores = student.score(ours.hidden_states[-1]).squeeze(-1)
        for place, (row, column) in enumerate(MASKED.nonzero().tolist()):
            word, original = words[place], WORDS[row, column]
            p_filled = theirs.logits[row, column].softmax(-1)
            r_teacher = p_filled[original] - p_filled[word]
            target = (p_masked[place, word] / p_masked[place, original]).clamp(max=1)
            guess = scores[row, column].sigmoid()
            if settings.imitated == "modified":
                a, b = target / settings.temperature, guess / settings.temperature
                logit.append(-(a * b.log() + (1 - a) * (1 - b).log()))
                r_student = (target - guess).abs()
            else:
                q = ours.logits[row, column].softmax(-1)
                logit.append((p_masked[place] * (p_masked[place] / q).log()).sum())
                r_student = (p_masked[place] - q).abs().sum() / 2
            signs = PAID[settings.strategy]
            reward = settings.reward_weight * signs[0] * r_teacher
            reward = reward + (1 - settings.reward_weight) * signs[1] * r_student
            gain.append(log_tutor[place, word] * reward.detach())
        if settings.everywhere:
            others = [(r, c) for r, c in (WORDS > MASK).nonzero().tolist() if not MASKED[r, c]]
            for row, column in others:
                a, b = 1 / settings.temperature, scores[row, column].sigmoid() / settings.temperature
                logit.append(-a * b.log() - ((1 - a) * (1 - b).log() if a < 1 else 0.0))
        for row, length in enumerate(BATCH["attention_mask"].sum(1).tolist()):
            for mine, their in ((1, 2), (2, 4)):
                mapped = ours.hidden_states[mine][row, :length] @ student.projection.weight.T
                inside = (mapped - theirs.hidden_states[their][row, :length]).square().mean()
                if settings.attention is not False:  # both have two heads
                    for head in range(2):
                        a, b = (
                            e.attentions[k - 1][row, head, :length, :length] for e, k in ((ours, mine), (theirs, their))
                        )
                        inside = inside + (a - b).square().mean()
                insides.append(inside)
    inner = torch.stack(insides).sum() / (len(drawn) * len(WORDS))
    mean = lambda values: torch.stack(values).mean()  # noqa: E731
    loss = settings.logit_weight * mean(logit) + settings.inner_weight * inner
    return loss, settings.kl_weight * kl - mean(gain)


# What section 5.3 says of each strategy: is it paid for what is easy for the teacher, for what is hard for the student?
PAID = {
    "tutor": (1, 1),
    "reverse": (-1, -1),
    "no reward": (0, 0),
    "hard for both": (-1, 1),
    "easy for both": (1, -1),
}
VARIANTS = [
    TutorKD(),
    TutorKD(samples=2, reward_weight=0.25),
    TutorKD(strategy="reverse", kl_weight=0.5),
    TutorKD(strategy="hard for both", attention=False),
    TutorKD(strategy="easy for both", logit_weight=1.0),
    TutorKD(strategy="no reward", inner_weight=2.0),
    TutorKD(imitated="distribution", samples=2),
    TutorKD(everywhere=True, samples=2, logit_weight=3.0),
    TutorKD(temperature=2.0, samples=2),
    TutorKD(temperature=1.5, everywhere=True),
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_both_losses_and_their_gradients_are_the_papers(fixed_draws, settings):
    student, maker = student_module(), tutor_module()
    turn = tutor.take_turn(student, maker, TEACHER, BATCH, SPECIAL, MASK, settings)
    expected = stated(student, maker, DRAWN[: settings.samples], settings)
    found = turn.student, turn.tutor(settings.kl_weight)
    for ours, theirs, module in zip(found, expected, (student, maker), strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
        weights = [*module.parameters()]
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        pairs = zip(
            torch.autograd.grad(ours, weights, **options), torch.autograd.grad(theirs, weights, **options), strict=True
        )
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in pairs)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_neither_network_reaches_into_the_other(fixed_draws, settings):
    student, maker = student_module(), tutor_module()
    turn = tutor.take_turn(student, maker, TEACHER, BATCH, SPECIAL, MASK, settings)
    for loss, strangers in ((turn.student, maker), (turn.tutor(1.0), student)):
        slopes = torch.autograd.grad(loss, [*strangers.parameters()], allow_unused=True, retain_graph=True)
        assert all(slope is None for slope in slopes)
    assert all(parameter.grad is None for parameter in TEACHER.parameters())


def test_a_teacher_that_could_learn_gets_no_gradient(fixed_draws):
    willing = copy.deepcopy(TEACHER).requires_grad_()
    student, maker = student_module(), tutor_module()
    turn = tutor.take_turn(student, maker, willing, BATCH, SPECIAL, MASK, TutorKD())
    (turn.student + turn.tutor(1.0)).backward()
    assert all(parameter.grad is None for parameter in willing.parameters())


def test_over_all_words_the_mean_gradient_is_that_of_the_expected_reward(monkeypatch):
    """One masked position, so that every draw can be made: Σ p(word) · gradient = −∇ Σ p(word) · reward(word)."""
    one = BATCH | {"masked": torch.zeros_like(MASKED).index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(True))}
    student, maker = student_module(), tutor_module()
    weights = [*maker.parameters()]
    total, expected = [0.0] * len(weights), 0.0
    for word in range(VOCABULARY):
        monkeypatch.setattr(policy, "draw_actions", lambda logits, samples, word=word: torch.tensor([[word]]))
        turn = tutor.take_turn(student, maker, TEACHER, one, SPECIAL, MASK, TutorKD())
        probability = turn.tutor_logits.softmax(-1)[0, word]
        slopes = torch.autograd.grad(turn.tutor(0.0), weights, retain_graph=True, materialize_grads=True)
        total = [t + probability.detach() * slope for t, slope in zip(total, slopes, strict=True)]
        expected = expected - probability * turn.rewards[0, 0]
    exact = torch.autograd.grad(expected, weights, materialize_grads=True)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(total, exact, strict=True))
    assert max(slope.abs().max() for slope in exact) > 1e-4


@pytest.mark.parametrize("baseline", ["running mean", "leave one out"])
def test_a_baseline_is_subtracted_from_the_rewards(fixed_draws, baseline):
    student, maker = student_module(), tutor_module()
    maker.mean_reward.fill_(0.3)
    settings = TutorKD(samples=2, baseline=baseline)
    turn = tutor.take_turn(student, maker, TEACHER, BATCH, SPECIAL, MASK, settings)
    plain = tutor.take_turn(student, maker, TEACHER, BATCH, SPECIAL, MASK, TutorKD(samples=2))
    taken = 0.3 if baseline == "running mean" else turn.rewards.flip(0)
    log = policy.log_probability(turn.tutor_logits, DRAWN)
    assert (turn.tutor(0.0) - plain.tutor(0.0)).item() == pytest.approx((taken * log).mean().item(), rel=1e-9)


def moved(module: torch.nn.Module, before: torch.nn.Module) -> float:
    pairs = zip(module.parameters(), before.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("order", ["together", "in turns"])
def test_a_step_is_adamws_on_the_written_losses(fixed_draws, order):
    """With fixed draws: together both move at once; in turns the tutor moves for its pay first, then for its KL."""
    settings = TutorKD(order=order, kl_weight=0.5)
    student, maker = student_module(), tutor_module()
    turn = tutor.take_turn(student, maker, TEACHER, BATCH, SPECIAL, MASK, settings)
    expected_student, expected_tutor = copy.deepcopy(student), copy.deepcopy(maker)
    rates = {"lr": 1e-3, "weight_decay": 0.0}
    optimizers = [torch.optim.AdamW(m.parameters(), **rates) for m in (expected_student, expected_tutor)]
    paid = dataclasses.replace(settings, kl_weight=0.0)
    unpaid = dataclasses.replace(settings, strategy="no reward")
    numbers = []
    for stage in [(settings, (0, 1))] if order == "together" else [(paid, (1,)), (unpaid, (0, 1))]:
        values = stated(expected_student, expected_tutor, DRAWN[:1], stage[0])
        numbers.append([value.item() for value in values])
        for number in stage[1]:
            optimizers[number].zero_grad()
        for number in stage[1]:
            values[number].backward(retain_graph=True)
        for number in stage[1]:
            optimizers[number].step()
    step = tutor.tutor_kd(learned("student", student), learned("tutor", maker), TEACHER, SPECIAL, MASK, settings)
    before = copy.deepcopy(maker)
    values = step(BATCH)
    assert moved(student, expected_student) < 1e-9 and moved(maker, expected_tutor) < 1e-9
    assert moved(maker, before) > 1e-4
    tutors = numbers[0][1] + (numbers[1][1] if order == "in turns" else 0.0)
    assert [values["loss"], values["tutor_loss"]] == pytest.approx([numbers[-1][0], tutors], rel=1e-9)
    assert set(values) == {"loss", "tutor_loss", *turn.log}
    # A tenth of what was earned is remembered, for the baseline of the next step.
    assert maker.mean_reward.item() == pytest.approx(0.1 * turn.rewards.mean().item(), rel=1e-9) != 0
    assert "mean_reward" in maker.state_dict()


@pytest.mark.parametrize("imitated", ["modified", "distribution"])
def test_what_is_logged_is_looked_at_position_by_position(monkeypatch, imitated):
    """One of the drawn words is the original; with two samples, rows of one could be taken for those of the other."""
    drawn = torch.tensor([[6, 4, 5], [8, 9, 10]])
    monkeypatch.setattr(policy, "draw_actions", lambda logits, samples: drawn[:samples])
    student, maker = student_module(), tutor_module()
    settings = TutorKD(samples=2, imitated=imitated, logit_weight=3.0)
    log = tutor.take_turn(student, maker, TEACHER, BATCH, SPECIAL, MASK, settings).log
    options = {"attention_mask": BATCH["attention_mask"], "output_hidden_states": True}
    on_masked = TEACHER(WORDS.masked_fill(MASKED, MASK), **options).logits.softmax(-1)
    seen = {name: [] for name in ("teacher_reward", "student_reward", "teacher_nll", "student_nll", "copied")}
    for words in drawn:
        filled = WORDS.clone()
        filled[MASKED] = words
        theirs, ours = TEACHER(filled, **options).logits.softmax(-1), student.network(filled, **options)
        for place, (row, column) in enumerate(MASKED.nonzero().tolist()):
            word, original, p, q = words[place], WORDS[row, column], theirs[row, column], on_masked[row, column]
            seen["teacher_reward"].append(p[original] - p[word])
            seen["teacher_nll"].append(-p[original].log())
            seen["copied"].append((word == original).double())
            if imitated == "modified":
                target = (q[word] / q[original]).clamp(max=1)
                guess = student.score(ours.hidden_states[-1][row, column]).sigmoid()[0]
                seen["student_reward"].append((target - guess).abs())
                seen["student_nll"].append(-target * guess.log() - (1 - target) * (1 - guess).log())
            else:
                own = ours.logits[row, column].softmax(-1)
                seen["student_reward"].append((q - own).abs().sum() / 2)
                seen["student_nll"].append((q * (q / own).log()).sum())
    expected = {name: torch.stack(values).mean().item() for name, values in seen.items()}
    assert {name: value.item() for name, value in log.items()} == pytest.approx(expected, rel=1e-6)
    assert not any(value.requires_grad for value in log.values())


def test_in_turns_the_student_learns_words_that_the_new_tutor_drew(monkeypatch):
    asked, read = [], []

    def other_words_each_time(logits, samples):
        asked.append(logits.detach().clone())
        return DRAWN[len(asked) - 1 : len(asked)]

    monkeypatch.setattr(policy, "draw_actions", other_words_each_time)
    learners = learned("student", student_module()), learned("tutor", tutor_module())
    embeddings = learners[0].module.network.bert.embeddings
    embeddings.register_forward_pre_hook(
        lambda *what: read.append(what[-1]["input_ids"][MASKED].tolist()), with_kwargs=True
    )
    inside, inner_loss = [], tutor.inner_loss
    monkeypatch.setattr(tutor, "inner_loss", lambda *what: (inside.append(1), inner_loss(*what))[1])
    tutor.tutor_kd(*learners, TEACHER, SPECIAL, MASK, TutorKD(order="in turns"))(BATCH)
    assert len(asked) == 2 and not torch.allclose(*asked)
    assert read == DRAWN.tolist()
    assert len(inside) == 1  # what is inside the networks earns the tutor nothing


def test_padding_changes_nothing(fixed_draws):
    wider = {name: F.pad(BATCH[name], (0, 3)) for name in ("input_ids", "attention_mask", "masked")}
    student, maker = student_module(), tutor_module()
    for settings in VARIANTS:
        turns = [
            tutor.take_turn(student, maker, TEACHER, batch, SPECIAL, MASK, settings) for batch in (BATCH, BATCH | wider)
        ]
        assert turns[0].student.item() == pytest.approx(turns[1].student.item(), rel=1e-9)
        assert torch.allclose(turns[0].rewards, turns[1].rewards, rtol=1e-9)


@pytest.mark.usefixtures("unchecked")
def test_a_tutor_starts_as_its_teacher_or_at_random():
    states = TEACHER(WORDS, output_hidden_states=True).hidden_states[-1][MASKED]
    aim = TEACHER.cls(states)
    torch.testing.assert_close(tutor_module("teacher")(states), aim, rtol=1e-9, atol=1e-9)
    assert (tutor_module("random")(states) - aim).abs().max() > 0.1
    mine, own = tutor_module("teacher"), TEACHER.bert.embeddings.word_embeddings.weight
    assert all(parameter.data_ptr() != own.data_ptr() for parameter in mine.parameters())
    with pytest.raises(ValueError, match="start is 'zero'"):
        Tutor(TEACHER, "zero")


def test_random_weights_are_berts_and_come_from_a_seed_of_their_own():
    """From a head that has been trained: its biases and its LayerNorm must not stay."""
    trained, shell = copy.deepcopy(TEACHER), network(1, 2, 8)
    for parameter in trained.cls.parameters():
        torch.nn.init.constant_(parameter, 0.3)
    made = []
    for before in (5, 6):  # what was drawn before does not matter, and what is drawn after is not disturbed
        torch.manual_seed(before)
        state = torch.get_rng_state()
        made.append((Tutor(trained, "random", seed=3), Student(shell, 12, seed=2)))
        assert torch.equal(torch.get_rng_state(), state)
    others = Tutor(trained, "random", seed=4), Student(shell, 12, seed=3)
    for one, two, other in zip(*made, others, strict=True):
        assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
        assert any(not torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    for name, value in made[0][0].head.named_parameters():
        if value.dim() == 2:
            assert value.std().item() == pytest.approx(TEACHER.config.initializer_range, rel=0.25), name
        elif "LayerNorm.weight" in name:
            assert (value == 1).all(), name
        elif "decoder" not in name and not name.endswith("predictions.bias"):
            assert (value == 0).all(), name
    assert made[0][1].projection.bias is None


def test_logits_and_scores_are_in_float32_under_autocast():
    states = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert tutor_module().float()(states).dtype == torch.float32
        assert student_module().float().scores(states[:, :8]).dtype == torch.float32


def test_without_a_tutor_the_student_learns_masked_sentences():
    settings = Untutored(logit_weight=3.0, inner_weight=0.7)
    student, hidden = student_module(), WORDS.masked_fill(MASKED, MASK)
    willing = copy.deepcopy(TEACHER).requires_grad_()
    values = tutor.untutored(student, willing, SPECIAL, MASK, settings)(BATCH)
    values.sum().backward()
    assert all(parameter.grad is None for parameter in willing.parameters())
    options = {"attention_mask": BATCH["attention_mask"], "output_hidden_states": True, "output_attentions": True}
    theirs, ours = TEACHER(hidden, **options), student.network(hidden, **options)
    p, q = theirs.logits[MASKED].log_softmax(-1), ours.logits[MASKED].log_softmax(-1)
    expected = 3.0 * (p.exp() * (p - q)).sum(-1).mean()
    for row, length in enumerate(BATCH["attention_mask"].sum(1).tolist()):
        for mine, their in ((1, 2), (2, 4)):
            mapped = student.projection(ours.hidden_states[mine][row, :length])
            expected += 0.35 * (mapped - theirs.hidden_states[their][row, :length]).square().mean()
            for head in range(2):
                a, b = (e.attentions[k - 1][row, head, :length, :length] for e, k in ((ours, mine), (theirs, their)))
                expected += 0.35 * (a - b).square().mean()
    assert values.shape == (2,) and values.mean().item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strategy": "kind"}, "strategy is 'kind'; expected one of tutor, reverse"),
        ({"baseline": "mean"}, "baseline is 'mean'"),
        ({"imitated": "logits"}, "imitated is 'logits'"),
        ({"order": "first"}, "order is 'first'"),
        ({"tutor_start": "zero"}, "tutor_start is 'zero'"),
        ({"samples": 0}, "samples is 0"),
        ({"baseline": "leave one out"}, "needs samples of 2 or more"),
        ({"everywhere": True, "imitated": "distribution"}, "needs imitated='modified'"),
        ({"reward_weight": 1.5}, "reward_weight is 1.5"),
        ({"temperature": 0.5}, "temperature is 0.5; the tutor's divides probabilities"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValidationError):
        TutorKD(**wrong)
    assert message in checked(TutorKD, wrong)[1][0]
