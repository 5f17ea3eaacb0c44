"""Tutor-KD's equations against re-statements in loops over sentences, positions and words; every filling enumerated."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from kdlib import policy
from kdlib.methods import tutor_words

PAD, CLS, SEP, MASK = range(4)
SPECIAL = (PAD, CLS, SEP)
VOCABULARY = 8
# Two sentences, one shorter; three masked positions, two of them neighbours.
WORDS = torch.tensor([[CLS, 4, 6, 5, SEP, PAD], [CLS, 7, 5, 4, 6, SEP]])
MASKED = torch.tensor([[0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
PLACES = [(0, 2), (1, 1), (1, 2)]
ORIGINALS = WORDS[MASKED]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Network:
    """Outputs for every token that depend on the token itself, on both neighbours and, a little, on all the others."""

    def __init__(self, seed: int, outputs: int):
        self.own, self.left, self.right, self.all = (normal(VOCABULARY, 5, seed=10 * seed + i) for i in range(4))
        self.out = 1.5 * normal(5, outputs, seed=10 * seed + 5)

    def everywhere(self, words):
        here, before, after = self.own[words], self.left[words.roll(1, -1)], self.right[words.roll(-1, -1)]
        return torch.tanh(here + before + after + 0.3 * self.all[words].mean(-2, keepdim=True)) @ self.out

    def __call__(self, words, masked):
        return self.everywhere(words)[masked]


TEACHER, STUDENT = Network(1, VOCABULARY), Network(2, 1)


def scores_of(words, masked):
    return STUDENT(words, masked).squeeze(-1)


HIDDEN = tutor_words.hide(WORDS, MASKED, MASK, SPECIAL)
MASKED_LOGITS = TEACHER(HIDDEN, MASKED)
TUTOR_LOGITS = normal(3, VOCABULARY, seed=3)
EVERY_FILLING = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=3)))


def softmax(row) -> list[float]:
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def lesson(drawn, weight=None):
    made = tutor_words.make_lesson(WORDS, MASKED, drawn, MASKED_LOGITS, TEACHER, scores_of)
    return made if weight is None else made.rewards(weight)


def written(filling, weight):
    """Mixed rewards of one filling, position by position, from the paper's page: eqs. (1)-(5), (9), (10)."""
    filled = WORDS.tolist()
    hidden = WORDS.tolist()
    for (i, t), word in zip(PLACES, filling, strict=True):
        filled[i][t] = int(word)
        hidden[i][t] = MASK
    on_filled, on_hidden = (TEACHER.everywhere(torch.tensor(x)).tolist() for x in (filled, hidden))
    scores = STUDENT.everywhere(torch.tensor(filled)).tolist()
    rewards = []
    for (i, t), word in zip(PLACES, filling, strict=True):
        original = WORDS[i, t]
        p = softmax(on_filled[i][t])
        q = softmax(on_hidden[i][t])
        a_teacher = q[word] / q[original] if q[word] < q[original] else 1.0
        a_student = 1 / (1 + math.exp(-scores[i][t][0]))
        rewards.append(weight * (p[original] - p[word]) + (1 - weight) * abs(a_teacher - a_student))
    return rewards


# Samples


def test_hide_masks_the_masked_positions_and_no_other():
    for i, t in itertools.product(range(2), range(6)):
        assert HIDDEN[i, t] == (MASK if (i, t) in PLACES else WORDS[i, t])


@pytest.mark.parametrize("place", [(0, 0), (0, 4), (0, 5), (1, 5)])
def test_padding_and_special_tokens_cannot_be_masked(place):
    masked = MASKED.clone()
    masked[place] = True
    message = rf"sentence {place[0]} is masked at position {place[1]}, where it has the special token {WORDS[place]}"
    with pytest.raises(ValueError, match=message):
        tutor_words.hide(WORDS, masked, MASK, SPECIAL)


def test_fill_puts_the_drawn_words_where_they_were_drawn_for():
    drawn = torch.tensor([[4, 5, 6], [7, 7, 4]])
    filled = tutor_words.fill(WORDS, MASKED, drawn)
    assert filled.shape == (2, 2, 6)
    for s, i, t in itertools.product(range(2), range(2), range(6)):
        expected = drawn[s, PLACES.index((i, t))] if (i, t) in PLACES else WORDS[i, t]
        assert filled[s, i, t] == expected
    assert torch.equal(tutor_words.fill(WORDS, MASKED, ORIGINALS.unsqueeze(0))[0], WORDS)


