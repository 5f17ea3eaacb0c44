"""The estimators against enumeration: of every action, and of every tuple of samples with its probability."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from torch.distributions import Categorical

from kdlib import policy


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), logits)[0]


def exact(logits: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """∂/∂z_c of Σ_a π_a r_a, written out: π_c (r_c − Σ_a π_a r_a)."""
    result = torch.zeros_like(logits)
    for i, row in enumerate(logits.detach()):
        total = sum(math.exp(z) for z in row)
        p = [math.exp(z) / total for z in row]
        mean = sum(p[a] * rewards[i, a] for a in range(len(row)))
        for c in range(len(row)):
            result[i, c] = p[c] * (rewards[i, c] - mean)
    return result


# Estimators: (rewards of the samples) → baseline.  What the running mean knows comes from steps before.
BASELINES = {
    "none": lambda rewards: 0.0,
    "running mean": lambda rewards: policy.running_mean(0.3, torch.tensor([1.1, 0.4])),
    "leave one out": policy.leave_one_out,
    "self-including": lambda rewards: rewards.mean(dim=0),
}
UNBIASED = ["none", "running mean", "leave one out"]


def estimate(logits, actions, rewards, baseline):
    """The estimate of the gradient from some samples: rewards by action, `(choices, actions)`."""
    leaf = logits.clone().requires_grad_()
    earned = rewards.gather(-1, actions.T).T
    return gradient(policy.reinforce(leaf, actions, earned, BASELINES[baseline](earned)), leaf)


def moments(logits, rewards, baseline, samples):
    """Mean, and variance summed over the logits, of the estimate for one choice: all tuples of samples enumerated."""
    p, count = logits.softmax(-1)[0], logits.shape[-1]
    mean, square = torch.zeros_like(logits), 0.0
    for actions in itertools.product(range(count), repeat=samples):
        chance = math.prod(p[a].item() for a in actions)
        found = estimate(logits, torch.tensor(actions).unsqueeze(-1), rewards, baseline)
        mean, square = mean + chance * found, square + chance * found.square().sum().item()
    return mean, square - mean.square().sum().item()


CASES = [(normal(1, 4, seed=seed), normal(1, 4, seed=50 + seed) + offset) for seed in (0, 1) for offset in (0.0, 2.0)]


# Drawing


def test_actions_are_drawn_with_the_softmax_of_their_own_choice():
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5], [3.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    actions = policy.draw_actions(logits, 20_000, torch.Generator().manual_seed(0))
    assert actions.shape == (20_000, 2)
    for choice, p in enumerate(logits.softmax(-1)):
        counts = torch.bincount(actions[:, choice], minlength=4)
        assert stats.chisquare(counts.numpy(), 20_000 * p.numpy()).pvalue > 1e-3


def test_samples_and_choices_are_independent():
    actions = policy.draw_actions(torch.zeros(2, 2, dtype=torch.float64), 20_000, torch.Generator().manual_seed(1))
    table = torch.bincount(2 * actions[:, 0] + actions[:, 1], minlength=4)
    later = torch.bincount(2 * actions[1:, 0] + actions[:-1, 0], minlength=4)
    for counts in (table, later):
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_a_seed_repeats_the_draw_and_no_gradient_is_kept():
    logits = normal(3, 5, seed=2).requires_grad_()
    first, second = (policy.draw_actions(logits, 7, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    with pytest.raises(ValueError, match=r"samples is 0; expected 1 or more"):
        policy.draw_actions(logits, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_can_be_drawn_from(dtype):
    logits = torch.full((2, 12), -30.0, dtype=dtype)
    logits[0, 3], logits[1, 7] = 0.0, 0.0
    assert policy.draw_actions(logits, 5, torch.Generator().manual_seed(0)).tolist() == [[3, 7]] * 5


def test_log_probability_is_that_of_torch_distributions():
    logits, actions = normal(3, 5, seed=3), torch.tensor([[0, 4, 2], [1, 1, 3]])
    expected = Categorical(logits=logits).log_prob(actions)
    torch.testing.assert_close(policy.log_probability(logits, actions), expected)


def test_log_probability_stays_finite_where_the_softmax_is_zero():
    logits = torch.tensor([[0.0, 200.0]], requires_grad=True)
    value = policy.log_probability(logits, torch.tensor([[0]]))
    assert logits.softmax(-1)[0, 0] == 0 and value.item() == pytest.approx(-200)
    assert gradient(value, logits).isfinite().all()


# Unbiased, or not


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize(("baseline", "samples"), [(b, k) for b in UNBIASED for k in (1, 2, 3) if b[0] != "l" or k > 1])
def test_the_mean_over_all_tuples_of_samples_is_the_exact_gradient(baseline, samples, case):
    logits, rewards = CASES[case]
    mean, _ = moments(logits, rewards, baseline, samples)
    torch.testing.assert_close(mean, exact(logits, rewards), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("samples", [2, 3])
def test_a_baseline_that_has_seen_the_sample_itself_shrinks_the_gradient(samples):
    logits, rewards = CASES[0]
    mean, _ = moments(logits, rewards, "self-including", samples)
    torch.testing.assert_close(mean, (1 - 1 / samples) * exact(logits, rewards), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("baseline", UNBIASED)
def test_with_twelve_words_the_mean_of_many_draws_is_exact_within_four_standard_errors(baseline):
    """5,000 replicates of 4 samples; the replicates are rows of one table of logits."""
    logits, rewards, replicates = normal(1, 12, seed=5), normal(1, 12, seed=6) + 1.0, 5_000
    table = logits.repeat(replicates, 1)
    actions = policy.draw_actions(table, 4, torch.Generator().manual_seed(7))
    found = estimate(table, actions, rewards.repeat(replicates, 1), baseline)
    error = found.mean(0) - exact(logits, rewards)[0]
    assert (error.abs() < 4 * found.std(0) / math.sqrt(replicates)).all()
    wrong = found.mean(0) - 0.75 * exact(logits, rewards)[0]  # what a self-including baseline would give
    assert (wrong.abs() > 4 * found.std(0) / math.sqrt(replicates)).any(), "the test could not see a bias"


def test_the_expected_reward_and_its_gradient_are_the_sum_over_actions():
    logits, rewards = normal(3, 12, seed=8).requires_grad_(), normal(3, 12, seed=9)
    value = policy.expected_reward(logits, rewards)
    for i in range(3):
        weights = [math.exp(z) for z in logits[i].tolist()]
        expected = sum(w * r for w, r in zip(weights, rewards[i].tolist(), strict=True)) / sum(weights)
        assert value[i].item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient(value, logits), exact(logits, rewards), rtol=1e-10, atol=1e-14)


def test_following_the_gradient_raises_the_expected_reward():
    """The sign: what is returned is to be made large."""
    logits, rewards = CASES[0]
    mean, _ = moments(logits, rewards, "leave one out", 2)
    before, after = (policy.expected_reward(z, rewards).item() for z in (logits, logits + 0.1 * mean))
    assert after > before


# Laws

tables = arrays(float, (2, 5), elements=st.floats(-3, 3)).map(torch.from_numpy)
offsets = st.floats(-50, 50)


@given(tables, tables, offsets)
def test_a_constant_added_to_all_rewards_changes_no_expected_gradient(logits, rewards, offset):
    leaf = logits.clone().requires_grad_()
    shifted, plain = (gradient(policy.expected_reward(leaf, r), leaf) for r in (rewards + offset, rewards))
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-12)


@given(tables, tables, offsets, st.integers(2, 6), st.integers(0, 99))
def test_leaving_one_out_makes_every_single_estimate_blind_to_a_constant(logits, rewards, offset, samples, seed):
    actions = policy.draw_actions(logits, samples, torch.Generator().manual_seed(seed))
    shifted, plain = (estimate(logits, actions, r, "leave one out") for r in (rewards + offset, rewards))
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-11)


@given(tables, tables, st.floats(-3, 3), st.floats(-3, 3))
def test_the_estimate_is_linear_in_the_reward(logits, rewards, a, b):
    actions = policy.draw_actions(logits, 3, torch.Generator().manual_seed(0))
    parts = a * estimate(logits, actions, rewards, "none") + b * estimate(logits, actions, rewards**2, "none")
    whole = estimate(logits, actions, a * rewards + b * rewards**2, "none")
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12)


# Variance


def single(logits, rewards, baseline):
    """E[(r − b)² ‖s‖²] − ‖g‖² for one sample, s = e_a − π the score; with E‖s‖², and Var r."""
    p, r = logits.softmax(-1)[0], rewards[0]
    scores = torch.eye(len(p), dtype=p.dtype) - p
    norms, g = scores.square().sum(-1), exact(logits, rewards)
    spread = (p * (r - p @ r).square()).sum()
    return ((p * (r - baseline).square() * norms).sum() - g.square().sum()).item(), (p @ norms).item(), spread.item()


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("samples", [2, 3])
def test_the_variance_of_leaving_one_out_is_that_of_the_mean_as_baseline_plus_its_price(samples, case):
    """Var = V(μ)/k + (‖g‖² + Var(r) E‖s‖²) / (k(k − 1))."""
    logits, rewards = CASES[case]
    average = (logits.softmax(-1) * rewards).sum()
    ideal, norm, spread = single(logits, rewards, average)
    price = (exact(logits, rewards).square().sum().item() + spread * norm) / (samples * (samples - 1))
    _, found = moments(logits, rewards, "leave one out", samples)
    assert found == pytest.approx(ideal / samples + price, rel=1e-10)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_variance_without_a_baseline_falls_as_one_over_the_samples(case):
    logits, rewards = CASES[case]
    for samples in (1, 2, 3):
        _, found = moments(logits, rewards, "none", samples)
        assert found == pytest.approx(single(logits, rewards, 0.0)[0] / samples, rel=1e-10)


@given(arrays(float, (1, 3), elements=st.floats(-2, 2)), arrays(float, (1, 3), elements=st.floats(-2, 2)))
def test_leaving_one_out_has_no_more_variance_than_nothing_once_the_mean_reward_is_large(logits, rewards):
    """It must, from the mean on where μ² E‖s‖² + 2μ E[(r − μ)‖s‖²] ≥ (‖g‖² + Var(r) E‖s‖²)/(k − 1), k = 2 here."""
    logits, rewards = torch.from_numpy(logits), torch.from_numpy(rewards)
    p = logits.softmax(-1)
    rewards = rewards - (p * rewards).sum()
    norms = (torch.eye(3, dtype=p.dtype) - p[0]).square().sum(-1)
    tilt, norm = (p[0] * rewards[0] * norms).sum().item(), (p[0] @ norms).item()
    price = exact(logits, rewards).square().sum().item() + single(logits, rewards, 0.0)[2] * norm
    edge = (-tilt + math.sqrt(tilt**2 + norm * price)) / norm  # the positive root
    _, theirs = moments(logits, rewards, "leave one out", 2)
    for factor in (1.01, 2.0, 10.0):
        _, plain = moments(logits, rewards + factor * edge, "none", 2)
        assert theirs <= plain + 1e-9
    if edge > 1e-3:
        _, plain = moments(logits, rewards + 0.9 * edge, "none", 2)
        assert theirs > plain, "below the edge the baseline costs more than it saves"


# Constants and complaints


def test_neither_rewards_nor_baseline_get_a_gradient():
    logits, rewards = normal(2, 5, seed=10).requires_grad_(), normal(3, 2, seed=11).requires_grad_()
    baseline = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    actions = policy.draw_actions(logits, 3, torch.Generator().manual_seed(0))
    value = policy.reinforce(logits, actions, rewards, baseline + policy.leave_one_out(rewards))
    table = normal(2, 5, seed=12).requires_grad_()
    value = value.sum() + policy.expected_reward(logits, table).sum()
    value.backward()
    assert rewards.grad is None and baseline.grad is None and table.grad is None and logits.grad is not None
    assert not policy.running_mean(0.0, rewards).requires_grad


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 0.0], [2.0, 5.0], [6.0, 1.0]])
    assert policy.leave_one_out(rewards).tolist() == [[4.0, 3.0], [3.5, 0.5], [1.5, 2.5]]
    with pytest.raises(ValueError, match="2 samples of each choice or more, got 1"):
        policy.leave_one_out(rewards[:1])


def test_the_running_mean_forgets_geometrically():
    steps, value = [[1.0, 3.0], [4.0, 4.0], [-1.0, 1.0]], 0.0
    for rewards in steps:
        value = policy.running_mean(value, torch.tensor(rewards), decay=0.75)
    assert value.item() == pytest.approx(0.25 * (0.75**2 * 2 + 0.75 * 4 + 0))
    assert policy.running_mean(value, torch.tensor([2.0, 4.0]), decay=0.0).item() == 3.0
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="decay is"):
            policy.running_mean(0.0, torch.tensor([1.0]), decay)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_named():
    logits, actions = normal(2, 5, seed=0), torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"rewards have shape \(2, 3\), actions \(3, 2\)"):
        policy.reinforce(logits, actions, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"actions have shape \(3, 4\) and logits \(2, 5\)"):
        policy.log_probability(logits, torch.zeros(3, 4, dtype=torch.long))