def test_fill_wants_one_word_for_each_masked_position():
    with pytest.raises(ValueError, match="2 words were drawn for 3 masked positions"):
        tutor_words.fill(WORDS, MASKED, torch.tensor([[4, 5]]))


# Rewards


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_rewards_are_those_of_the_paper_for_every_filling(weight):
    """Catches a^T from the filled sentence, p from the masked one, λ on the wrong reward and a wrong order of rows."""
    rewards = lesson(EVERY_FILLING, weight)
    for filling, ours in zip(EVERY_FILLING[::7], rewards[::7], strict=True):
        assert ours.tolist() == pytest.approx(written(filling.tolist(), weight), rel=1e-12)


def test_the_teachers_reward_lies_between_minus_one_and_one_and_is_zero_for_the_original():
    rewards = lesson(EVERY_FILLING).teacher_reward
    assert rewards.min() < 0 < rewards.max() and rewards.abs().max() <= 1
    assert (rewards[EVERY_FILLING == ORIGINALS] == 0).all()


def test_the_modified_probability_is_one_for_all_that_is_at_least_as_likely():
    targets = lesson(EVERY_FILLING).targets
    likely = MASKED_LOGITS.gather(-1, EVERY_FILLING.T).T >= MASKED_LOGITS.gather(-1, ORIGINALS[:, None]).T
    assert (targets[likely] == 1).all() and (targets[~likely] < 1).all() and (targets > 0).all()


def test_the_modified_probability_survives_where_both_probabilities_vanish():
    """p_r/p_o is 0/0 in float32 here."""
    logits = torch.tensor([[0.0, -200.0, -201.0]])
    assert logits.softmax(-1)[0, 1:].tolist() == [0, 0]
    target = tutor_words.modified_probability(logits, torch.tensor([1]), torch.tensor([[2]]))
    assert target.item() == pytest.approx(math.exp(-1))


def test_sums_over_the_positions_of_a_sentence():
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    assert tutor_words.per_sentence(values, MASKED).tolist() == [[1, 6], [8, 48]]
    assert tutor_words.per_sentence(values[0], MASKED).tolist() == [1, 6]
    assert tutor_words.sentence_credit(values, MASKED).tolist() == [[1, 6, 6], [8, 48, 48]]
    empty = torch.cat([MASKED, torch.zeros(1, 6, dtype=torch.bool)])
    assert tutor_words.per_sentence(values[0], empty).tolist() == [1, 6, 0]


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match="expected λ between 0"):
        tutor_words.mixed_reward(torch.zeros(1), torch.zeros(1), weight)


def test_the_released_code_takes_twice_the_even_mixture():
    made = lesson(EVERY_FILLING)
    torch.testing.assert_close(made.rewards(0.5), (made.teacher_reward + made.student_reward) / 2)


# What counts, and what is a constant


def test_only_masked_positions_count():
    """Whatever teacher and student say elsewhere, at padding too, leaves rewards, targets and losses as they are."""

    def loud(answer):
        def everywhere(words, masked):
            full = answer(words)
            noise = 1e6 * normal(*full.shape, seed=9) * (~masked).unsqueeze(-1)
            return (full + noise)[masked].squeeze(-1)

        return everywhere

    ours = lesson(EVERY_FILLING[:40])
    theirs = tutor_words.make_lesson(
        WORDS, MASKED, EVERY_FILLING[:40], MASKED_LOGITS, loud(TEACHER.everywhere), loud(STUDENT.everywhere)
    )
    for name in ("targets", "scores", "teacher_reward", "student_reward"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.targets.shape == (40, 3), "three positions of twelve tokens"


def test_no_gradient_reaches_the_teacher_and_none_reaches_the_student_through_a_reward():
    teacher, student, head = Network(1, VOCABULARY), Network(2, 1), TUTOR_LOGITS.clone().requires_grad_()
    teacher.out.requires_grad_()
    student.out.requires_grad_()
    masked_logits = teacher(HIDDEN, MASKED)
    drawn = policy.draw_actions(head, 4, torch.Generator().manual_seed(0))
    made = tutor_words.make_lesson(
        WORDS, MASKED, drawn, masked_logits, teacher, lambda *rows: student(*rows).squeeze(-1)
    )
    rewards = made.rewards()
    tutor_words.tutor_loss(head, masked_logits, drawn, rewards, policy.leave_one_out(rewards)).sum().backward()
    assert head.grad.abs().sum() > 0
    assert teacher.out.grad is None and student.out.grad is None
    tutor_words.modified_loss(made.scores, made.targets).backward()
    assert teacher.out.grad is None and student.out.grad.abs().sum() > 0


def test_the_teacher_is_asked_once_and_without_a_graph():
    asked = []

    def teacher(words, masked):
        asked.append((tuple(words.shape), torch.is_grad_enabled()))
        return TEACHER(words, masked)

    tutor_words.make_lesson(WORDS, MASKED, EVERY_FILLING[:5], MASKED_LOGITS, teacher, scores_of)
    assert asked == [((10, 6), False)]


@pytest.mark.parametrize("function", [tutor_words.teacher_reward, tutor_words.modified_probability])
def test_what_is_made_of_the_teachers_logits_is_a_constant(function):
    logits = normal(3, VOCABULARY, seed=4).requires_grad_()
    logits = logits if function is tutor_words.modified_probability else logits.expand(2, -1, -1)
    assert not function(logits, ORIGINALS, EVERY_FILLING[:2]).requires_grad


def test_the_students_reward_is_a_constant():
    scores = normal(2, 3, seed=5).requires_grad_()
    assert not tutor_words.student_reward(torch.full((2, 3), 0.5, dtype=torch.float64), scores).requires_grad


# The tutor's gradient


def enumerated(credit, weight=0.3, baseline=0.0):
    """The mean over every filling, with its probability, of the gradient of −tutor_loss without KL."""
    head = TUTOR_LOGITS.clone().requires_grad_()
    rewards = credit(lesson(EVERY_FILLING, weight))
    chances = policy.log_probability(TUTOR_LOGITS, EVERY_FILLING).sum(-1).exp()
    total = torch.zeros_like(TUTOR_LOGITS)
    for filling, earned, chance in zip(EVERY_FILLING, rewards, chances, strict=True):
        loss = tutor_words.tutor_loss(head, MASKED_LOGITS, filling[None], earned[None], baseline, kl_weight=0.0).sum()
        total -= chance * torch.autograd.grad(loss, head)[0]
    return total


def expected_total(logits, weight=0.3):
    """E[Σ_t r_t(X')], over every filling: eq. (2)."""
    p = logits.softmax(-1)
    chances = torch.stack([p[t, EVERY_FILLING[:, t]] for t in range(3)]).prod(0)
    return (chances * lesson(EVERY_FILLING, weight).sum(-1)).sum()


def test_with_the_sentences_reward_the_mean_is_the_gradient_of_the_expected_reward():
    logits = TUTOR_LOGITS.clone().requires_grad_()
    exact = torch.autograd.grad(expected_total(logits), logits)[0]
    ours = enumerated(lambda rewards: tutor_words.sentence_credit(rewards, MASKED))
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_equation_6_is_exact_where_a_position_is_alone_and_biased_where_two_share_a_sentence():
    logits = TUTOR_LOGITS.clone().requires_grad_()
    exact = torch.autograd.grad(expected_total(logits), logits)[0]
    ours = enumerated(lambda rewards: rewards)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-10, atol=1e-12)
    assert ((ours - exact)[1:].norm() / exact[1:].norm()).item() > 0.05


def test_a_step_down_the_tutors_loss_raises_the_expected_reward():
    """The sign of ascent."""
    head = TUTOR_LOGITS.clone().requires_grad_()
    drawn = policy.draw_actions(head, 2_000, torch.Generator().manual_seed(1))
    earned = tutor_words.sentence_credit(lesson(drawn, 0.3), MASKED)
    loss = tutor_words.tutor_loss(head, MASKED_LOGITS, drawn, earned, kl_weight=0.0).sum()
    after = head.detach() - 5.0 * torch.autograd.grad(loss, head)[0]
    assert expected_total(after) > expected_total(head.detach()) + 0.01


def test_the_loss_is_the_released_codes_but_for_its_logarithms():
    """Mean over positions of −log π (r_T + r_S), plus `KLDivLoss(batchmean)` from teacher to tutor."""
    head = TUTOR_LOGITS.clone().requires_grad_()
    drawn, made = EVERY_FILLING[77:78], lesson(EVERY_FILLING[77:78])
    ours = tutor_words.tutor_loss(head, MASKED_LOGITS, drawn, 2 * made.rewards(0.5)).mean()
    probability = head.softmax(-1)[torch.arange(3), drawn[0]]
    policy_loss = (-probability.log() * (made.teacher_reward + made.student_reward)[0]).mean()
    kl = torch.nn.KLDivLoss(reduction="batchmean")(head.softmax(-1).log(), MASKED_LOGITS.softmax(-1))
    theirs = policy_loss + kl
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, head)[0] for loss in (ours, theirs)))


def test_alone_the_tutors_kl_makes_it_its_teacher():
    head = TUTOR_LOGITS.clone().requires_grad_()
    optimiser = torch.optim.Adam([head], lr=0.1)
    nothing = torch.zeros(1, 3, dtype=torch.float64)
    for _ in range(500):
        optimiser.zero_grad()
        tutor_words.tutor_loss(head, MASKED_LOGITS, EVERY_FILLING[:1], nothing, kl_weight=0.5).sum().backward()
        optimiser.step()
    torch.testing.assert_close(head.softmax(-1), MASKED_LOGITS.softmax(-1), rtol=1e-3, atol=1e-4)


# The student's loss


@pytest.mark.parametrize("temperature", [1.0, 1.5, 4.0])
def test_the_modified_loss_is_the_binary_cross_entropy_written_out(temperature):
    made = lesson(EVERY_FILLING[:30])
    ours = tutor_words.modified_loss(made.scores, made.targets, temperature, "none")
    for value, score, target in zip(ours.flatten(), made.scores.flatten(), made.targets.flatten(), strict=True):
        a_t, a_s = target.item() / temperature, 1 / (1 + math.exp(-score)) / temperature
        assert value.item() == pytest.approx(-a_t * math.log(a_s) - (1 - a_t) * math.log(1 - a_s), rel=1e-12)


def test_at_temperature_one_it_is_torchs():
    made = lesson(EVERY_FILLING[:30])
    expected = F.binary_cross_entropy_with_logits(made.scores, made.targets)
    torch.testing.assert_close(tutor_words.modified_loss(made.scores, made.targets), expected)


@given(arrays(float, 4, elements=st.floats(-5, 5)), st.floats(1, 10))
def test_the_modified_loss_is_smallest_where_the_student_agrees(scores, temperature):
    scores = torch.from_numpy(scores).requires_grad_()
    targets = scores.sigmoid().detach()
    tutor_words.modified_loss(scores, targets, temperature, "sum").backward()
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores), rtol=0, atol=1e-9)
    best = tutor_words.modified_loss(scores, targets, temperature, "none")
    for shift in (-0.5, 0.5):
        assert (tutor_words.modified_loss(scores + shift, targets, temperature, "none") > best).all()


def test_the_students_targets_are_constants():
    scores, targets = normal(3, seed=6).requires_grad_(), torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    tutor_words.modified_loss(scores, targets).backward()
    assert targets.grad is None and scores.grad is not None


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_modified_loss_stays_finite_for_a_student_that_is_sure(temperature):
    scores = torch.tensor([-300.0, 300.0, -300.0, 300.0], requires_grad=True)
    loss = tutor_words.modified_loss(scores, torch.tensor([0.0, 1.0, 1.0, 0.0]), temperature, "none")
    loss.sum().backward()
    assert loss.isfinite().all() and scores.grad.isfinite().all()
    assert loss[2].item() == pytest.approx((300 + math.log(temperature)) / temperature, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 0.0, math.inf, math.nan])
def test_a_temperature_below_one_would_make_probabilities_above_one(temperature):
    with pytest.raises(ValueError, match="expected 1 or more"):
        tutor_words.modified_loss(torch.zeros(2), torch.ones(2), temperature)


def test_a_sigmoid_of_a_probability_could_not_follow_the_teacher():
    """Why a^S is not read as eq. (10) prints it."""
    probabilities = torch.linspace(0, 1, 101)
    reach = tutor_words.modified_prediction(probabilities)
    assert reach.min() == 0.5 and reach.max() < 0.74
    assert (lesson(EVERY_FILLING).targets < 0.5).double().mean() > 0.2
